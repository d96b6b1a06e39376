"""vLLM's attention on GPUs with a KV cache of 4 bits, where it is switched on.

The back end is vLLM's Triton attention, whose place it leaves alone: it is registered as ``CUSTOM``
and runs with ``--attention-backend CUSTOM``. Layers that a dialect cache cannot serve
(:mod:`.caches`) keep a 16-bit cache and vLLM's own kernels. From vLLM 0.29 on, whose caches are
[blocks, heads, tokens, bytes] in every layout.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from vllm.config import cache, get_current_vllm_config
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from dialect_kernels.cached_attention import warm_up
from dialect_kernels.kv_cache import Scoring, slot_bytes

from .caches import (
    CACHE_DTYPE,
    attend_packed,
    attention_format,
    cache_format,
    cache_of,
    customized,
    is_packed,
    note_engine,
    store_packed,
)
from .first_chunks import FirstChunks, FlashAttention, find_first_chunks, flash_attention_for

__all__ = ["DialectGPUBackend", "register_cache_dtype"]

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
"""What FlashAttention computes in."""


class DialectGPUBackend(TritonAttentionBackend):
    """vLLM's Triton back end, for caches of both kinds."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        *TritonAttentionBackend.supported_kv_cache_dtypes,
        CACHE_DTYPE,
    ]

    @staticmethod
    def get_name() -> str:
        """The name that ``--attention-backend`` takes."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """The attention of a layer."""
        return _Attention

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        """What makes the metadata of a step."""
        return _MetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Say how much a slot takes, in layers that a dialect cache can serve."""
        return customized(super().customize_spec(spec))

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Images whose tokens see each other are not served."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Windows that leave the prompt visible are not served."""
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        """Square roots of ALiBi's distances are not served."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """A context is split by how many sequences there are."""
        return False


@dataclass
class _Metadata(TritonAttentionMetadata):
    """vLLM's, and what of a step may attend to 16-bit keys and values."""

    first_chunks: FirstChunks | None = None
    others: TritonAttentionMetadata | None = None
    """Of the sequences before the first chunks, if there are any."""


class _Attention(TritonAttentionImpl):
    """One layer; a packed cache is known by its bytes."""

    takes_means: ClassVar = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        note_engine(self.kv_cache_dtype)
        config = get_current_vllm_config()
        self._dialect_attention = attention_format(config) == "dialect"
        self._may_pack = cache_format(config) != "none"
        self._flash: FlashAttention | None = None
        if self._may_pack:
            self.supports_quant_query_input = False
            if not self._dialect_attention:  # which has no product in 16 bit
                self._flash = flash_attention_for(self)
        self._scoring: Scoring | None = None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Whether outputs may be asked for in 8 bits."""
        return not self._may_pack and super().fused_output_quant_supported(quant_key)

    def do_kv_cache_update(
        self,
        layer: Any,
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
        attn_metadata: TritonAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over a cache of either kind."""
        if attn_metadata is None or not self._packs(kv_cache):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        chunks = getattr(attn_metadata, "first_chunks", None)
        if chunks is not None and self._flash is not None and query.dtype in _FLASH_DTYPES:
            shape = (-1, self.num_heads, self.head_size)
            self._flash.attend(chunks, query.view(shape), key, value, output.view(shape))
            attn_metadata = attn_metadata.others
        if attn_metadata is None:
            return output
        heads = self.num_heads, self.head_size
        scoring = self._score(query.device)
        return attend_packed(
            layer, kv_cache, heads, query, attn_metadata, attn_metadata.causal, scoring, output,
            self._dialect_attention,
        )  # fmt: skip

    def warm_up(self, layer: Any, spec: Any, dtype: torch.dtype, device: torch.device) -> None:
        """Compile what this layer's cache needs.

        Args:
            layer: vLLM's attention layer.
            spec: of the cache.
            dtype: of the model.
            device: of the model.
        """
        size = slot_bytes(self.head_size)
        shape = 1, self.num_kv_heads, spec.block_size, size
        slots = torch.zeros(shape, dtype=torch.uint8, device=device)
        cache = cache_of(layer, slots, self.head_size)
        warm_up(cache, self.num_heads, dtype, self._score(device), self._dialect_attention)
        if self._flash is not None and dtype in _FLASH_DTYPES:
            # FlashAttention 4 compiles at its first call, and anew for more or longer sequences
            heads = self.num_heads, self.num_kv_heads
            for starts in ([0, 2], [0, 512], [0, 512, 1024]):
                self._flash.try_out(starts, heads, self.head_size, dtype, device)

    def _packs(self, kv_cache: torch.Tensor) -> bool:
        return self._may_pack and kv_cache.dtype == torch.uint8

    def _score(self, device: torch.device) -> Scoring:
        """How this layer scores; sinks are a weight, which is loaded after the layer is built."""
        if self._scoring is None:
            slopes, sinks = (
                None if given is None else given.to(device, torch.float32)
                for given in (self.alibi_slopes, self.sinks)
            )
            window = self.sliding_window[0] + 1
            self._scoring = Scoring(self.scale, self.logits_soft_cap, window, slopes, sinks)
        return self._scoring


class _MetadataBuilder(TritonAttentionMetadataBuilder):
    """The metadata of a step; it is made before vLLM captures graphs and serves."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._packs = is_packed(kv_cache_spec)
        if self._packs:
            self.reorder_batch_threshold = 1  # vLLM then puts first chunks last in a batch
            layers = vllm_config.compilation_config.static_forward_context
            dtype = vllm_config.model_config.dtype
            for name in layer_names:
                layer: Any = layers[name]
                layer.impl.warm_up(layer, kv_cache_spec, dtype, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> TritonAttentionMetadata:
        """Metadata for the layers of one group of caches."""
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)
        chunks = find_first_chunks(common_attn_metadata) if self._packs else None
        if chunks is None:
            return made
        others = None
        if chunks.sequences:
            others = replace(
                made,
                num_actual_tokens=chunks.tokens,
                query_start_loc=made.query_start_loc[: chunks.sequences + 1],
                seq_lens=made.seq_lens[: chunks.sequences],
                block_table=made.block_table[: chunks.sequences],
            )
        given = {field.name: getattr(made, field.name) for field in fields(made)}
        return _Metadata(**given, first_chunks=chunks, others=others)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> TritonAttentionMetadata:
        """Metadata for a graph, which serves sequences of all kinds: those with a cache, too."""
        made = super().build_for_cudagraph_capture(common_attn_metadata)
        return (
            replace(made, first_chunks=None, others=None) if isinstance(made, _Metadata) else made
        )


class _CacheDtype:
    """What vLLM asks of a dtype that the back end manages itself."""

    name = CACHE_DTYPE

    def torch_dtype(self) -> torch.dtype:
        """What caches are made of."""
        return torch.uint8

    def quant_mode(self) -> Any:
        """None of vLLM's own."""
        from vllm.v1.kv_cache_interface import KVQuantMode

        return KVQuantMode["CUSTOM"]


def register_cache_dtype() -> None:
    """Make ``--kv-cache-dtype blockdialect`` known, where vLLM lets one; twice changes nothing."""
    register = getattr(cache, "register_kv_cache_dtype", None)
    if register is not None and CACHE_DTYPE not in cache.KV_CACHE_DTYPES:
        register(CACHE_DTYPE)(_CacheDtype)
