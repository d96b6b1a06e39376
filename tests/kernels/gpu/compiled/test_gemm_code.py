"""The GEMM's machine code for GPUs that are not there: every plan that the dispatch can choose."""

import os
from dataclasses import replace

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter cannot be compiled", allow_module_level=True)

from benchmarks.lib.machine_code import (
    MMA,
    compile_gemm,
    faults,
    loop_faults,
    per_weight,
    programs_at_once,
)
from dialect_kernels.gpu.linear import EXACT_PLANS, table_of
from dialect_kernels.gpu.tuning import FUSED_FOR_MANY, TABLES, _can_split, for_experts

pytestmark = pytest.mark.slow

MOST_PER_WEIGHT = {16: 2.45, 32: 2.5, 64: 2.75, 128: 3.0}
"""Instructions of the main loop per weight on Hopper in FP8, by tokens of a tile."""


def plans_of(capability, eight_bits):
    """The plans of a device, each once."""
    table = TABLES[table_of(divmod(capability, 10), eight_bits)]
    return dict.fromkeys(plan for _, plan in table)


def cases(eight_bits):
    """Every plan for every device, on Hopper also with its columns split among several programs."""
    return [
        pytest.param(
            capability,
            replace(plan, splits=splits),
            id=f"sm_{capability}, {plan.tokens} x {plan.features}{', split' * (splits > 1)}",
        )
        for capability in MMA[eight_bits]
        for plan in plans_of(capability, eight_bits)
        for splits in ((1, 4) if capability == 90 and _can_split(plan) else (1,))
    ]


def checked(plan, capability, eight_bits, exact=False):
    code = compile_gemm(plan, capability, eight_bits, exact)
    assert not faults(code, capability, MMA[eight_bits][capability])
    assert programs_at_once(code, capability, plan.num_warps) >= 1
    print(f"{per_weight(code, plan, exact):.2f} instructions per weight")
    return code


@pytest.mark.parametrize(("capability", "plan"), cases(eight_bits=True))
def test_eight_bits(capability, plan):
    code = checked(plan, capability, eight_bits=True)
    assert not loop_faults(code)
    if capability == 90:
        assert per_weight(code, plan) <= MOST_PER_WEIGHT[plan.tokens]
        if plan.features == 64:
            assert programs_at_once(code, capability, plan.num_warps) >= 2


@pytest.mark.parametrize(("capability", "plan"), cases(eight_bits=False))
def test_sixteen_bits(capability, plan):
    code = checked(plan, capability, eight_bits=False)
    if capability == 90:  # elsewhere operands pass through shared memory, with conflicts
        assert not loop_faults(code)


def test_a_loop_that_waits_is_found():
    """Three stages: the table is read where the meta bytes say, so no step is on its way."""
    plan = replace(TABLES["fp8"][1][1], num_stages=3)
    assert loop_faults(compile_gemm(plan, 90, True)) == ["copies are 0 steps ahead"]


@pytest.mark.parametrize("capability", MMA[False])
@pytest.mark.parametrize("plan", [plan for _, plan in EXACT_PLANS], ids=lambda p: f"{p.tokens}")
def test_exact_mode(capability, plan):
    """A step is one block on the 16-bit MMA, whose sums of a block are exact."""
    checked(plan, capability, eight_bits=False, exact=True)


@pytest.mark.parametrize(("eight_bits", "many"), [(True, False), (True, True), (False, False)])
def test_experts(eight_bits, many):
    """On Hopper; a schedule names the expert of each tile, and the loop stays as it is."""
    plan = FUSED_FOR_MANY if many else next(p for p in plans_of(90, eight_bits) if p.features == 64)
    code = compile_gemm(plan, 90, eight_bits, experts=True)
    assert not faults(code, 90, MMA[eight_bits][90])
    alone = compile_gemm(plan, 90, eight_bits)
    assert per_weight(code, plan) <= 1.1 * per_weight(alone, plan)


@pytest.mark.parametrize("eight_bits", [True, False])
def test_experts_by_the_widest_tiles(eight_bits):
    """Where registers are fewest."""
    for plan in plans_of(90, eight_bits):
        if plan.features == 256:
            code = compile_gemm(for_experts(plan), 90, eight_bits, experts=True)
            assert not faults(code, 90, MMA[eight_bits][90])
