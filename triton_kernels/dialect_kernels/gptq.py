"""The loop of rule ``gptq``, for any format whose blocks choose their own grid.

After GPTQ (Frantar et al., arXiv 2210.17323), for blocks whose grid is chosen on the way (ours).
With the layer's inputs X [T, K] and ``A = X.T @ X / T``, the columns are rounded one by one, and
what a column loses is made good by the columns to its right::

    A + damping * mean(diag A) * I  =  inverse(U.T @ U),  U upper triangular
    err_c  =  (w_c - round(w_c)) / U[c, c]
    w_j   -=  err_c * U[c, j]          for every j > c

A block's grid is chosen when its first column is due, from the weights as they have become.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch

from .arguments import check_finite

__all__ = ["BlockRounder", "check_moments", "growing_dampings", "round_in_order", "upper_factor"]

_LAZY_COLUMNS = 256
"""Columns after which the errors go to the rest of the matrix, in one product."""
_INVERTED_COLUMNS = 512
"""Columns of a triangular matrix that are inverted at a time: in float64 they are large."""


class BlockRounder(Protocol):
    """A format, for the N rows of one weight; blocks come in ascending order."""

    def begin(self, block: torch.Tensor) -> None:
        """Choose the grid of every row for a block [B, N] that is about to be rounded."""

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers [..., N] of the block that was begun, on its grids; in new memory."""

    def end(self, block: torch.Tensor) -> None:
        """Keep a block [B, N] whose columns hold what was rounded."""


def check_moments(
    w: torch.Tensor, A: torch.Tensor, block_size: int, damping: float, name: str
) -> None:
    """Raise ValueError unless these arguments of a calibrated rounding fit together."""
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


def growing_dampings(damping: float) -> Iterator[float]:
    """The dampings to try: ten times as much each time, up to 1."""
    while damping <= 1 or math.isclose(damping, 1):
        yield damping
        damping *= 10


def upper_factor(A: torch.Tensor, damping: float) -> torch.Tensor | None:
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


def round_in_order(
    w: torch.Tensor, factor: torch.Tensor, block_size: int, rounder: BlockRounder
) -> bool:
    """Round the columns of a float32 weight [N, K] one by one.

    Args:
        w: the weight, which is not written to.
        factor: from :func:`upper_factor`.
        block_size: divides K.
        rounder: rounds and keeps.

    Returns:
        Whether all was finite; if not, the errors overflowed on their way to the right.
    """
    rows, columns = w.shape
    left = w.T.contiguous()  # [K, N]: what is left to round, a column in one piece
    errors = torch.empty(_LAZY_COLUMNS, rows, device=w.device)
    for first in range(0, columns, _LAZY_COLUMNS):
        last = min(first + _LAZY_COLUMNS, columns)
        for start in range(first, last, block_size):
            stop = start + block_size
            block, lost = left[start:stop], errors[start - first : stop - first]
            rounder.begin(block)
            _round_block(block, factor[start:stop, start:stop], rounder, lost)
            rounder.end(block)
            left[stop:last].addmm_(factor[start:stop, stop:last].T, lost, alpha=-1)
        done = errors[: last - first]
        left[last:].addmm_(factor[first:last, last:].T, done, alpha=-1)
    return bool(left.isfinite().all())


def _round_block(
    block: torch.Tensor, factor: torch.Tensor, rounder: BlockRounder, errors: torch.Tensor
) -> None:
    """Round the columns of a block [B, N] one by one; write ``err`` of each to `errors` [B, N].

    Every column of `block` keeps the value that was rounded.
    """
    for column, pivot in enumerate(factor.diagonal().tolist()):
        x = block[column]
        error = torch.sub(x, rounder.rounded(x), out=errors[column]).div_(pivot)
        block[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
