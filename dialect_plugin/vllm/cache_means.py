"""Means of keys and values, from a checkpoint into the attention layers of vLLM's model.

They are buffers of these layers: a reload and sleep mode leave them in their place, a graph of the
GPU may hold their addresses, and a saved ``sharded_state`` has them. Without means in the
checkpoint they are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger

from dialect_kernels.kv_cache import CACHE_BLOCK

from ..cache_means import KEY_MEAN, VALUE_MEAN, attention_of
from . import compat
from .errors import LoadError
from .places import Places

__all__ = ["give_room", "means_of", "without_means"]

logger = init_logger("vllm.blockdialect")

_OWNER = "_blockdialect_means_of"
"""Attribute of a layer that reads another layer's cache: a tuple of that layer."""

Weights = Iterable[tuple[str, torch.Tensor]]


def give_room(model: torch.nn.Module) -> None:
    """Give every layer of a complete model that may have a 4-bit cache buffers for its means."""
    for layer in _attentions(model):
        target = compat.shares_cache_of(layer)
        if target is not None:
            setattr(layer, _OWNER, (target,))
            continue
        with compat.built_for_reload(layer):
            for name in (KEY_MEAN, VALUE_MEAN):
                layer.register_buffer(name, torch.zeros(layer.num_kv_heads, layer.head_size))


def means_of(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The means of the keys and of the values in a layer's cache, float32 [heads, D], or None."""
    (owner,) = getattr(layer, _OWNER, (layer,))
    return getattr(owner, KEY_MEAN, None), getattr(owner, VALUE_MEAN, None)


def without_means(
    model: torch.nn.Module, weights: Weights, engine_names: Callable[[str], Iterable[str]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that are no means, in their order; means are copied into the model.

    Args:
        model: the complete model.
        weights: names and tensors of the checkpoint.
        engine_names: what vLLM may call the checkpoint's module of a name.

    Raises:
        LoadError: if means do not fit the model, or are not finite.
    """
    places = None
    for name, tensor in weights:
        held = attention_of(name)
        if held is None:
            yield name, tensor
            continue
        places = places or _places(model, engine_names)
        layer = places.find(held[0])
        if layer is not None:
            _take(layer, held[1], tensor, name)
        elif not compat.is_stage() and next(_attentions(model), None) is not None:
            logger.warning_once(f"{name}: this model has no layer for these means of a KV cache")


def _attentions(model: torch.nn.Module) -> Iterator[Any]:
    """The layers whose caches may have 4 bits."""
    for layer in model.modules():
        if getattr(getattr(layer, "impl", None), "takes_means", False):
            size: Any = layer.head_size
            if size == layer.head_size_v and not size % CACHE_BLOCK:
                yield layer


def _places(model: torch.nn.Module, engine_names: Callable[[str], Iterable[str]]) -> Places:
    """Attention layers by the names of the modules that hold them."""
    found = {id(layer) for layer in _attentions(model) if hasattr(layer, KEY_MEAN)}
    return Places(
        (
            (place, name.rpartition(".")[0], layer)
            for place, layer in model.named_modules()
            if id(layer) in found
            for name in (place, str(layer.layer_name))
        ),
        engine_names,
    )


def _take(layer: Any, which: str, tensor: torch.Tensor, name: str) -> None:
    """Copy this rank's heads."""
    room = compat.buffer_in_use(layer, which)
    heads, ranks = room.shape[0], get_tensor_model_parallel_world_size()
    all_heads = tensor.shape[0] if tensor.dim() == 2 else 0
    # where there are fewer heads than ranks, several ranks have the same one
    fits = all_heads and tensor.shape[1] == room.shape[1] and heads * ranks % all_heads == 0
    if not fits or heads > all_heads:
        raise LoadError(
            f"{name}: the checkpoint's tensor has the shape {list(tensor.shape)}; it must be "
            f"[heads of keys and values, {room.shape[1]}]: convert the model again"
        )
    if not bool(tensor.isfinite().all()):
        raise LoadError(
            f"{name}: the checkpoint's tensor holds NaN or Inf; convert the model again"
        )
    first = get_tensor_model_parallel_rank() // (heads * ranks // all_heads) * heads
    with torch.no_grad():
        room.copy_(tensor[first : first + heads])
