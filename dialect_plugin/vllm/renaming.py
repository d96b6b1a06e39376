"""vLLM's names of the checkpoint's layers and tensors, by a model's map of names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from dialect_kernels.packed import STORED_FIELDS

from . import compat
from .probes import WEIGHT

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["following_weights", "mapped"]

Weights = Iterable[tuple[str, torch.Tensor]]
_STORED = tuple(field.stored for field in STORED_FIELDS)


def mapped(mapper: WeightsMapper, name: str) -> str:
    """vLLM's name of the checkpoint's layer `name`."""
    # most maps work on the names of parameters: ".gate_proj." is not in a layer's own name
    found = mapper.apply_list([f"{name}.{WEIGHT}"])
    if found and found[0].endswith(f".{WEIGHT}"):
        return found[0].removesuffix(f".{WEIGHT}")
    found = mapper.apply_list([name])
    return found[0] if found else name


def following_weights(
    model: torch.nn.Module, own: Callable[[Weights], Any]
) -> Callable[[Weights], Any]:
    """The model's `own` load_weights, whose map takes packed tensors where it takes their weight.

    A map may name a weight in full (``.embed_tokens.weight`` of GPT-OSS): it then leaves the names
    of the packed tensors as they are. They get vLLM's name of their layer before the map sees them.
    """
    mapper = compat.name_mapper(model)
    return own if mapper is None else lambda weights: own(_renamed(mapper, weights))


def _renamed(mapper: WeightsMapper, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    layers: dict[str, str] = {}
    for name, tensor in weights:
        layer, _, field = name.rpartition(".")
        if field in _STORED:
            if layer not in layers:
                layers[layer] = _offered(mapper, layer)
            yield f"{layers[layer]}.{field}", tensor
        else:
            yield name, tensor


def _offered(mapper: WeightsMapper, layer: str) -> str:
    """The name of `layer` from which the map makes vLLM's name for packed tensors, too."""
    wanted, field = mapped(mapper, layer), _STORED[0]
    for name in (layer, wanted):
        if mapper.apply_list([f"{name}.{field}"]) == [f"{wanted}.{field}"]:
            return name
    return layer
