"""The protocol of the three back ends: the CPU kernel, the Triton kernels, and plain torch.

:mod:`dialect_kernels.ops` checks arguments, chooses a back end and calls it; nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch

from .formatbook import Formatbook, Rotation
from .packed import PackedTensor
from .packed_experts import PackedExperts

__all__ = [
    "Backend",
    "BlockGrid",
    "Decoded",
    "Quantized",
    "Weights",
    "expert_by_expert",
    "with_residuals",
]

Weights = Sequence[tuple[PackedTensor, torch.Tensor | None]]
"""Packed weights [N, K], each with its bias [N] or None."""


class Quantized(NamedTuple):
    """A quantized matrix [N, K], and what was counted on the way."""

    packed: PackedTensor
    blocks_below_window: torch.Tensor
    """int64 [N], as :func:`dialect_kernels.reference.blocks_below_window`."""


class Decoded(NamedTuple):
    """A weight's exact values, kept beside its packed bytes for products of many tokens.

    Whoever keeps them makes them again after writing the packed bytes.
    """

    weight: torch.Tensor
    """float8_e4m3fn or bfloat16 [N or more, Kp], in an order of the back end that made it."""
    scale: torch.Tensor | None
    """float32 [N or more], of the rows of E4M3; None with bfloat16."""

    def rows(self, start: int, stop: int) -> Decoded:
        """Rows start..stop-1."""
        scale = None if self.scale is None else self.scale[start:stop]
        return Decoded(self.weight[start:stop], scale)


class BlockGrid(NamedTuple):
    """How one block of every row of a weight is rounded; N rows."""

    dialect: torch.Tensor
    """int32 [N]"""
    quarter: torch.Tensor
    """float32 [N], what a number times it is in quarter units"""
    unit: torch.Tensor
    """float32 [N], what a half-unit stands for; 0 where the block stays zero"""


class Backend(Protocol):
    """What computes on a device. Arguments have been checked before they come here."""

    def runs_on(self, device: torch.device) -> bool:
        """Whether tensors on `device` can be quantized and decoded."""

    def covers(
        self, x: torch.Tensor, p: PackedTensor, activation_format: str, accumulation: str
    ) -> bool:
        """Whether this back end computes the product of tokens `x` [..., K] and `p` [N, K]."""

    def quantize(
        self,
        x: torch.Tensor,
        book: Formatbook,
        block_size: int,
        rule: str,
        window: int,
        rotation: Rotation,
    ) -> PackedTensor:
        """The bytes of ``reference.quantize`` for a finite `x` [N, K]."""

    def quantize_counted(
        self,
        x: torch.Tensor,
        book: Formatbook,
        block_size: int,
        rule: str,
        window: int,
        rotation: Rotation,
    ) -> Quantized:
        """The same, with the blocks below the window."""

    def dequantize(self, p: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The bits of ``p.dequantize(dtype)``, [N, K]."""

    def embedding(self, ids: torch.Tensor, p: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The bits of ``p.dequantize(dtype)[ids]``, [T, K].

        Args:
            ids: int64 [T], rows of `p`. On a CPU another number raises IndexError; a GPU, which
                nobody waits for, gives a row of NaN.
            p: packed tensor [V, K] that is not rotated.
            dtype: float32, bfloat16 or float16.
        """

    def rounding_loss(self, x: torch.Tensor, p: PackedTensor) -> torch.Tensor:
        """``reference.rounding_loss(x, p)``, but for the order of its float64 sums."""

    def feed_back(
        self,
        block: torch.Tensor,
        factor: torch.Tensor,
        grid: BlockGrid,
        book: Formatbook,
        errors: torch.Tensor,
    ) -> torch.Tensor:
        """The bits of ``reference.feed_back``: a block of columns of E weights by rule ``gptq``.

        Args:
            block: float32 [E, B, N], E and B in any strides.
            factor: float32 [E, B, B].
            grid: of the rows of all weights, one weight's after another's.
            errors: float32 [E, B, N], E and B in any strides; written to.

        Returns:
            The codes, uint8 [E, B, N].
        """

    def dialect_linear(
        self,
        tokens: torch.Tensor,
        p: PackedTensor,
        bias: torch.Tensor | None,
        activation_format: str,
        accumulation: str,
        decoded: Decoded | None = None,
    ) -> torch.Tensor:
        """``tokens @ p.T + bias`` of a covered product, [T, K] -> [T, N] in the tokens' dtype.

        Args:
            tokens, p, bias, activation_format, accumulation: as for :func:`.ops.dialect_linear`.
            decoded: what :func:`.ops.decode_ahead` made of `p`, or None.
        """

    def grouped_linear(
        self,
        tokens: torch.Tensor,
        rows: torch.Tensor | None,
        offsets: torch.Tensor,
        experts: PackedExperts,
        bias: torch.Tensor | None,
        activation_format: str,
        accumulation: str,
    ) -> torch.Tensor:
        """The products of a mixture of experts, [T, K] -> [R, N] in the tokens' dtype.

        Args:
            tokens: float32, bfloat16 or float16 [T, K].
            rows: int64 [R], the token of each row of the result; None: row i is of token i.
            offsets: int64 [E + 1], ascending in 0..R: rows offsets[e]..offsets[e+1]-1 are products
                with expert e. All other rows are 0.
            experts: E packed weights [N, K], each of which :meth:`covers` covers.
            bias: [E, N] or None.
            activation_format, accumulation: as for :meth:`dialect_linear`.
        """

    def semantic_linear(
        self,
        tokens: torch.Tensor,
        p: PackedTensor,
        bias: torch.Tensor | None,
        salient: torch.Tensor | None,
        group: torch.Tensor | None,
    ) -> torch.Tensor:
        """:meth:`dialect_linear` with residuals of some tokens, and variants that tokens share.

        Args:
            tokens: float32, bfloat16 or float16 [T, K], samples one after another.
            p: packed weight [N, K].
            bias: [N] or None.
            salient: int64 [S] or None: rows of `tokens`, each once; -1 is an unused place.
            group: int32 [T] or None, numbers in 0..T-1 that no two samples share; -1 is free.
        """

    def linears(
        self,
        tokens: torch.Tensor,
        weights: Weights,
        activation_format: str,
        salient: torch.Tensor | None,
        group: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Products of the same tokens with several weights; tokens are rounded once where it pays.

        Args:
            tokens: float32, bfloat16 or float16 [T, K].
            weights: at least one, with their biases; they have one K, book, block size, rotation
                and device, and all of them have a bias or none has.
            activation_format: as for :meth:`dialect_linear`; ``"dialect"`` with `salient` or
                `group`.
            salient, group: as for :meth:`semantic_linear`.

        Returns:
            For each weight [N, K] what :meth:`semantic_linear` gives, or without `salient` and
            `group` :meth:`dialect_linear` in the mode ``"default"``: contiguous [T, N], the same
            bits.
        """

    def warm_up(
        self,
        p: PackedTensor,
        activation_format: str,
        dtype: torch.dtype,
        bias_dtype: torch.dtype | None,
        decoded: Decoded | None = None,
    ) -> None:
        """Compile what products with `p` can need, if this back end compiles anything."""

    def warm_up_experts(
        self,
        experts: PackedExperts,
        activation_format: str,
        dtype: torch.dtype,
        bias_dtype: torch.dtype | None,
    ) -> None:
        """The same for :meth:`grouped_linear`."""


def with_residuals(
    y: torch.Tensor, salient: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Add up the parts of a decomposed product, in float32, and round once.

    Args:
        y: float32 [T + S, N], products of T tokens and then of S residuals; written to.
        salient: int64 [S], the tokens that the residuals belong to, each once.
        bias: [N] or None.
        dtype: of the result, [T, N].
    """
    count = y.shape[0] - salient.shape[0]
    y, left_over = y[:count], y[count:]
    y[salient] += left_over
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(dtype)


def expert_by_expert(
    multiply: Callable[[torch.Tensor, PackedTensor, torch.Tensor | None], torch.Tensor],
    tokens: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    experts: PackedExperts,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """:meth:`Backend.grouped_linear` as one product for each expert that has rows.

    It waits for a GPU: which experts have rows is read from `offsets`.

    Args:
        multiply: (tokens [n, K], weight [N, K], bias [N] or None) -> [n, N].
        tokens, rows, offsets, experts, bias: as there.
    """
    count = len(tokens if rows is None else rows)
    y = tokens.new_zeros(count, experts.shape[1])
    for expert, (first, end) in enumerate(pairwise(offsets.tolist())):
        if first == end:
            continue
        chosen = tokens[first:end] if rows is None else tokens[rows[first:end]]
        y[first:end] = multiply(chosen, experts[expert], None if bias is None else bias[expert])
    return y
