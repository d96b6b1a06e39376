"""Finding the model around the layers of a quantization config, and joining its load_weights.

vLLM gives a quantization config each layer, but never the model. PyTorch calls a hook whenever a
module becomes the child of another one: so the models that hold the config's layers are found while
vLLM builds them, and their ``load_weights`` is replaced on the instance. No class of vLLM changes.
A load that copies another engine's tensors does not call it, but the model's ``state_dict``.
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

Begin = Callable[[torch.nn.Module], None]
"""What happens to the complete model before a load that copies tensors."""

_loads: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Load, Begin | None]] = (
    weakref.WeakKeyDictionary()
)
_hooks: list[Any] = []


def watch(layer: torch.nn.Module, load: Load, begin: Begin | None) -> None:
    """Join the models that are being built around `layer`.

    Args:
        layer: a layer of theirs.
        load: what loads their weights from now on.
        begin: what happens before their first ``state_dict``, if anything.
    """
    _loads[layer] = load, begin
    if not _hooks:
        _hooks.append(register_module_module_registration_hook(_join))


def _join(parent: torch.nn.Module, _: str, child: torch.nn.Module | None) -> None:
    joined = None if child is None else _loads.get(child)
    if joined is None or parent in _loads:
        return
    _loads[parent] = joined
    load, begin = joined
    own = getattr(type(parent), "load_weights", None)
    if callable(own):
        parent.load_weights = _replacement(weakref.ref(parent), own, load)  # type: ignore[assignment]
        if begin is not None:
            parent.register_state_dict_pre_hook(_before(begin))  # type: ignore[no-untyped-call]


def _before(begin: Begin) -> Callable[[torch.nn.Module, str, bool], None]:
    def state_dict(model: torch.nn.Module, prefix: str, _: bool) -> None:
        if not prefix:  # not a part of the model
            begin(model)

    return state_dict


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
