"""KV caches of 4 bits in vLLM: where they are switched on, for which layers, and what a slot takes.

vLLM asks a back end's class for the size of a cache without saying for which engine; so a layer
that is built notes its engine's config here, and sizes are given for that one. Whether a layer
packs its cache follows afterwards from the cache that it gets, and from nothing else.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)

from dialect_kernels.cached_attention import attend, store
from dialect_kernels.kv_cache import CACHE_BLOCK, Context, KvCache, Scoring, slot_bytes

from ..scheme import AttentionFormat, KvCacheFormat, SchemeError
from .cache_means import means_of
from .options import engine_options

__all__ = [
    "CACHE_DTYPE",
    "attend_packed",
    "attention_format",
    "cache_format",
    "cache_of",
    "customized",
    "is_packed",
    "note_engine",
    "store_packed",
]

logger = init_logger("vllm.blockdialect")

CACHE_DTYPE = "blockdialect"
"""What ``--kv-cache-dtype`` calls the format, from vLLM 0.33 on, on GPUs."""
_SPECS = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)
"""Kinds of caches that hold one key and one value for each token and head."""

_latest: weakref.ref[Any] | None = None


def cache_format(config: Any) -> KvCacheFormat:
    """The format of the KV cache of an engine.

    Args:
        config: vLLM's config; ``--kv-cache-dtype`` goes before ``--additional-config``, and that
            before the model's scheme.

    Raises:
        SchemeError: if an option of this plugin is not known or has a value that is not allowed.
    """
    options = engine_options(config)
    if _wanted_by_dtype(config):
        return "dialect"
    scheme = getattr(getattr(config, "quant_config", None), "scheme", None)
    of_model: KvCacheFormat = getattr(scheme, "kv_cache", "none")
    return options.kv_cache or of_model


def attention_format(config: Any) -> AttentionFormat:
    """The format of queries and probabilities over the packed caches of an engine.

    Args:
        config: vLLM's config; ``--additional-config`` goes before the model's scheme, which has no
            effect where the engine's options switch the cache off.

    Raises:
        SchemeError: as :func:`cache_format`, or if the options want it without such a cache.
    """
    wanted = engine_options(config).attention
    if cache_format(config) == "none":
        if wanted == "dialect":
            raise SchemeError(
                "additional_config: attention of blockdialect is 'dialect', which needs keys and "
                'values in 4 bits: add "kv_cache": "dialect"'
            )
        return "none"
    scheme = getattr(getattr(config, "quant_config", None), "scheme", None)
    of_model: AttentionFormat = getattr(scheme, "attention", "none")
    return wanted or of_model


def note_engine(kv_cache_dtype: str) -> None:
    """Note the engine whose layer is being built; sizes are given for it from now on.

    Args:
        kv_cache_dtype: of the layer.

    Raises:
        SchemeError: if its options cannot be used together.
    """
    global _latest
    config = get_current_vllm_config()
    _latest = weakref.ref(config)
    if cache_format(config) != "none":
        _check_engine(config, kv_cache_dtype)


def customized(spec: Any) -> Any:
    """A layer's spec with what a slot takes, if a dialect cache is wanted and can serve it.

    Raises:
        SchemeError: if ``--kv-cache-dtype`` wants one for a layer that cannot have it.
    """
    config = get_current_vllm_config_or_none() or (_latest and _latest())
    if config is None or cache_format(config) == "none" or is_packed(spec):
        return spec
    by_dtype = _wanted_by_dtype(config)
    if by_dtype and spec.dtype != torch.uint8:  # one of --kv-cache-dtype-skip-layers
        return spec
    if (reason := _refusal(spec)) is not None:
        if by_dtype:
            raise SchemeError(
                f"kv_cache_dtype: {CACHE_DTYPE!r}; {reason}: switch the cache on by "
                '--additional-config \'{"blockdialect": {"kv_cache": "dialect"}}\' instead, which '
                "keeps such layers in 16 bit"
            )
        logger.info_once(f"the KV cache of some layers stays in 16 bit: {reason}")
        return spec
    size = slot_bytes(spec.head_size)
    logger.info_once(
        f"KV cache in 4 bit: {size} bytes for each token and head of {spec.head_size} "
        f"instead of {4 * spec.head_size} in 16 bit"
    )
    return replace(spec, dtype=torch.uint8, state_content_bytes=size)


def store_packed(
    layer: Any,
    kv_cache: torch.Tensor,
    head_size: int,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store new rows of keys and values in a layer's packed cache; arguments are vLLM's."""
    count = min(key.shape[0], slot_mapping.shape[0])
    slots = slot_mapping[:count].to(torch.int64)
    store(cache_of(layer, kv_cache, head_size), key[:count], value[:count], slots)


def attend_packed(
    layer: Any,
    kv_cache: torch.Tensor,
    heads: tuple[int, int],
    query: torch.Tensor,
    metadata: Any,
    causal: torch.Tensor | bool,
    scoring: Scoring,
    output: torch.Tensor,
    dialect_attention: bool = False,
) -> torch.Tensor:
    """Attend over a layer's packed cache.

    Args:
        layer: vLLM's attention layer.
        kv_cache: the cache.
        heads: how many query heads there are, and the head size.
        query: of all tokens, and perhaps of more.
        metadata: vLLM's, of this step.
        causal: whether a query sees no positions behind its own.
        scoring: of the layer.
        output: as `query`; written to and returned.
        dialect_attention: whether queries and probabilities are rounded, too.
    """
    count = metadata.num_actual_tokens
    shape = (count, *heads)
    context = Context(metadata.query_start_loc, metadata.seq_lens, metadata.block_table, causal)
    cache = cache_of(layer, kv_cache, heads[1])
    out = output[:count].view(shape)
    attend(cache, query[:count].view(shape), context, scoring, out, dialect_attention)
    return output


def cache_of(layer: Any, kv_cache: torch.Tensor, head_size: int) -> KvCache:
    """A layer's packed cache, with the means that are subtracted from what is stored in it."""
    key_mean, value_mean = means_of(layer)
    return KvCache(kv_cache, head_size, key_mean=key_mean, value_mean=value_mean)


def _wanted_by_dtype(config: Any) -> bool:
    return bool(getattr(getattr(config, "cache_config", None), "cache_dtype", "") == CACHE_DTYPE)


def is_packed(spec: Any) -> bool:
    """Whether a spec says itself what a slot takes."""
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
    if not {config.cache_config.cache_dtype, kv_cache_dtype} <= {"auto", CACHE_DTYPE}:
        raise SchemeError(
            f"kv_cache_dtype: {config.cache_config.cache_dtype!r}; with kv_cache 'dialect' allowed "
            "is 'auto': leave --kv-cache-dtype out"
        )
    if config.kv_transfer_config is not None:
        raise SchemeError(
            "kv_transfer_config: connectors that move or offload a KV cache do not know the "
            "dialect format; leave it out, or set kv_cache to 'none'"
        )
