"""Layers that read one input, such as q, k and v of a self-attention, round it once (ours).

Which layers do is learned: those of one part of a block that are called one after the other with
the same tensor. From the next call of the first of them on, all are computed in one go, and the
products of the others wait for their layers to be called::

    to_q(x)  ->  products of q, k and v         to_k(x)  ->  taken         to_v(x)  ->  taken

A product is handed out if the layer is called with the very tensor, unwritten since, with the same
weights, and before the block's attention chooses other salient tokens; else the layer computes its
own. What waits is let go of with the input, or when the thread's next input comes; a layer that
let its product wait until then is computed alone from then on.

Each thread has its own. Compiled blocks and inference mode, where nothing tells whether a tensor
was written to, compute every layer alone.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

__all__ = ["can_be_shared", "shared_product"]


_WORTHWHILE = 1 << 14
"""Numbers of an input below which rounding them again takes less than finding who else reads them:
about 50 µs on a CPU."""


class _Layer(Protocol):
    """A linear layer of a block."""

    slot: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]: ...

    def products(self, x: torch.Tensor, others: Sequence[Any]) -> list[torch.Tensor]: ...

    def reads_as(self, other: Any) -> bool: ...


_L = TypeVar("_L", bound=_Layer)


def can_be_shared(x: torch.Tensor) -> bool:
    """Whether layers that read `x` are computed together: it pays, and nobody can mistake `x`."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or x.numel() < _WORTHWHILE:
        return False
    return not (torch.is_inference_mode_enabled() or x.is_inference())


def shared_product(layer: _Layer, x: torch.Tensor) -> torch.Tensor:
    """The product of a layer, computed with those of the layers that read its input too.

    Args:
        layer: the layer.
        x: its input, which :func:`can_be_shared`.
    """
    reading: _Reading | None = getattr(_thread, "reading", None)
    if reading is not None:
        if reading.is_of(x):
            if (y := reading.take(layer)) is not None:
                return y
            first = reading.first()
            if first is not None and first is not layer and first.reads_as(layer):
                _add_follower(first, layer)
                return layer.products(x, ())[0]
        reading.end()
    others = [other for other in _followers_of(layer) if layer.reads_as(other)]
    y, *waiting = layer.products(x, others)
    _thread.reading = _Reading(layer, x, zip(others, waiting, strict=True))
    return y


@dataclass(frozen=True)
class _Waiting:
    """A product that waits for its layer, and what it was computed with."""

    y: torch.Tensor
    tensors: tuple[torch.Tensor | None, ...]
    writes: tuple[int, ...]
    """How often they were written to, and the block's slot: at every attention call."""


class _Reading:
    """A thread's latest input, its first layer, and the products that wait for others."""

    def __init__(self, layer: _Layer, x: torch.Tensor, products: Any) -> None:
        self.first = weakref.ref(layer)
        self._version = x._version
        self._waiting: weakref.WeakKeyDictionary[_Layer, _Waiting] = weakref.WeakKeyDictionary()
        for other, y in products:
            self._waiting[other] = _Waiting(y, *_facts(other))
        me = weakref.ref(self)

        def let_go(_: object) -> None:
            reading = me()
            if reading is not None:
                reading.end()

        self._x = weakref.ref(x, let_go)

    def is_of(self, x: torch.Tensor) -> bool:
        """Whether the input is this tensor, and unwritten."""
        return self._x() is x and self._version == x._version

    def take(self, layer: _Layer) -> torch.Tensor | None:
        """The product that waits for a layer, or None; it waits no longer."""
        waiting = self._waiting.pop(layer, None)
        if waiting is None:
            return None
        tensors, writes = _facts(layer)
        same = all(map(operator.is_, tensors, waiting.tensors))
        return waiting.y if same and writes == waiting.writes else None

    def end(self) -> None:
        """Let go of what waits: it was computed in vain."""
        first = self.first()
        vain = list(self._waiting)
        if first is not None and vain:
            left = [layer for layer in _followers_of(first) if layer not in vain]
            _followers[first] = tuple(map(weakref.ref, left))
        self._waiting.clear()


_thread = threading.local()
_followers: weakref.WeakKeyDictionary[_Layer, tuple[weakref.ref[_Layer], ...]]
_followers = weakref.WeakKeyDictionary()


def _followers_of(layer: _L) -> list[_L]:
    """The layers that are computed with a layer."""
    found: list[Any] = [other() for other in _followers.get(layer, ())]
    return [other for other in found if other is not None]


def _add_follower(first: _Layer, layer: _Layer) -> None:
    followers = _followers_of(first)
    if layer not in followers:
        _followers[first] = tuple(map(weakref.ref, (*followers, layer)))


def _facts(layer: _Layer) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...]]:
    """A layer's tensors, and how often they and its block's slot were written to."""
    tensors = layer.tensors
    written = [t for t in tensors if t is not None and not t.is_inference()]
    return tensors, (*[t._version for t in written], int(layer.slot[1]))
