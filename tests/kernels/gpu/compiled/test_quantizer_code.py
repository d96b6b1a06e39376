"""The quantizers' and the decoder's machine code for GPUs that are not there."""

import os
import re

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter cannot be compiled", allow_module_level=True)

from benchmarks.lib.machine_code import compile_kernel, faults
from dialect_kernels.gpu import quantize_activations, quantize_fp8, quantize_packed

pytestmark = pytest.mark.slow

CAPABILITIES = (80, 89, 90, 100)
BOOKS = {16: "dialect_fp4", 32: "semantic_32"}
"""Dialects -> book."""

DTYPES = {"*bf16": "bfloat16", "*fp32": "float32"}

everywhere = pytest.mark.parametrize("capability", CAPABILITIES)
both_books = pytest.mark.parametrize("dialects", BOOKS, ids=BOOKS.get)


def checked(kernel, capability, constants, pointers, num_warps):
    code = compile_kernel(kernel, capability, constants, pointers, num_warps)
    assert not faults(code, capability)
    return code


ACTIVATIONS = {"16 dialects": (16, False), "32 dialects": (32, False),
               "32 dialects, salient and grouped": (32, True)}  # fmt: skip


ELEMENTS = 32
"""Of a thread: a whole block."""


@everywhere
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(capability, kind):
    """One launch reads a row once, decomposed tokens twice, in vectors of 16 bytes."""
    dialects, video = ACTIVATIONS[kind]
    constants = {
        "DIALECTS": dialects, "B": 32, "CHUNK": 4096, "ONE_CHUNK": True, "OPERANDS": True,
        "SALIENT": video, "GROUPED": video, "ROTATED": False, "ALIGNED": True, "ASM": True,
    }  # fmt: skip
    if video:
        constants |= {"p_zeros": None}
    else:
        constants |= {"p_salient": None, "p_group": None, "p_totals": None}
    kernel = quantize_activations._quantize_activation_kernel
    code = checked(kernel, capability, constants, {}, num_warps=4)
    loads = [text for text in code.instructions if text.startswith("LDG.E.128")]
    row = 2 * 4096 // 16 // (32 * 4)  # loads of a thread
    each = len(code.instructions) / ELEMENTS
    print(f"{each:.1f} instructions an element, {code.registers} registers")
    if not video:
        assert each <= 22 if capability == 90 else 26
        assert code.registers <= 128
        words = [text for text in code.instructions if re.match(r"LDG\.E\.64\.CONSTANT", text)]
        assert len(words) == ELEMENTS, "the two words of a cell are loaded once"
    assert len(loads) == (2 if video else 1) * row


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_fp8_activations(capability, dtype):
    constants = {"CHUNK": 4096, "ONE_CHUNK": True, "OPERANDS": True, "ALIGNED": True}
    constants |= {"ROTATED": False, "ASM": True, "NATIVE": capability >= 89}
    kernel = quantize_fp8._quantize_activation_fp8_kernel
    code = checked(kernel, capability, constants, {"p_x": dtype}, num_warps=8)
    if capability >= 89:
        conversions = [text for text in code.instructions if text.startswith("F2FP")]
        assert len(conversions) >= 16 // 2, "two elements at a time"
    if capability == 90 and dtype == "*bf16":
        executed = len(code.without_divisions())
        print(f"{executed / 16:.1f} instructions an element")
        assert executed / 16 <= 22


@everywhere
@both_books
@pytest.mark.parametrize("exact_error", [False, True], ids=["online rule", "exact error"])
def test_packed(capability, dialects, exact_error):
    kernel = quantize_packed._quantize_packed_kernel
    constants = {
        "DIALECTS": dialects, "ID_BITS": {16: 4, 32: 5}[dialects], "B": 32, "CHUNK": 2048,
        "EXACT_ERROR": exact_error, "WIDE": False, "ROTATED": False, "ALIGNED": True, "ASM": True,
    }  # fmt: skip
    checked(kernel, capability, constants, {"p_steps": "*i32"}, num_warps=4)
