"""Old weights that come back if loading new ones into a running model fails."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from dialect_kernels.packed import STORED_FIELDS

from . import compat
from .parameters import wrapped_loaders

__all__ = ["keeping_pushed", "keeping_reloaded"]


class _Kept:
    """Copies of tensors in the host's memory."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.numel() and tensor.data_ptr() not in self._copies:
                self._copies[tensor.data_ptr()] = tensor, tensor.to("cpu", copy=True)

    def give_back(self) -> None:
        for tensor, copy in self._copies.values():
            tensor.copy_(copy)


@contextmanager
def keeping_reloaded(model: torch.nn.Module) -> Iterator[None]:
    """Give the weights that vLLM has put aside for a reload back if the block raises.

    vLLM copies the new values of a layer over the old ones as soon as they are complete, so that
    all weights are copied first.
    """
    kept = _Kept()
    for layer in model.modules():
        kept.keep(tensor.data for tensor in compat.weights_put_aside(layer))
    try:
        yield
    except BaseException:
        compat.restore_weights(model)
        kept.give_back()
        raise


@contextmanager
def keeping_pushed(model: torch.nn.Module, packed: Collection[torch.nn.Module]) -> Iterator[None]:
    """Give weights back that parameters' loaders have overwritten if the block raises.

    A weight is copied when the first tensor for it arrives, so that a small push costs little.

    Args:
        model: the model.
        packed: its packed layers, whose 16-bit weight fills their packed tensors.
    """
    kept = _Kept()
    ours = {id(layer) for layer in packed}
    stored = [field.stored for field in STORED_FIELDS]
    wrappers: dict[int, tuple[Any, Callable[..., Any]]] = {}
    for module in model.modules():
        group = [getattr(module, name).data for name in stored] if id(module) in ours else []
        for name, parameter in module.named_parameters(recurse=False):
            own = group if parameter.is_meta or (group and name in stored) else [parameter.data]
            wrappers.setdefault(id(parameter), (parameter, partial(_keeping, kept, own)))
    try:
        with wrapped_loaders(wrappers.values()):
            yield
    except BaseException:
        kept.give_back()
        raise


def _keeping(
    kept: _Kept, tensors: list[torch.Tensor], loader: Callable[..., Any]
) -> Callable[..., Any]:
    def load(*args: Any, **kwargs: Any) -> Any:
        kept.keep(tensors)
        return loader(*args, **kwargs)

    return load
