"""The loop of rule ``gptq``, for any format whose blocks choose their own grid.

After GPTQ (Frantar et al., arXiv 2210.17323), for blocks whose grid is chosen on the way (ours).
With the layer's inputs X [T, K] and ``A = X.T @ X / T``, the columns are rounded one by one, and
what a column loses is made good by the columns to its right::

    A + damping * mean(diag A) * I  =  inverse(U.T @ U),  U upper triangular
    err_c  =  (w_c - round(w_c)) / U[c, c]
    w_j   -=  err_c * U[c, j]          for every j > c

A block's grid is chosen when its first column is due, from the weights as they have become.

Weights of one shape, each with its own factor, go through the loop together: a column takes as many
steps for all of them as for one. The bytes are those of one after the other, because the products
that add up several numbers, whose order a batch might change, are taken one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from .arguments import check_finite
from .second_moments import UpperFactor

__all__ = ["BlockRounder", "check_moments", "feed_back_columns", "round_in_order"]

_LAZY_COLUMNS = 256
"""Columns after which the errors go to the rest of the matrix, in one product."""


class BlockRounder(Protocol):
    """A format, for the N rows of each of E weights; blocks come in ascending order."""

    def round(self, block: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor) -> None:
        """Choose the grids of a block [E, B, N], round its columns, and keep what comes out.

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
    w: torch.Tensor, factors: Sequence[UpperFactor], block_size: int, rounder: BlockRounder
) -> list[bool]:
    """Round the columns of float32 weights [E, N, K] one by one.

    Args:
        w: the weights, which are not written to.
        factors: of the second moments of each weight's inputs.
        block_size: divides K.
        rounder: rounds and keeps.

    Returns:
        For each weight whether all was finite; if not, the errors overflowed on their way to the
        right.
    """
    count, rows, columns = w.shape
    left = w.transpose(1, 2).contiguous()  # [E, K, N]: what is left to round, a column in one piece
    errors = torch.empty(count, _LAZY_COLUMNS, rows, device=w.device)
    for first in range(0, columns, _LAZY_COLUMNS):
        last = min(first + _LAZY_COLUMNS, columns)
        # from the column `first` on
        upper = torch.stack([factor.rows(first, last) for factor in factors])
        for start in range(first, last, block_size):
            stop = start + block_size
            block, lost = left[:, start:stop], errors[:, start - first : stop - first]
            own = upper[:, start - first : stop - first, start - first : last - first]
            rounder.round(block, own[..., :block_size], lost)
            _subtract(left[:, stop:last], own[..., block_size:], lost)
        _subtract(left[:, last:], upper[..., last - first :], errors[:, : last - first])
    return left.flatten(1).isfinite().all(dim=1).tolist()


def _subtract(rest: torch.Tensor, upper: torch.Tensor, lost: torch.Tensor) -> None:
    """Subtract ``upper.T @ lost`` from `rest`, for each weight by itself."""
    for own, factor, errors in zip(rest, upper, lost, strict=True):
        own.addmm_(factor.T, errors, alpha=-1)


def feed_back_columns(
    block: torch.Tensor,
    factor: torch.Tensor,
    errors: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Round the columns of a block one by one; what one loses goes to those behind it.

    Products and differences are rounded one by one, so that all implementations give the same bits.

    Args:
        block: float32 [..., B, N]; every column keeps the value that was rounded.
        factor: float32 [..., B, B].
        errors: float32 [..., B, N], which receives ``err`` of each column.
        rounded: numbers [..., N] on the grids of their rows, in new memory.
    """
    for column in range(block.shape[-2]):
        x, upper = block[..., column, :], factor[..., column, :]
        error = torch.sub(x, rounded(x), out=errors[..., column, :])
        error.div_(upper[..., column, None])
        share = upper[..., column + 1 :, None] * error[..., None, :]
        block[..., column + 1 :, :].sub_(share)
