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

from collections.abc import Callable
from typing import Protocol

import torch

from .arguments import check_finite
from .second_moments import UpperFactor

__all__ = ["BlockRounder", "check_moments", "feed_back_columns", "round_in_order"]

_LAZY_COLUMNS = 256
"""Columns after which the errors go to the rest of the matrix, in one product."""


class BlockRounder(Protocol):
    """A format, for the N rows of one weight; blocks come in ascending order."""

    def round(self, block: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor) -> None:
        """Choose the grids of a block [B, N], round its columns, and keep what comes out.

        The columns are rounded as :func:`feed_back_columns` does.
        """


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


def round_in_order(
    w: torch.Tensor, factor: UpperFactor, block_size: int, rounder: BlockRounder
) -> bool:
    """Round the columns of a float32 weight [N, K] one by one.

    Args:
        w: the weight, which is not written to.
        factor: of the second moments of the layer's inputs.
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
        upper = factor.rows(first, last)  # from the column `first` on
        for start in range(first, last, block_size):
            stop = start + block_size
            block, lost = left[start:stop], errors[start - first : stop - first]
            own = upper[start - first : stop - first, start - first : last - first]
            rounder.round(block, own[:, :block_size], lost)
            left[stop:last].addmm_(own[:, block_size:].T, lost, alpha=-1)
        left[last:].addmm_(upper[:, last - first :].T, errors[: last - first], alpha=-1)
    return bool(left.isfinite().all())


def feed_back_columns(
    block: torch.Tensor,
    factor: torch.Tensor,
    errors: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Round the columns of a block one by one; what one loses goes to those behind it.

    Products and differences are rounded one by one, so that all implementations give the same bits.

    Args:
        block: float32 [B, N]; every column keeps the value that was rounded.
        factor: float32 [B, B].
        errors: float32 [B, N], which receives ``err`` of each column.
        rounded: numbers [N] on the grids of their rows, in new memory.
    """
    for column in range(len(block)):
        x, upper = block[column], factor[column]
        error = torch.sub(x, rounded(x), out=errors[column]).div_(upper[column])
        block[column + 1 :].sub_(torch.outer(upper[column + 1 :], error))
