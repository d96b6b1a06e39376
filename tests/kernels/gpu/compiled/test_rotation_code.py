"""What a rotation costs in the machine code of the quantizers, for GPUs that are not there."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter cannot be compiled", allow_module_level=True)

from benchmarks.lib.machine_code import MachineCode, compile_kernel, faults
from dialect_kernels.gpu import quantize_activations, quantize_fp8, quantize_packed, rotation

pytestmark = pytest.mark.slow

ELEMENTS = 32
"""Of a thread."""
MOST = 7
"""Instructions of a rotation for each element: five sums, a product, and one for all else. Weights
and decomposed tokens are read, and rotated, twice."""
MORE = {("fp8 of float32", 100): 7.25}
"""Where it takes more."""
SPILLS = {("fp8", 100): 8, ("weights by the online rule", 80): 8}
"""Bytes that a thread spills; the first only where Triton 3.7.1 compiles."""

everywhere = pytest.mark.parametrize("capability", [80, 89, 90, 100])


def activations(dialects: int, video: bool = False):
    constants = {
        "DIALECTS": dialects, "B": 32, "CHUNK": 4096, "ONE_CHUNK": True, "OPERANDS": True,
        "SALIENT": video, "GROUPED": video, "ALIGNED": True, "ASM": True,
    }  # fmt: skip
    unused = ("p_zeros",) if video else ("p_salient", "p_group", "p_totals")
    constants |= dict.fromkeys(unused)
    return quantize_activations._quantize_activation_kernel, constants, {}, 4


def fp8(dtype: str):
    constants = {"CHUNK": 4096, "ONE_CHUNK": True, "OPERANDS": True, "ALIGNED": True, "ASM": True}
    constants["NATIVE"] = False
    return quantize_fp8._quantize_activation_fp8_kernel, constants, {"p_x": dtype}, 4


def packed(dialects: int, exact_error: bool):
    constants = {
        "DIALECTS": dialects, "ID_BITS": {16: 4, 32: 5}[dialects], "B": 32, "CHUNK": 2048,
        "EXACT_ERROR": exact_error, "WIDE": exact_error, "ALIGNED": True, "ASM": True,
    }  # fmt: skip
    return quantize_packed._quantize_packed_kernel, constants, {"p_steps": "*i32"}, 2


KERNELS = {
    "activations, 16 dialects": activations(16),
    "activations, 32 dialects": activations(32),
    "activations, salient and grouped": activations(32, video=True),
    "fp8": fp8("*bf16"),
    "fp8 of float32": fp8("*fp32"),
    "weights by the online rule": packed(16, exact_error=False),
    "weights by exact error": packed(32, exact_error=True),
}


def flushed(code: MachineCode) -> int:
    """How many sums would lose subnormal numbers."""
    return sum(text.startswith("FADD.FTZ") for text in code.instructions)


@everywhere
@pytest.mark.parametrize("kind", KERNELS)
def test_a_rotation_is_little_more_than_its_sums(capability, kind):
    kernel, constants, pointers, num_warps = KERNELS[kind]
    if "NATIVE" in constants:
        constants = constants | {"NATIVE": capability >= 89}
    plain, rotated = (
        compile_kernel(kernel, capability, constants | {"ROTATED": yes}, pointers, num_warps)
        for yes in (False, True)
    )
    spilled = [f"spills {SPILLS.get((kind, capability))} bytes a thread"]
    assert faults(rotated, capability) in ([], spilled)
    assert flushed(rotated) <= flushed(plain)  # a division has some of its own
    more = (len(rotated.instructions) - len(plain.instructions)) / ELEMENTS
    print(f"{more:.2f} instructions an element more, {rotated.registers} registers")
    most = MORE.get((kind, capability), MOST)
    assert more <= (1 + ("weights" in kind or "salient" in kind)) * most
    assert rotated.operations["SHFL"] <= plain.operations["SHFL"]  # no group lies on two threads


@everywhere
@pytest.mark.parametrize("dtype", ["*bf16", "*fp16", "*fp32"])
def test_rotated_tokens(capability, dtype):
    constants = {"CHUNK": 4096, "ALIGNED": True, "ASM": True}
    code = compile_kernel(
        rotation._rotate_kernel, capability, constants, {"p_x": dtype, "p_y": dtype}, 4
    )
    assert not faults(code, capability)
    assert not flushed(code)
    assert len(code.instructions) / ELEMENTS <= 20
    loads = [text for text in code.instructions if text.startswith("LDG.E.128")]
    assert len(loads) == ELEMENTS * (4 if dtype == "*fp32" else 2) // 16
