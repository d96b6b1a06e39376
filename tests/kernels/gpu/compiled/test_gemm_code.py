"""The GEMM's machine code for GPUs that are not there: every plan that the dispatch can choose."""

import os
from dataclasses import replace

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter cannot be compiled", allow_module_level=True)

from benchmarks.lib.machine_code import MMA, compile_gemm, faults, per_weight
from dialect_kernels.gpu.linear import EXACT_PLANS, table_of
from dialect_kernels.gpu.tuning import FUSED_FOR_MANY, TABLES

pytestmark = pytest.mark.slow

MOST_PER_WEIGHT = {16: 2.45, 32: 2.45, 64: 2.7, 128: 3.0}
"""Instructions of the main loop per weight on Hopper in FP8, by tokens of a tile."""


def cases(eight_bits):
    """Every plan for every device, with its columns in one program and split among several."""
    return [
        pytest.param(
            capability,
            replace(plan, splits=splits),
            id=f"sm_{capability}, {plan.tokens} tokens{', split' if splits > 1 else ''}",
        )
        for capability in MMA[eight_bits]
        for _, plan in TABLES[table_of(divmod(capability, 10), eight_bits)]
        for splits in (1, 4)
    ]


def checked(plan, capability, eight_bits, exact=False):
    code = compile_gemm(plan, capability, eight_bits, exact)
    assert not faults(code, capability, MMA[eight_bits][capability])
    found = per_weight(code, plan, exact)
    print(f"{found:.2f} instructions per weight")
    return found


@pytest.mark.parametrize(("capability", "plan"), cases(eight_bits=True))
def test_eight_bits(capability, plan):
    found = checked(plan, capability, eight_bits=True)
    if capability == 90:
        assert found <= MOST_PER_WEIGHT[plan.tokens]


@pytest.mark.parametrize(("capability", "plan"), cases(eight_bits=False))
def test_sixteen_bits(capability, plan):
    checked(plan, capability, eight_bits=False)


@pytest.mark.parametrize("capability", MMA[False])
@pytest.mark.parametrize("plan", [plan for _, plan in EXACT_PLANS], ids=lambda p: f"{p.tokens}")
def test_exact_mode(capability, plan):
    """A step is one block on the 16-bit MMA, whose sums of a block are exact."""
    checked(plan, capability, eight_bits=False, exact=True)


@pytest.mark.parametrize(("eight_bits", "many"), [(True, False), (True, True), (False, False)])
def test_experts(eight_bits, many):
    """On Hopper; a schedule names the expert of each tile, and the loop stays as it is."""
    plan = FUSED_FOR_MANY if many else TABLES[table_of((9, 0), eight_bits)][0][1]
    code = compile_gemm(plan, 90, eight_bits, experts=True)
    assert not faults(code, 90, MMA[eight_bits][90])
    alone = compile_gemm(plan, 90, eight_bits)
    assert per_weight(code, plan) <= 1.1 * per_weight(alone, plan)
