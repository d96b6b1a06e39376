"""Rounding a weight so that the layer's output changes little on calibration text: rule ``gptq``.

After GPTQ (Frantar et al., arXiv 2210.17323), for blocks whose dialect and exponent are chosen
on the way (ours). With the layer's inputs X [T, K] and ``A = X.T @ X / T``, the columns are rounded
one by one, and what a column loses is made good by the columns to its right::

    A + damping * mean(diag A) * I  =  inverse(U.T @ U),  U upper triangular
    err_c  =  (w_c - round(w_c)) / U[c, c]
    w_j   -=  err_c * U[c, j]          for every j > c

A block's grid is chosen by rule ``mse`` when its first column is due, from the weights as they have
become. The rule chooses bytes; the format, its readers and its kernels do not know of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from .arguments import check_finite, check_quantize
from .arithmetic import block_exponents, blocks_of, flat_table, power_of_two, row_exponents, take
from .formatbook import CELLS, DIALECT_FP4, Formatbook, Rotation
from .ops import quantize, quantize_counted
from .packed import PackedTensor, pack_codes
from .rotation import rotate_weight

__all__ = ["CalibratedWeight", "quantize_calibrated"]

_LAZY_COLUMNS = 256
"""Columns after which the errors go to the rest of the matrix, in one product."""
_INVERTED_COLUMNS = 512
"""Columns of a triangular matrix that are inverted at a time: in float64 they are large."""


class CalibratedWeight(NamedTuple):
    """A calibrated weight, and how firm its second moments were."""

    packed: PackedTensor
    damping: float | None
    """The damping that was used; None if no damping helped and rule ``mse`` was used instead."""


def quantize_calibrated(
    w: torch.Tensor,
    A: torch.Tensor,
    book: Formatbook = DIALECT_FP4,
    block_size: int = 32,
    window: int | None = None,
    damping: float = 0.01,
    rotation: Rotation = "none",
    name: str = "tensor",
) -> CalibratedWeight:
    """Quantize a weight by rule ``gptq``.

    Args:
        w: float32, bfloat16 or float16 [N, K], K a multiple of `block_size`.
        A: float32 [K, K] on w's device: mean of ``x x.T`` over the tokens that the layer sees; of
            the rotated tokens (:func:`~.rotation.rotate_activation`) where the layer is rotated.
            Columns with 0 on its diagonal are rounded to nearest.
        book: the formatbook.
        block_size: 16, 32 or 64.
        window: as for :func:`dialect_kernels.quantize`.
        damping: share of the mean diagonal that is added to the diagonal, above 0, at most 1. Where
            `A` is not positive definite with it, ten times as much is tried, up to 1.
        rotation: of the weight, as for :func:`dialect_kernels.quantize`.
        name: what error messages call the weight.

    Returns:
        The packed weight, and the damping that was used.

    Raises:
        ValueError: if shape, dtype, block size, window, damping or rotation are not allowed, or `w`
            or `A` hold NaN or Inf.
    """
    window = check_quantize(w, book, block_size, "mse", window, name, rotation)
    _check_moments(w, A, block_size, damping, name)
    exact = rotate_weight(w, rotation).to(torch.float32)
    for share in _growing(damping):
        factor = _upper_factor(A, share)
        packed = None if factor is None else _round(exact, factor, book, block_size, window)
        if packed is not None:
            return CalibratedWeight(replace(packed, rotation=rotation), share)
    return CalibratedWeight(quantize(w, book, block_size, "mse", window, name, rotation), None)


def _check_moments(
    w: torch.Tensor, A: torch.Tensor, block_size: int, damping: float, name: str
) -> None:
    columns = w.shape[1]
    if columns % block_size:
        raise ValueError(
            f"{name}: has {columns} columns; they must be a multiple of the block size "
            f"{block_size}: choose another block size"
        )
    if A.dtype != torch.float32 or A.shape != (columns, columns) or A.device != w.device:
        raise ValueError(
            f"A: {A.dtype} {list(A.shape)} on {A.device}; it must be torch.float32 "
            f"[{columns}, {columns}] on {w.device}, where the weight is"
        )
    if not 0 < damping <= 1:
        raise ValueError(f"damping: {damping}; it must be above 0 and at most 1")
    check_finite(A, f"A of {name}")


def _growing(damping: float) -> Iterator[float]:
    """The dampings to try."""
    while damping <= 1 or math.isclose(damping, 1):
        yield damping
        damping *= 10


def _upper_factor(A: torch.Tensor, damping: float) -> torch.Tensor | None:
    """U of ``inverse(A) = U.T @ U`` after damping, float32 [K, K]; None if there is none.

    With both axes reversed A has a lower factor L, ``A = V @ V.T`` for the upper V that reversing L
    gives, and U is the inverse of V: one factorization, where inverting A first would take two.
    """
    damped = A.flip(0, 1).to(torch.float64)
    dead = damped.diagonal() == 0
    damped[dead] = 0
    damped[:, dead] = 0
    diagonal = damped.diagonal()
    mean = diagonal.sum() / max(1, int((~dead).sum()))
    diagonal.copy_(torch.where(dead, mean, diagonal))
    diagonal += damping * mean if mean else 1.0  # without any input every rounding is as good
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if int(failed):
        return None
    size, upper = len(A), torch.zeros_like(A)
    for first in range(0, size, _INVERTED_COLUMNS):
        stop = min(first + _INVERTED_COLUMNS, size)
        one = torch.eye(size - first, stop - first, dtype=torch.float64, device=A.device)
        inverse = torch.linalg.solve_triangular(lower[first:, first:], one, upper=False)
        upper[first:, first:stop] = inverse
    upper = upper.flip(0, 1)
    return upper if bool(upper.isfinite().all()) and bool((upper.diagonal() > 0).all()) else None


class _Grid(NamedTuple):
    """How one block of every row is rounded; N rows."""

    dialect: torch.Tensor  # int32 [N]
    delta: torch.Tensor  # int32 [N]
    effective: torch.Tensor  # int32 [N], E
    zero: torch.Tensor  # bool [N], blocks that stay zero


def _round(
    w: torch.Tensor, factor: torch.Tensor, book: Formatbook, block_size: int, window: int
) -> PackedTensor | None:
    """Round a float32 weight [N, K]; None if the errors overflowed on their way to the right."""
    rows, columns = w.shape
    row_exponent = row_exponents(block_exponents(blocks_of(w, block_size).abs().amax(dim=-1)))
    left = w.T.contiguous()  # [K, N]: what is left to round, a column in one piece
    errors = torch.empty(_LAZY_COLUMNS, rows, device=w.device)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=w.device)
    meta = torch.empty(columns // block_size, rows, dtype=torch.uint8, device=w.device)
    for first in range(0, columns, _LAZY_COLUMNS):
        last = min(first + _LAZY_COLUMNS, columns)
        for start in range(first, last, block_size):
            stop = start + block_size
            block, lost = left[start:stop], errors[start - first : stop - first]
            grid = _choose_grid(block, row_exponent, book, window)
            _round_block(block, factor[start:stop, start:stop], grid, book, lost)
            codes[start:stop] = _codes(block, grid, book)
            meta[start // block_size] = torch.where(
                grid.zero, 0, (grid.delta << book.id_bits) | grid.dialect
            )
            left[stop:last].addmm_(factor[start:stop, stop:last].T, lost, alpha=-1)
        done = errors[: last - first]
        left[last:].addmm_(factor[first:last, last:].T, done, alpha=-1)
    if not bool(left.isfinite().all()):
        return None
    return PackedTensor(
        pack_codes(codes.T),
        meta.T.contiguous(),
        row_exponent.to(torch.int8),
        (rows, columns),
        book,
        block_size,
    )


def _choose_grid(
    block: torch.Tensor, row_exponent: torch.Tensor, book: Formatbook, window: int
) -> _Grid:
    """Exponent and dialect of a block [B, N] by rule ``mse``, below given row exponents [N].

    The quantizer takes the row's exponent from a second block, which holds ``2**(R + 2)``.
    """
    block_size, rows = block.shape
    pair = torch.zeros(rows, 2 * block_size, device=block.device)
    pair[:, :block_size] = block.T
    pair[:, block_size] = power_of_two(row_exponent + 2)
    packed = quantize_counted(pair, book, block_size, "mse", window, finite=True).packed
    zero = (packed.codes[:, : block_size // 2] == 0).all(dim=1)
    dialect = packed.ids()[:, 0].to(torch.int32)
    delta = packed.deltas()[:, 0].to(torch.int32)
    above = packed.row_exponent.to(torch.int32) > row_exponent
    if bool(above.any()):
        delta = delta.masked_fill(above, 0)
        dialect[above] = _saturated_dialects(block[:, above], row_exponent[above], book)
    return _Grid(dialect, delta, row_exponent - delta, zero)


def _saturated_dialects(
    block: torch.Tensor, exponent: torch.Tensor, book: Formatbook
) -> torch.Tensor:
    """Rule ``mse`` for blocks [B, n] that are larger than their exponents [n] allow, int32 [n]."""
    quarters = (block.abs() * power_of_two(2 - exponent)).T  # [n, B]
    cell = quarters.clamp(max=CELLS - 1).to(torch.int64)
    rounded = flat_table(book, "rounded_half_units", torch.float64, block.device).view(-1, CELLS)
    half_units = rounded[:, cell]  # [dialects, n, B]
    cost = (half_units * (half_units - quarters.to(torch.float64))).sum(dim=-1)
    return cost.argmin(dim=0).to(torch.int32)


def _round_block(
    block: torch.Tensor,
    factor: torch.Tensor,
    grid: _Grid,
    book: Formatbook,
    errors: torch.Tensor,
) -> None:
    """Round the columns of a block [B, N] one by one; write ``err`` of each to `errors` [B, N].

    Every column of `block` keeps the value that was rounded.
    """
    half_units = flat_table(book, "rounded_half_units", torch.float32, block.device)
    table = grid.dialect * CELLS
    quarter, unit = power_of_two(2 - grid.effective), power_of_two(grid.effective - 1)
    unit = unit.masked_fill(grid.zero, 0)
    for column, pivot in enumerate(factor.diagonal().tolist()):
        x = block[column]
        cell = (x.abs() * quarter).clamp_(max=CELLS - 1).to(torch.int32)
        rounded = take(half_units, cell.add_(table)).mul_(unit).copysign_(x)
        error = torch.sub(x, rounded, out=errors[column]).div_(pivot)
        block[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)


def _codes(block: torch.Tensor, grid: _Grid, book: Formatbook) -> torch.Tensor:
    """The codes of a rounded block, uint8 [B, N]."""
    index_lut = flat_table(book, "index_lut", torch.uint8, block.device)
    quarter = power_of_two(2 - grid.effective)
    cell = (block.abs() * quarter).clamp_(max=CELLS - 1).to(torch.int32)
    index = take(index_lut, cell.add_(grid.dialect * CELLS)).masked_fill_(grid.zero, 0)
    sign = ((block < 0) & (index > 0)).to(torch.uint8) << 3
    return index | sign
