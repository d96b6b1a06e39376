"""Finding the model around the layers of a quantization config, and joining its load_weights.

vLLM gives a quantization config each layer, but never the model. PyTorch calls a hook whenever a
module becomes the child of another one: so the models that hold the config's layers are found while
vLLM builds them, and their ``load_weights`` is replaced on the instance. No class of vLLM changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

__all__ = ["watch"]

Load = Callable[[torch.nn.Module, Iterable[tuple[str, torch.Tensor]], Callable[[Any], Any]], Any]
"""(model, weights, the model's own load_weights) -> what load_weights returns."""

_loads: weakref.WeakKeyDictionary[torch.nn.Module, Load] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


def watch(layer: torch.nn.Module, load: Load) -> None:
    """Let the models that are being built around `layer` load their weights through `load`."""
    _loads[layer] = load
    if not _hooks:
        _hooks.append(register_module_module_registration_hook(_join))


def _join(parent: torch.nn.Module, _: str, child: torch.nn.Module | None) -> None:
    load = None if child is None else _loads.get(child)
    if load is None or parent in _loads:
        return
    _loads[parent] = load
    own = getattr(type(parent), "load_weights", None)
    if callable(own):
        parent.load_weights = _replacement(weakref.ref(parent), own, load)  # type: ignore[assignment]


def _replacement(
    held: weakref.ref[torch.nn.Module], own: Callable[..., Any], load: Load
) -> Callable[..., Any]:
    def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        while _hooks:  # the model is complete
            _hooks.pop().remove()
        model = held()
        assert model is not None
        return load(model, weights, lambda stream: own(model, stream, *args, **kwargs))

    return load_weights
