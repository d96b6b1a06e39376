"""Reading and writing rows of a matrix inside Triton kernels, a chunk of whole blocks at a time.

Quantized tokens leave in one of two orders of their columns. A product over K may take columns in
any order, and packed weights leave their decoder in the *order of operands*, every eight columns'
first four in one half of the row and their last four in the other::

    natural    | 0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 14 15 | ...
    operands   | 0 1 2 3 8 9 10 11 | ...    || 4 5 6 7 12 13 14 15 | ...
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl

__all__ = [
    "RowConfig",
    "aligned",
    "block_columns",
    "clear",
    "interpreted",
    "load_blocks",
    "operand_columns",
    "readable",
    "readable_rows",
    "row_config",
    "written_dtype",
]

_VECTOR = 16
"""Bytes that one instruction loads."""
_ELEMENTS = 16
"""Elements that rows must be multiples of, to be read in vectors."""


@dataclass(frozen=True)
class RowConfig:
    """How one program works on a row.

    Attributes:
        chunk: columns held in registers at a time, a power of two and at least 128.
        num_warps: warps of a program.
    """

    chunk: int
    num_warps: int


@lru_cache(maxsize=256)
def row_config(columns: int, groups: bool = True) -> RowConfig:
    """A safe default: the whole row at once, up to 8192 columns.

    Args:
        columns: of the row.
        groups: whether a thread holds whole groups of 32 columns.
    """
    chunk = min(8192, max(128, 1 << max(0, columns - 1).bit_length()))
    return RowConfig(chunk, num_warps=max(1, min(8, chunk // (1024 if groups else 512))))


@cache
def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU; inline PTX does not exist there.

    Kernels are made for one or the other when they are defined: it does not change.
    """
    return bool(triton.knobs.runtime.interpret)


def readable(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if it is not contiguous or does not begin at a multiple of 16 bytes.

    Kernels are compiled for where their arguments begin: without the copy a view of another tensor
    could be compiled for while serving.
    """
    if x.is_contiguous() and x.data_ptr() % _VECTOR == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def readable_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [T, K], copied if elements of a row are not neighbours, or rows begin elsewhere.

    The first row begins at a multiple of 16 bytes, and every other row at a multiple of 16
    elements further on if K is one, so that K alone says how rows can be read.
    """
    neighbours = x.shape[1] <= 1 or x.stride(1) == 1
    vectors = x.data_ptr() % _VECTOR == 0 and (x.shape[1] % _ELEMENTS != 0 or aligned(x))
    return x if neighbours and vectors else x.clone(memory_format=torch.contiguous_format)


def aligned(x: torch.Tensor) -> bool:
    """Whether rows of `x` can be read in vectors of 16 elements."""
    of_rows = x.shape[0] <= 1 or x.stride(0) % _ELEMENTS == 0
    return x.shape[1] % _ELEMENTS == 0 and of_rows


def written_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels write quantized tokens of `dtype`: bytes for E4M3 numbers.

    Raises:
        ValueError: if it is neither float8_e4m3fn nor bfloat16.
    """
    written = {torch.float8_e4m3fn: torch.uint8, torch.bfloat16: torch.bfloat16}.get(dtype)
    if written is None:
        raise ValueError(f"dtype: {dtype}; allowed are float8_e4m3fn and bfloat16")
    return written


@triton.jit
def clear(p_zeros, count):
    """The first program fills an int32 array with zeros; nothing to do where there is none."""
    if p_zeros is not None:  # noqa: SIM102 (decided while compiling)
        if tl.program_id(0) == 0:
            for first in range(0, count, 1024):
                o_zero = first + tl.arange(0, 1024)
                tl.store(p_zeros + o_zero, tl.zeros((1024,), tl.int32), mask=o_zero < count)


@triton.jit
def block_columns(first, B: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr = 1):
    """Columns of the blocks of a chunk, every STEP-th one, int32 [CHUNK / B, B / STEP]."""
    o_block = tl.arange(0, CHUNK // B)[:, None] * B
    return first + o_block + tl.arange(0, B // STEP)[None, :] * STEP


@triton.jit
def load_blocks(p_row, first, columns, B: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk of a row as float32 [CHUNK / B, B], zero beyond the row's end."""
    o_column = block_columns(first, B, CHUNK)
    return tl.load(p_row + o_column, mask=o_column < columns, other=0.0).to(tl.float32)


@triton.jit
def operand_columns(o_column, padded):
    """Where columns of a row of `padded` (a multiple of 8) go in the order of operands."""
    return o_column // 8 * 4 + o_column % 4 + (o_column // 4) % 2 * (padded // 2)
