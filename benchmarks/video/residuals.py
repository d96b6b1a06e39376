"""Residuals of single blocks instead of whole tokens, emulated (ours).

A salient token's residual is rounded and multiplied in all its blocks. Here as many blocks have
one, but each is chosen alone: those of a sample whose rounding error changes the layer's output
most. Kernels multiply whole rows, so this only shows what another choice could gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dialect_kernels import PackedTensor
from dialect_kernels.reference import round_activation
from diffusers_hook.tokens import ops

__all__ = ["of_single_blocks", "rounded_with_residuals"]


def rounded_with_residuals(
    x: torch.Tensor, weights: Sequence[torch.Tensor], packed: PackedTensor, share: float
) -> torch.Tensor:
    """Tokens rounded, and once more in the blocks that matter most.

    Args:
        x: float32 [B, T, K].
        weights: those that multiply it, decoded, float32 [N, K] each.
        packed: one of them, for its book and block size.
        share: of a sample's blocks, rounded to nearest.

    Returns:
        float32 [B, T, K].
    """
    size = packed.block_size
    once = round_activation(x, packed.book, size)
    twice = round_activation(x - once, packed.book, size)
    gain = torch.stack([weight.square().sum(0) for weight in weights]).sum(0)
    blocks = ((x - once).square() * gain).unflatten(-1, (-1, size)).sum(-1)  # [B, T, K/B]
    flat = blocks.flatten(1)
    chosen = flat.topk(round(share * flat.shape[1]), dim=1).indices
    kept = torch.zeros_like(flat).scatter_(1, chosen, 1.0).view_as(blocks)
    return once + twice * kept.repeat_interleave(size, dim=-1)


@contextmanager
def of_single_blocks(share: float) -> Iterator[None]:
    """Multiply this way in the `with` block wherever the hook would decompose salient tokens."""
    own, decoded = (ops.linears_of_one_input, ops.semantic_op), {}

    def weight_of(packed: PackedTensor) -> torch.Tensor:
        place = packed.codes.data_ptr()
        if place not in decoded:
            decoded[place] = packed.dequantize().float()
        return decoded[place]

    def linears(
        x: torch.Tensor, weights: Any, form: str, salient: Any = None, group: Any = None
    ) -> list[torch.Tensor]:
        if salient is None:
            found: list[torch.Tensor] = own[0](x, weights, form, salient, group)
            return found
        matrices = [weight_of(packed) for packed, _ in weights]
        rows = rounded_with_residuals(x.float(), matrices, weights[0][0], share)
        outputs = []
        for matrix, (_, bias) in zip(matrices, weights, strict=True):
            y = rows @ matrix.T if bias is None else rows @ matrix.T + bias.float()
            outputs.append(y.to(x.dtype))
        return outputs

    def linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        codes, meta, exponent, bias, columns, book, size, salient, group, rotation = arguments
        packed = PackedTensor.from_op(codes, meta, exponent, columns, book, size, rotation)
        return linears(x, [(packed, bias)], "dialect", salient, group)[0]

    ops.linears_of_one_input, ops.semantic_op = linears, linear
    try:
        yield
    finally:
        ops.linears_of_one_input, ops.semantic_op = own
