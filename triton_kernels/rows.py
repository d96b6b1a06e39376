"""Reading rows of a matrix inside Triton kernels, a chunk of whole blocks at a time."""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = [
    "RowConfig",
    "aligned",
    "block_columns",
    "interpreted",
    "load_blocks",
    "permuted_columns",
    "row_config",
    "with_unit_stride",
]


@dataclass(frozen=True)
class RowConfig:
    """How one program works on a row.

    Attributes:
        chunk: columns held in registers at a time, a power of two and at least 128.
        num_warps: warps of a program.
    """

    chunk: int
    num_warps: int


def row_config(columns: int) -> RowConfig:
    """A configuration that is never bad: the whole row at once up to 8192 columns."""
    chunk = min(8192, max(128, int(triton.next_power_of_2(columns))))
    return RowConfig(chunk, num_warps=max(1, min(8, chunk // 512)))


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU; inline PTX does not exist there."""
    return bool(triton.knobs.runtime.interpret)


def with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` [T, K], copied if the elements of a row are not neighbours."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def aligned(x: torch.Tensor) -> bool:
    """Whether rows of `x` can be read in vectors of 16 elements."""
    return x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0


@triton.jit
def block_columns(first, B: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of the blocks of a chunk, int32 [CHUNK / B, B]."""
    return first + tl.arange(0, CHUNK // B)[:, None] * B + tl.arange(0, B)[None, :]


@triton.jit
def load_blocks(p_row, first, columns, B: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk of a row as float32 [CHUNK / B, B], zero beyond the row's end."""
    o_column = block_columns(first, B, CHUNK)
    return tl.load(p_row + o_column, mask=o_column < columns, other=0.0).to(tl.float32)


@triton.jit
def permuted_columns(o_column, padded):
    """Where columns go if the first sixteen of every 32 fill one half of the row, the others the
    other half; `padded` is a multiple of 32."""
    second = (o_column // 16) % 2
    return o_column // 32 * 16 + o_column % 16 + second * (padded // 32 * 16)
