"""The GEMM's machine code for GPUs that are not there: every plan that the dispatch can choose."""

import os
import re
from dataclasses import replace

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter cannot be compiled", allow_module_level=True)

from machine_code import assert_nothing_spills, compile_kernel

from dialect_kernels import gemm
from dialect_kernels.dispatch import TABLES
from dialect_kernels.gpu import EXACT_PLANS, table_of

pytestmark = pytest.mark.slow

FP8 = {
    89: r"QMMA\.16832\.F32\.E4M3",
    90: r"QGMMA\.64x\d+x32\.F32\.E4M3",
    100: r"UTCQMMA",
    120: r"QMMA\.16832\.F32\.E4M3",
}
"""Compute capability -> matrix instruction."""

SIXTEEN_BITS = {
    80: r"HMMA\.16816\.F32\.BF16",
    89: r"HMMA\.16816\.F32\.BF16",
    90: r"HGMMA\.64x\d+x16\.F32\.BF16",
    100: r"UTCHMMA|HMMA\.16816\.F32\.BF16",
}

MOST_PER_WEIGHT = {16: 2.45, 32: 2.45, 64: 2.7, 128: 3.0}
"""Instructions of the main loop per weight on Hopper in FP8, by tokens of a tile."""

NOT_SPLIT = {"SPLIT": False, "p_partial": None, "p_arrived": None}


def cases(capability, wanted, eight_bits):
    """Every plan with its columns in one program and split among several."""
    plans = TABLES[table_of(divmod(capability, 10), eight_bits)]
    return [
        pytest.param(
            capability,
            replace(plan, splits=splits),
            wanted,
            id=f"sm_{capability}, {plan.tokens} tokens{', split' if splits > 1 else ''}",
        )
        for _, plan in plans
        for splits in (1, 4)
    ]


FP8_CASES = [case for where, wanted in FP8.items() for case in cases(where, wanted, True)]
SIXTEEN_BIT_CASES = [
    case for where, wanted in SIXTEEN_BITS.items() for case in cases(where, wanted, False)
]

EXACT_CASES = [
    pytest.param(capability, plan, wanted, id=f"sm_{capability}, {plan.tokens} tokens")
    for capability, wanted in SIXTEEN_BITS.items()
    for _, plan in EXACT_PLANS
]


def constants(plan, **others):
    tile = {"BM": plan.tokens, "BN": plan.features, "BK": plan.columns}
    split = {"SPLIT": True} if plan.splits > 1 else NOT_SPLIT
    return {"B": 32, "BIAS": True, "EVEN": True, "ASM": True, **split, **tile, **others}


def checked(kernel, capability, plan, wanted, given, pointers):
    code = compile_kernel(kernel, capability, given, pointers, plan.num_warps, plan.num_stages)
    assert_nothing_spills(code, capability)
    loop = code.main_loop()
    assert any(re.search(wanted, text) for text in loop), code.operations
    assert any("PRMT" in text for text in loop)  # weights are decoded in registers
    weights = given["BN"] * given["BK"] / (32 * plan.num_warps)
    return len(loop) / weights


@pytest.mark.parametrize(("capability", "plan", "wanted"), FP8_CASES)
def test_eight_bits(capability, plan, wanted):
    pointers = {"p_x": "*fp8e4nv", "p_table": "*i64"}
    per_weight = checked(gemm.eight_bit_kernel, capability, plan, wanted, constants(plan), pointers)
    print(f"{per_weight:.2f} instructions per weight")
    if capability == 90:
        assert per_weight <= MOST_PER_WEIGHT[plan.tokens]


@pytest.mark.parametrize(("capability", "plan", "wanted"), SIXTEEN_BIT_CASES)
def test_sixteen_bits(capability, plan, wanted):
    given = constants(plan, SCALED=False, ALIGNED=True, EXACT=False, FLOAT16=False, p_x_scale=None)
    pointers = {"p_table": "*i64"}
    per_weight = checked(gemm.sixteen_bit_kernel, capability, plan, wanted, given, pointers)
    print(f"{per_weight:.2f} instructions per weight")


@pytest.mark.parametrize(("capability", "plan", "wanted"), EXACT_CASES)
def test_exact_mode(capability, plan, wanted):
    """A step is one block on the 16-bit MMA, whose sums of a block are exact."""
    given = constants(plan, SCALED=True, ALIGNED=True, EXACT=True, FLOAT16=False, BK=32)
    pointers = {"p_table": "*i64"}
    per_weight = checked(gemm.sixteen_bit_kernel, capability, plan, wanted, given, pointers)
    print(f"{per_weight:.2f} instructions per weight")
