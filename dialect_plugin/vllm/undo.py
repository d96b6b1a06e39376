"""Old weights that come back if loading new ones into a running model fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import compat

__all__ = ["keeping_pushed", "keeping_reloaded"]


class _Kept:
    """Copies of tensors in the host's memory."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            place = tensor.data_ptr(), tensor.numel()
            if tensor.numel() and place not in self._copies:
                self._copies[place] = tensor, tensor.to("cpu", copy=True)

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
    products = compat.hidden_weights(model)
    for layer in model.modules():
        kept.keep(tensor.data for tensor in compat.weights_put_aside(layer))
    try:
        yield
    except BaseException:
        compat.restore_weights(model)
        for layer, product in products:
            layer.cpu_linear = product
        kept.give_back()
        raise


@contextmanager
def keeping_pushed(model: torch.nn.Module) -> Iterator[None]:
    """Give the weights back that have been overwritten if the block raises.

    A tensor is copied when something is about to be written into it, by a parameter's loader or by
    the model itself, so that a small push costs little.
    """
    tensors = [t.data for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    held = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    data = [(t, t.data) for t in (*model.parameters(), *model.buffers())]
    kept = _Kept()
    try:
        with _BeforeWrites(tensors, kept):
            yield
    except BaseException:
        for module, parameters, buffers in held:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for tensor, value in data:
            if tensor.data_ptr() != value.data_ptr():
                tensor.data = value
        kept.give_back()
        raise


class _BeforeWrites(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's annotations
    """Copies a tensor before the first operation that writes into its memory.

    Args:
        tensors: those that are watched.
        kept: where the copies go.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self._watched: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            self._watched.setdefault(_memory(tensor), []).append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable:
            for place, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = args[place] if place < len(args) else kwargs.get(argument.name)
                    for tensor in given if isinstance(given, list | tuple) else (given,):
                        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                            self._kept.keep(self._watched.pop(_memory(tensor), ()))
        return func(*args, **kwargs)


def _memory(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor, or of what it is a view of, begins."""
    return tensor.untyped_storage().data_ptr()
