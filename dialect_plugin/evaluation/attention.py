"""Attention whose two matrix products have rounded operands, in the directions of BlockDialect.

Q and K are rounded in blocks along the head, P along the keys, and V along the sequence: every
channel of a block of tokens has an exponent of its own. The newest tokens, beyond the last full
block, keep their 16-bit V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch

from ..checkpoint.reader import CheckpointError

__all__ = ["AttentionRounding", "Rounding", "rounded_attention"]

Rounding: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""[T, K] in any dtype -> the rounded values, float32 [T, K]; blocks lie along K."""

_NAME = "blockdialect_rounded_attention"
"""What transformers calls this attention; it is used only inside the context below."""


class AttentionRounding(NamedTuple):
    """How a format rounds the operands of attention's products.

    Attributes:
        query_key: rounds Q and K.
        probabilities_value: rounds P and V.
        block_size: tokens in a block of V.
    """

    query_key: Rounding
    probabilities_value: Rounding
    block_size: int


@contextmanager
def rounded_attention(model: Any, rounding: AttentionRounding, architecture: str) -> Iterator[None]:
    """Let a transformers model attend with rounded operands inside the ``with`` block.

    Args:
        model: in one of transformers' attention implementations.
        rounding: of the operands.
        architecture: what error messages call the model.

    Raises:
        CheckpointError: if the model's attention cannot be exchanged, or has sinks.
    """
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    reason = f"{architecture}: its attention cannot be rounded"
    called = False

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        nonlocal called
        called = True
        if s_aux is not None:
            raise CheckpointError(f"{reason}, because it has sinks; use --scope linear")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend(rounding, query, key, value, attention_mask, scale, softcap), None

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        if model.config._attn_implementation != _NAME:
            raise CheckpointError(f"{reason} in this version of transformers; use --scope linear")
        yield
        if not called:
            raise CheckpointError(f"{reason} in this version of transformers; use --scope linear")
    finally:
        model.set_attn_implementation(before)


def _attend(
    rounding: AttentionRounding,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """[B, H, T, D], keys and values [B, H of them, S, D] -> [B, T, H, D] in the query's dtype."""
    groups = query.shape[1] // key.shape[1]
    q, k = (_along_rows(rounding.query_key, x) for x in (query, key))
    v = _along_sequence(rounding, value)
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        scores = scores + mask[..., : scores.shape[-1]]
    p = _along_rows(rounding.probabilities_value, scores.softmax(dim=-1))
    return (p @ v).to(query.dtype).transpose(1, 2).contiguous()


def _along_rows(round_: Rounding, x: torch.Tensor) -> torch.Tensor:
    """Round in blocks along the last axis, float32."""
    return round_(x.reshape(-1, x.shape[-1])).view(x.shape)


def _along_sequence(rounding: AttentionRounding, value: torch.Tensor) -> torch.Tensor:
    """Round values [B, H, S, D] in full blocks of tokens, float32; a block is a row of its own."""
    size = rounding.block_size
    full = value.shape[2] // size * size
    channels = value[:, :, :full].transpose(2, 3)  # [B, H, D, S]
    rounded = rounding.probabilities_value(channels.reshape(-1, size)).view(channels.shape)
    rounded = rounded.transpose(2, 3)
    return torch.cat([rounded, value[:, :, full:].float()], dim=2)
