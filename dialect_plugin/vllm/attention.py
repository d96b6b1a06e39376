"""vLLM's CPU attention with a KV cache of 4 bits, where it is switched on.

The back end is registered in the place of vLLM's own, and is vLLM's own wherever the option is off:
for models without it, and for layers that a dialect cache cannot serve. vLLM asks a back end's
class for the size of a cache without saying for which engine; so a layer that is built notes its
engine's config here, and sizes are given for that one. What a layer does with its cache afterwards
follows from the cache that it gets, and from nothing else.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, get_args

import torch
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)

from dialect_kernels.cached_attention import attend, store
from dialect_kernels.kv_cache import CACHE_BLOCK, Context, KvCache, Scoring, slot_bytes

from ..scheme import KvCacheFormat, SchemeError

__all__ = ["DialectCPUBackend"]

logger = init_logger("vllm.blockdialect")

_OPTIONS = "blockdialect"
"""The key of ``--additional-config`` that holds this plugin's options."""
_SPECS = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)
"""Kinds of caches that hold one key and one value for each token and head."""

_latest: weakref.ref[Any] | None = None


def _cache_format(config: Any) -> KvCacheFormat:
    """The format of the KV cache of an engine.

    Args:
        config: vLLM's config; ``--additional-config`` goes before the model's scheme.

    Raises:
        SchemeError: if an option of this plugin is not known or has a value that is not allowed.
    """
    additional = getattr(config, "additional_config", None)
    options = additional if isinstance(additional, Mapping) else {}
    for name in options:
        if name != _OPTIONS and get_close_matches(name, [_OPTIONS], cutoff=0.8):
            raise SchemeError(
                f"additional_config: the key {name!r} is not known; did you mean {_OPTIONS!r}?"
            )
    given = options.get(_OPTIONS, {})
    if not isinstance(given, Mapping):
        raise SchemeError(
            f"additional_config: {_OPTIONS} is {given!r}; it must be an object such as "
            '{"kv_cache": "dialect"}'
        )
    for name in given.keys() - {"kv_cache"}:
        raise SchemeError(
            f"additional_config: {_OPTIONS} has the key {name!r}; allowed is kv_cache"
        )
    scheme = getattr(getattr(config, "quant_config", None), "scheme", None)
    found: Any = given.get("kv_cache", getattr(scheme, "kv_cache", "none"))
    if found not in get_args(KvCacheFormat):
        allowed = " and ".join(map(repr, get_args(KvCacheFormat)))
        raise SchemeError(
            f"additional_config: kv_cache of {_OPTIONS} is {found!r}; allowed are {allowed}"
        )
    return found


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
        spec = super().customize_spec(spec)
        config = get_current_vllm_config_or_none() or (_latest and _latest())
        if config is None or _cache_format(config) == "none" or _is_packed(spec):
            return spec
        if (reason := _refusal(spec)) is not None:
            logger.info_once(f"the KV cache of some layers stays in 16 bit: {reason}")
            return spec
        size = slot_bytes(spec.head_size)
        logger.info_once(
            f"KV cache in 4 bit: {size} bytes for each token and head of {spec.head_size} "
            f"instead of {spec.state_content_size_bytes}"
        )
        return replace(spec, dtype=torch.uint8, state_content_bytes=size)


class _Attention(CPUAttentionBackendImpl):
    """One layer; a packed cache is known by its bytes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        global _latest
        config = get_current_vllm_config()
        _latest = weakref.ref(config)
        if _cache_format(config) != "none":
            _check_engine(config, self.kv_cache_dtype)
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
        count = min(key.shape[0], slot_mapping.shape[0])
        slots = slot_mapping[:count].to(torch.int64)
        return store(KvCache(kv_cache, self.head_size), key[:count], value[:count], slots)

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
        count = attn_metadata.num_actual_tokens
        shape = (count, self.num_heads, self.head_size)
        causal = attn_metadata.dynamic_causal
        context = Context(
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            attn_metadata.causal if causal is None else causal,
        )
        attend(
            KvCache(kv_cache, self.head_size),
            query[:count].view(shape),
            context,
            self._score(),
            output[:count].view(shape),
        )
        return output

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
        if not _is_packed(self.kv_cache_spec):
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


def _is_packed(spec: Any) -> bool:
    return spec.state_content_bytes is not None


def _refusal(spec: Any) -> str | None:
    """Why a layer keeps its 16-bit cache, or None."""
    if type(spec) not in _SPECS:
        return f"{type(spec).__name__} is a cache of another kind"
    if spec.head_size != spec.head_size_v:
        return f"keys of {spec.head_size} and values of {spec.head_size_v} numbers differ in size"
    if spec.head_size % CACHE_BLOCK:
        return f"head size {spec.head_size} is no multiple of {CACHE_BLOCK}"
    return None


def _check_engine(config: Any, kv_cache_dtype: str) -> None:
    """Refuse what does not go together with a dialect cache.

    Raises:
        SchemeError: at the first of these.
    """
    if config.cache_config.cache_dtype != "auto" or kv_cache_dtype != "auto":
        raise SchemeError(
            f"kv_cache_dtype: {config.cache_config.cache_dtype!r}; with kv_cache 'dialect' allowed "
            "is 'auto': leave --kv-cache-dtype out"
        )
    if config.kv_transfer_config is not None:
        raise SchemeError(
            "kv_transfer_config: connectors that move or offload a KV cache do not know the "
            "dialect format; leave it out, or set kv_cache to 'none'"
        )
