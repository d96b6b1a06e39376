"""Probes: tensors that show what a model's loader does to each tensor of a packed layer.

A model of vLLM may rearrange what it loads by the tensor's name: transpose every ``.weight``,
permute its rows for another rotary embedding, split it by heads. A packed layer stays right only if
all of its tensors are treated as the weight would be. So each of them, and the weight, is preceded
by a probe of the same shape whose elements name their row and column. Probes arrive at the
parameters' loaders, which record them instead of loading. Where the rows of the weight's probe
arrive in another order than those of a packed tensor, the parameter's loader gives the tensor that
order; all else must be the same in all records of a layer.
"""

from __future__ import annotations

from collections.abc import Hashable
from hashlib import sha256
from typing import NamedTuple, Self

import torch

from .errors import LoadError

__all__ = ["WEIGHT", "Orders", "Recorder", "record"]

Orders = dict[tuple[str, Hashable], torch.Tensor]
"""Of a layer: field and shard -> the rows of an arriving tensor that belong there, int64 [N]."""

WEIGHT = "weight"
"""Name of a layer's 16-bit weight, beside those of its packed tensors."""
_LAYER = 2**28
"""Step between the values of one layer's probes and the next one's; rows and columns are below."""
_CHUNK = 1024
"""Rows that are compared at a time."""


class _Arrival(NamedTuple):
    target: str
    """vLLM's layer."""
    shard: Hashable
    rows: bytes
    """A digest of what names the rows."""
    orders: Orders


_recorders: list[Recorder] = []
"""The recorder of the load in progress."""


def record(tensor: torch.Tensor, field: str, target: str, shard: Hashable, orders: Orders) -> bool:
    """:meth:`Recorder.record` of the load in progress; False if there is none."""
    return bool(_recorders) and _recorders[-1].record(tensor, field, target, shard, orders)


class Recorder:
    """Makes the probes of one load and, as a context, records where and how they arrive."""

    def __init__(self) -> None:
        self._layers: list[str] = []
        self._arrivals: dict[str, dict[str, list[_Arrival]]] = {}
        self._rows: dict[bytes, torch.Tensor] = {}

    def __enter__(self) -> Self:
        _recorders.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _recorders.remove(self)

    def probe(self, layer: str, field: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A float64 tensor of `shape`, [N, C] or [N], for a `field` of the checkpoint's `layer`.

        Element [r, c] is 2 r + c plus the layer's number; the strides overlap, so that a probe
        takes no more memory than a row and a column.
        """
        if layer not in self._arrivals:
            self._layers.append(layer)
            self._arrivals[layer] = {}
        self._arrivals[layer][field] = []
        first = len(self._layers) * _LAYER
        rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
        values = torch.arange(first, first + 2 * rows + columns, dtype=torch.float64, device="cpu")
        return values.as_strided((rows, columns), (2, 1)) if len(shape) > 1 else values[::2][:rows]

    def layer_of(self, tensor: object) -> str | None:
        """The layer whose probe `tensor` is, or a part of; None for a checkpoint's tensor."""
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64:
            return None
        if not tensor.numel() or tensor.is_meta:
            return None
        number = float(tensor[(0,) * tensor.dim()]) / _LAYER
        known = 1 <= number < len(self._layers) + 1
        return self._layers[int(number) - 1] if known else None

    def record(
        self, tensor: torch.Tensor, field: str, target: str, shard: Hashable, orders: Orders
    ) -> bool:
        """Record that `tensor` was loaded into `field` of vLLM's layer `target`, if it is a probe.

        Args:
            tensor: what arrived.
            field: the parameter's name.
            target: vLLM's layer.
            shard: the part of it.
            orders: of the layer; :meth:`check_layer` writes it.

        Raises:
            LoadError: if its columns are not where they were.
        """
        layer = self.layer_of(tensor)
        if layer is None:
            return False
        whole = tensor if tensor.dim() > 1 else tensor.reshape(-1, 1)
        if not _in_order(whole):
            raise _rearranged(layer)
        # without the layer's number: layers of one shape have them in common
        first = torch.remainder(whole[:, 0], _LAYER).to("cpu", torch.int64)
        digest = sha256(first.numpy().tobytes()).digest()
        self._rows.setdefault(digest, first)
        self._arrivals[layer].setdefault(field, []).append(_Arrival(target, shard, digest, orders))
        return True

    def check_layer(self, layer: str) -> None:
        """Compare the probes of `layer` that have arrived, and note the order of their rows.

        Raises:
            LoadError: if they differ in more than the order of their rows.
        """
        arrived = {field: found for field, found in self._arrivals[layer].items() if found}
        wanted = arrived.get(WEIGHT) or next(iter(arrived.values()), [])
        for field, found in arrived.items():
            if [a[:2] for a in found] != [a[:2] for a in wanted]:
                raise _rearranged(layer)
            for has, needs in zip(found, wanted, strict=True):
                self._order(layer, field, has, needs)

    def _order(self, layer: str, field: str, has: _Arrival, needs: _Arrival) -> None:
        """Note the order that the rows of a field need."""
        key = (field, has.shard)
        if has.rows == needs.rows:
            has.orders.pop(key, None)  # of another load
            return
        there, wanted = self._rows[has.rows], self._rows[needs.rows]
        ascending, order = torch.sort(there)
        if ascending.shape != wanted.shape or not torch.equal(ascending, wanted.sort().values):
            raise _rearranged(layer)
        has.orders[key] = order[torch.searchsorted(ascending, wanted)]

    def check(self) -> dict[str, str]:
        """The checkpoint's packed layers, and which of vLLM's layers each was loaded into.

        Raises:
            LoadError: if a layer's weight would be treated in another way than its packed tensors.
        """
        targets: dict[str, str] = {}
        for layer, arrivals in self._arrivals.items():
            self.check_layer(layer)
            counts = {len(of_field) for of_field in arrivals.values()}
            if len(counts) > 1:  # one of them was not loaded anywhere
                raise _rearranged(layer)
            for arrival in next(iter(arrivals.values())):
                targets[layer] = arrival.target
        return targets


def _in_order(probe: torch.Tensor) -> bool:
    """Whether every row of a probe still has all of its columns in their order."""
    if probe.dim() != 2:
        return False
    if probe.stride() == (2, 1) and probe.untyped_storage().nbytes() < 8 * probe.numel():
        return True  # a view of the probe as it was made, or of some of its rows
    columns = torch.arange(probe.shape[1], dtype=torch.float64, device=probe.device)
    return all(torch.equal(part, part[:, :1] + columns) for part in torch.split(probe, _CHUNK))


def _rearranged(layer: str) -> LoadError:
    return LoadError(
        f"{layer}: vLLM's loader of this model rearranges the layer's 16-bit weight in a way that "
        "packed tensors cannot follow; convert the model again and --ignore the layer, or serve "
        "the 16-bit checkpoint with --quantization blockdialect"
    )
