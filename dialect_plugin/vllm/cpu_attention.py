"""vLLM's CPU attention with a KV cache of 4 bits, where it is switched on.

The back end is registered in the place of vLLM's own, and is vLLM's own wherever the option is off:
for models without it, and for layers that a dialect cache cannot serve (:mod:`.caches`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from dialect_kernels.kv_cache import Scoring

from .caches import (
    attend_packed,
    attention_format,
    customized,
    is_packed,
    note_engine,
    store_packed,
)

__all__ = ["DialectCPUBackend"]


class DialectCPUBackend(CPUAttentionBackend):
    """vLLM's CPU back end, for caches of both kinds."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The attention of a layer."""
        return _Attention

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """What makes the metadata of a step."""
        return _MetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Say how much a slot takes, in layers that a dialect cache can serve."""
        return customized(super().customize_spec(spec))


class _Attention(CPUAttentionBackendImpl):
    """One layer; a packed cache is known by its bytes."""

    takes_means: ClassVar = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        note_engine(self.kv_cache_dtype)
        self._dialect_attention = attention_format(get_current_vllm_config()) == "dialect"
        self._scoring: Scoring | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store new rows of keys and values."""
        if not self._packs(kv_cache):
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        return store_packed(layer, kv_cache, self.head_size, key, value, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over a cache of either kind."""
        scales = (output_scale, output_block_scale)
        if attn_metadata is None or scales != (None, None) or not self._packs(kv_cache):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *scales
            )
        causal = attn_metadata.dynamic_causal
        if causal is None:
            causal = attn_metadata.causal
        heads = self.num_heads, self.head_size
        return attend_packed(
            layer,
            kv_cache,
            heads,
            query,
            attn_metadata,
            causal,
            self._score(),
            output,
            self._dialect_attention,
        )

    def _packs(self, kv_cache: torch.Tensor) -> bool:
        return kv_cache.dtype == torch.uint8 and not self.is_fp8_kv_cache

    def _score(self) -> Scoring:
        """How this layer scores; sinks are a weight, which is loaded after the layer is built."""
        if self._scoring is None:
            self._scoring = Scoring(
                self.scale,
                self.logits_soft_cap,
                max(0, self.sliding_window),
                self.alibi_slopes,
                None if self.sinks is None else self.sinks.to(torch.float32),
            )
        return self._scoring


class _MetadataBuilder(CPUAttentionMetadataBuilder):
    """The metadata of a step; the kernel for packed caches needs no schedule of vLLM's."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """Metadata for the layers of one group of caches."""
        if not is_packed(self.kv_cache_spec):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        by_sequence = isinstance(common.causal, torch.Tensor)
        return CPUAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            causal=False if by_sequence else common.causal,
            dynamic_causal=common.causal if by_sequence else None,
        )
