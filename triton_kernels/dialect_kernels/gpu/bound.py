"""Computations whose launches are bound: of the same shapes again, only memory and streams are new.

The first computation of a kind runs as any other, and its launches are noted. The next one takes
fresh memory for whatever was not given to it, and hands the compiled kernels the noted arguments
with the new tensors in their places::

    dialect_linear(x, p, bias)  ->  plan, operands, launches     noted: kernels, grids, numbers
    dialect_linear(x', p', bias')  ->  launches, with x', p', bias' and fresh q, scale, y

No tensor of a model is kept, so that weights may move; tables, which an engine finds while they are
kept, are. Inputs that would have been copied, and what a profiler watches, take the ordinary way.
Where Triton's own launch differs from what is written here nothing is bound. (Ours.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from ..device_tables import is_kept
from ..packed import PackedTensor
from .launch import (
    MISALIGNED,
    BoundLaunch,
    Launched,
    Record,
    bind,
    current_stream,
    recorded,
    recording,
    watched,
)

__all__ = ["results"]

_MOST = 4096
"""Kinds of computations that are remembered."""

_Given = tuple[torch.Tensor | None, ...]
_Results = tuple[torch.Tensor, ...]
_bound: dict[tuple[Hashable, ...], _Bound | None] = {}


def results(
    p: PackedTensor, given: _Given, facts: tuple[Hashable, ...], compute: Callable[[], _Results]
) -> _Results:
    """What `compute` returns, by bound launches where that is possible.

    Args:
        p: a packed weight [N, K], N > 0.
        given: all other tensors that are read; None for those that are not there.
        facts: what is computed, and the numbers that it depends on.
        compute: the ordinary way. It depends on nothing but the facts, on shapes, dtypes and
            device, and does nothing but launch kernels of ours, on memory that was given, is a
            table or is new; `zeroed` where it has to hold zeros. What a library computes is
            noticed and not bound.
    """
    codes, meta, row_exponent = p.tensors
    addresses = codes.data_ptr() | meta.data_ptr() | row_exponent.data_ptr()
    key = [*facts, codes.device, p.shape, p.book.name, p.block_size, p.rotation]
    for tensor in given:
        if tensor is None:
            key.append(None)
            continue
        if not tensor.is_contiguous():
            return compute()
        addresses |= tensor.data_ptr()
        key += (tensor.shape, tensor.dtype)
    if addresses & MISALIGNED or watched() or recording():
        return compute()
    kind = tuple(key)
    if kind in _bound:
        bound = _bound[kind]
        return compute() if bound is None else bound((codes, meta, row_exponent, *given))
    with recorded() as record:
        made = compute()
    if record.launches:  # there are none in Triton's interpreter, nor where a library works alone
        if len(_bound) >= _MOST:
            _bound.clear()
        _bound[kind] = _bind(record, (codes, meta, row_exponent, *given), made)
    return made


class _Bound:
    """A computation of a kind that was done before."""

    def __init__(
        self,
        launches: list[BoundLaunch],
        fresh: list[tuple[torch.Size, torch.dtype, bool]],
        returned: int,
        device: torch.device,
    ) -> None:
        """Launches that take what a computation is given, then fresh memory.

        Args:
            launches: in their order.
            fresh: shape and dtype, and whether it must hold zeros.
            returned: how many of them, the first ones, are the results.
            device: of all tensors.
        """
        self._launches = launches
        self._fresh = fresh
        self._returned = returned
        self._device = device

    def __call__(self, given: _Given) -> _Results:
        """The results."""
        device = self._device
        fresh = [
            torch.zeros(shape, dtype=dtype, device=device)
            if zeros
            else torch.empty(shape, dtype=dtype, device=device)
            for shape, dtype, zeros in self._fresh
        ]
        tensors = (*given, *fresh)
        stream = current_stream(device)
        for launch in self._launches:
            launch(stream, tensors)
        return tuple(fresh[: self._returned])


def _bind(record: Record, given: _Given, made: _Results) -> _Bound | None:
    """What a computation has launched, bound; None if not all of it can be.

    Memory is recognized by its address: operands are written as bytes and read as numbers.
    """
    places = {t.data_ptr(): index for index, t in enumerate(given) if t is not None}
    fresh: list[torch.Tensor] = []
    written = {a.data_ptr() for launched in record.launches for a in _tensors(launched)}
    for tensor in (*made, *(a for launched in record.launches for a in _tensors(launched))):
        if tensor.data_ptr() not in places and not is_kept(tensor):
            places[tensor.data_ptr()] = len(given) + len(fresh)
            fresh.append(tensor)
    bound = [bind(launched, places) for launched in record.launches]
    if None in bound or any(tensor.data_ptr() not in written for tensor in made):
        return None
    zeros = {tensor.data_ptr() for tensor in record.zeros}
    return _Bound(
        [each for each in bound if each is not None],
        [(t.shape, t.dtype, t.data_ptr() in zeros) for t in fresh],
        len(made),
        made[0].device,
    )


def _tensors(launched: Launched) -> list[torch.Tensor]:
    return [a for a in launched.arguments if isinstance(a, torch.Tensor)]
