"""Means of a model's keys and values on text, for a 4-bit KV cache (ours).

transformers' attention takes keys after their norms and the rotary embedding, and values, before
heads are repeated: what an engine stores. A function in its place adds them up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dialect_kernels.kv_cache import CACHE_BLOCK

from ..cache_means import KEY_MEAN, VALUE_MEAN

__all__ = ["CacheMeans"]

_NAME = "blockdialect_cache_means"
"""What transformers calls this attention."""


class _Sums:
    """Sums of an attention module's keys and values."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []
        self._tokens = 0

    def add(self, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Add keys and values [B, heads, T, D]."""
        found = [x.detach().double().sum(dim=(0, 2)) for x in rows]
        if self._sums:
            found = [a + b for a, b in zip(self._sums, found, strict=True)]
        self._sums = found
        self._tokens += rows[0].shape[0] * rows[0].shape[2]

    def means(self) -> dict[str, torch.Tensor]:
        """The means of both, bfloat16 [heads, D]; none where no 4-bit cache can hold them."""
        key, value = self._sums
        if key.shape != value.shape or key.shape[1] % CACHE_BLOCK:
            return {}
        means = ((x / self._tokens).to(torch.bfloat16).cpu() for x in (key, value))
        return dict(zip((KEY_MEAN, VALUE_MEAN), means, strict=True))


class CacheMeans:
    """Stands in the place of a model's attention, which it calls.

    Args:
        model: of transformers. If its attention cannot be exchanged, nothing is seen.
    """

    def __init__(self, model: Any) -> None:
        from transformers.masking_utils import (
            ALL_MASK_ATTENTION_FUNCTIONS,
            AttentionMaskInterface,
            eager_mask,
        )
        from transformers.modeling_utils import AttentionInterface

        self._own = model.config.get_text_config()._attn_implementation
        self._sums: dict[torch.nn.Module, _Sums] | None = None
        mask = ALL_MASK_ATTENTION_FUNCTIONS.get(self._own, eager_mask)
        AttentionInterface.register(_NAME, self._attend)
        AttentionMaskInterface.register(_NAME, mask)
        model.set_attn_implementation(_NAME)

    @contextmanager
    def seen(self) -> Iterator[dict[torch.nn.Module, _Sums]]:
        """Add up what is attended to inside the block.

        Yields:
            Attention module -> its sums, which attention fills.
        """
        self._sums = {}
        try:
            yield self._sums
        finally:
            self._sums = None

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        if self._sums is not None:
            self._sums.setdefault(module, _Sums()).add((key, value))
        return self._function(module)(module, query, key, value, *arguments, **options)

    def _function(self, module: torch.nn.Module) -> Callable[..., Any]:
        """The attention that computes."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        found = ALL_ATTENTION_FUNCTIONS.get(self._own)
        if found is None:  # "eager" is each model's own
            found = sys.modules[type(module).__module__].eager_attention_forward
        return found
