"""Differences between the supported vLLM versions, each with its reason and its end."""

from __future__ import annotations

from typing import Any

__all__ = ["current_architectures", "is_expert_layer", "tied_embeddings"]


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


def _hf_config() -> Any:
    """The model's config.

    Symptom: from 0.27 on, `get_current_vllm_config()` raises outside of a model's construction
    where 0.26 warns and returns a default without a model. Cause: an assertion was added. Ends
    when 0.26 is no longer supported; then only the assertion needs handling.
    """
    from vllm.config import get_current_vllm_config

    try:
        model_config = get_current_vllm_config().model_config
    except AssertionError:
        return None
    return getattr(model_config, "hf_config", None)
