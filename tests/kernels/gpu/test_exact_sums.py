"""Compiled for GPUs, no step of an FP8 or exact product starts from the sum of those before it.

Triton turns ``total + dot(w, x)`` into an MMA that accumulates on `total`, with the MMA's own
precision and rounding; the interpreter cannot show that. Needs no GPU.
"""

import re

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dialect_kernels.gpu import gemm

TYPES = {
    "p_x": "*bf16",
    "p_x_scale": "*fp32",
    "p_codes": "*u8",
    "p_meta": "*u8",
    "p_row_exponent": "*i8",
    "p_table": "*i64",
    "p_y": "*fp32",
}
TILE = {"B": 32, "BM": 16, "BN": 64, "EVEN": True, "ASM": True}
NOT_SPLIT = {"SPLIT": False, "p_partial": None, "p_arrived": None}
NO_BIAS = {"p_bias": None}
ONE_WEIGHT = {"p_tiles": None, "p_rows": None}
SIXTEEN = {"ALIGNED": True, "FLOAT16": False}


def gpu_code(kernel, capability, constants, types):
    """Triton's intermediate code of a kernel for NVIDIA GPUs of a compute capability."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("p_x", "p_codes")},
    )
    return compile(source, target=GPUTarget("cuda", capability, 32)).asm["ttgir"]


@pytest.mark.parametrize("capability", [80, 90])
def test_sums_of_exact_steps_are_kept_apart(capability):
    constants = TILE | NOT_SPLIT | NO_BIAS | ONE_WEIGHT | SIXTEEN | {"EXACT": True, "BK": 32}
    check(gpu_code(gemm.sixteen_bit_kernel, capability, constants, TYPES), 1)


@pytest.mark.parametrize("capability", [80, 90])
def test_sums_of_sixteen_bit_steps_stay_in_the_accumulator(capability):
    """It is float32, and nothing is added beside it."""
    constants = TILE | NOT_SPLIT | NO_BIAS | ONE_WEIGHT | SIXTEEN | {"EXACT": False, "BK": 128}
    code = gpu_code(gemm.sixteen_bit_kernel, capability, constants, TYPES)
    started = accumulators(code)
    assert len(started) == 4
    assert not any(accumulator.startswith("%cst") for accumulator in started)
    assert "add.rn.f32" not in code
    assert len(re.findall(r"(?:warp_group_dot|tt\.dot) .*-> tensor<\S+xf32", code)) == 4


@pytest.mark.parametrize("capability", [89, 90])
def test_sums_of_eight_bit_steps_are_kept_apart(capability):
    constants = TILE | NOT_SPLIT | NO_BIAS | ONE_WEIGHT | {"BK": 256}
    types = TYPES | {"p_x": "*fp8e4nv"}
    check(gpu_code(gemm.eight_bit_kernel, capability, constants, types), 2)


def accumulators(code):
    """What each MMA adds to."""
    return re.findall(r"(?:warp_group_dot|tt\.dot) %\S+, %\S+, (%\w+)", code)


def check(code, parts):
    """The first MMA of a step starts from zero, the others from the one before."""
    started = accumulators(code)
    assert len(started) == parts
    assert started[0].startswith("%cst"), "a constant: zero"
    assert not any(accumulator.startswith("%arg") for accumulator in started)
    sums = [line for line in code.splitlines() if '"add.rn.f32' in line]
    assert len(sums) == 1
