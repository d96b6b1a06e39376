"""Differences between the supported vLLM versions, each with its reason and its end."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

__all__ = [
    "current_architectures",
    "is_expert_layer",
    "loads_through_loaders",
    "permit_amx",
    "tied_embeddings",
]

_LOAD_FORMATS = frozenset(
    {"auto", "hf", "safetensors", "fastsafetensors", "runai_streamer", "instanttensor"}
)


def is_expert_layer(layer: object) -> bool:
    """Whether `layer` holds a mixture's routed experts.

    Symptom: the class moved; `FusedMoE` is the layer in 0.25, a factory from 0.26 on, and is gone
    in 0.32, which has `FusedMoEFactory`. Cause: the experts became `RoutedExperts`, a name that
    0.26 and 0.32 share. Ends with the first version that renames it.
    """
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    return isinstance(layer, RoutedExperts)


def current_architectures() -> list[str]:
    """`architectures` of the model that is being built; empty outside of vLLM's model loading."""
    config = _hf_config()
    return list(getattr(config, "architectures", None) or [])


def tied_embeddings() -> bool:
    """Whether the model that is being built ties its output projection to the embeddings."""
    config = _hf_config()
    text = getattr(config, "text_config", config)
    return bool(getattr(text, "tie_word_embeddings", False))


def loads_through_loaders() -> bool:
    """Whether the load format passes every tensor of the checkpoint to a parameter's loader.

    ``dummy`` and ``sharded_state`` write into the parameters instead, so that a missing tensor
    cannot be noticed.
    """
    config = _vllm_config()
    return config is not None and str(config.load_config.load_format) in _LOAD_FORMATS


@cache
def permit_amx() -> None:
    """Request Linux's permission to use the CPU's AMX tiles, for the whole process.

    Symptom: the worker dies of SIGILL in its first attention with bfloat16 on a CPU with AMX.
    Cause: vLLM's attention uses tiles without requesting the permission. Most 16-bit models do not
    show it, because oneDNN requests it for linear layers that are large enough for tiles; those of
    a small model are not, and a quantized model runs none of them before its attention.
    Ends with the first vLLM that requests the permission itself (0.32 does not).
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def _hf_config() -> Any:
    return getattr(getattr(_vllm_config(), "model_config", None), "hf_config", None)


def _vllm_config() -> Any:
    """vLLM's config of the model that is being built; None outside of that."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()
