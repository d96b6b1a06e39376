"""Exact arithmetic on floats' bits, and how matrices are cut into blocks and chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .device_tables import kept_tables
from .formatbook import LOWEST_EXPONENT, NAN_ROW, Formatbook

__all__ = [
    "block_exponents",
    "blocks_of",
    "divisor",
    "double_power_of_two",
    "flat_table",
    "padded_columns",
    "power_of_two",
    "row_chunks",
    "row_exponents",
    "row_scale",
    "take",
]

_CHUNK_ELEMENTS = 1 << 19
"""Elements rounded at a time: keeps the float64 work arrays in cache and the peak memory flat."""


def padded_columns(columns: int, block_size: int) -> int:
    """K rounded up to whole blocks."""
    return -(-columns // block_size) * block_size


def blocks_of(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """float32 [N, Kp/B, B], zero-padded."""
    rows, columns = x.shape
    padded = padded_columns(columns, block_size)
    values = F.pad(x.to(torch.float32), (0, padded - columns)).contiguous()
    return values.view(rows, padded // block_size, block_size)


def row_chunks(rows: int, columns: int, elements: int = _CHUNK_ELEMENTS) -> Iterator[slice]:
    """Slices of rows of about `elements` elements each."""
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def block_exponents(largest: torch.Tensor) -> torch.Tensor:
    """``e = floor(log2(max)) - 2`` from the float's bits, at least -120; int32, shape kept."""
    biased: torch.Tensor = largest.contiguous().view(torch.int32) >> 23
    return (biased - (127 + 2)).clamp(min=LOWEST_EXPONENT)


def row_exponents(exponent: torch.Tensor) -> torch.Tensor:
    """R, the largest e of each row, int32 [N]; -120 for rows without columns."""
    if exponent.shape[1] == 0:
        return exponent.new_full((exponent.shape[0],), LOWEST_EXPONENT)
    return exponent.amax(dim=1)


def row_scale(row_exponent: torch.Tensor) -> torch.Tensor:
    """``2**(R - 5)``, float32 [N]; NaN where R marks a NaN row."""
    exponent = row_exponent.to(torch.int32)
    scale = power_of_two(exponent.clamp(min=LOWEST_EXPONENT) - 5)
    return torch.where(exponent == NAN_ROW, torch.nan, scale)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """``2**exponent`` as float32, exact, for int32 exponents in -126..127 (not checked)."""
    bits: torch.Tensor = (exponent + 127) << 23
    return bits.view(torch.float32)


def double_power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """``2**exponent`` as float64, exact (torch.exp2 need not be), for int64 in -1022..1023."""
    bits: torch.Tensor = (exponent + 1023) << 52
    return bits.view(torch.float64)


def divisor(value: float, x: torch.Tensor) -> torch.Tensor:
    """`value` as a tensor: on CUDA, a division by a Python number multiplies by its reciprocal."""
    return torch.full((), value, device=x.device)


@kept_tables
def flat_table(
    book: Formatbook, name: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """One of the book's tables, flattened, as a tensor."""
    return torch.tensor(getattr(book, name), dtype=dtype, device=device).flatten()


def take(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``table[index]`` for a 1-D table; index_select is several times faster than indexing."""
    return table.index_select(0, index.flatten()).view(index.shape)
