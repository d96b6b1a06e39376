"""Products whose launches are bound: of the same shapes again, only memory and streams are new.

The first product of a kind is computed as any other, and its launches are noted. The next one takes
fresh memory for whatever was not given to it, and hands the compiled kernels the noted arguments
with the new tensors in their places::

    dialect_linear(x, p, bias)  ->  plan, operands, launches     noted: kernels, grids, numbers
    dialect_linear(x', p', bias')  ->  launches, with x', p', bias' and fresh q, scale, y

No tensor of a model is kept, so that weights may move; tables, which an engine finds while they are
kept, are. Inputs that would have been copied, and what a profiler watches, take the ordinary way.
Where Triton's own launch differs from what is written here nothing is bound. (Ours.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..device_tables import is_kept
from ..packed import PackedTensor
from .launch import MISALIGNED, BoundLaunch, Launched, bind, current_stream, recorded, watched

__all__ = ["product"]

_MOST = 4096
"""Kinds of products that are remembered."""

_Compute = Callable[[], torch.Tensor]
_products: dict[tuple[object, ...], _BoundProduct | None] = {}


def product(
    tokens: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    activation_format: str,
    compute: _Compute,
) -> torch.Tensor:
    """``tokens @ p.T + bias`` as `compute` gives it, by bound launches where that is possible.

    Args:
        tokens: [T, K], T > 0.
        p: packed weight [N, K], N > 0.
        bias: [N] or None.
        activation_format: as for :func:`~.linear.dialect_linear`.
        compute: the ordinary way, which depends on nothing but shapes, dtypes, device and format.
    """
    codes, meta, row_exponent = p.tensors
    addresses = tokens.data_ptr() | codes.data_ptr() | meta.data_ptr() | row_exponent.data_ptr()
    readable = tokens.is_contiguous()
    if bias is not None:
        addresses |= bias.data_ptr()
        readable = readable and bias.is_contiguous()
    if not readable or addresses & MISALIGNED or watched():
        return compute()
    key = (
        tokens.shape,
        tokens.dtype,
        tokens.device,
        p.shape,
        p.book.name,
        p.block_size,
        p.rotation,
        activation_format,
        None if bias is None else bias.dtype,
    )
    given = (tokens, codes, meta, row_exponent, bias)
    if key in _products:
        bound = _products[key]
        return compute() if bound is None else bound(given)
    with recorded() as launches:
        y = compute()
    if launches:  # there are none in Triton's interpreter, nor where a library multiplies alone
        if len(_products) >= _MOST:
            _products.clear()
        _products[key] = _bound(launches, given, y)
    return y


class _BoundProduct:
    """A product of a kind that was computed before."""

    def __init__(
        self,
        launches: list[BoundLaunch],
        fresh: list[tuple[torch.Size, torch.dtype, bool]],
        device: torch.device,
    ) -> None:
        """Launches that take what a product is given, then fresh memory, the result the first.

        Args:
            launches: in their order.
            fresh: shape and dtype, and whether it must hold zeros.
            device: of all tensors.
        """
        self._launches = launches
        self._fresh = fresh
        self._device = device

    def __call__(self, given: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        """The product."""
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
        return fresh[0]


def _bound(
    launches: list[Launched], given: tuple[torch.Tensor | None, ...], y: torch.Tensor
) -> _BoundProduct | None:
    """What a product has launched, bound; None if not all of it can be.

    Memory is recognized by its address: operands are written as bytes and read as numbers.
    """
    places = {t.data_ptr(): index for index, t in enumerate(given) if t is not None}
    fresh = [y]
    places[y.data_ptr()] = len(given)
    for launched in launches:
        for argument in launched.arguments:
            if not isinstance(argument, torch.Tensor) or is_kept(argument):
                continue
            if argument.data_ptr() not in places:
                places[argument.data_ptr()] = len(given) + len(fresh)
                fresh.append(argument)
    bound = [bind(launched, places) for launched in launches]
    if None in bound or not any(y.data_ptr() == a for a in _addresses(launches[-1])):
        return None
    # counters are integers; a quantizer, which is a launch before the product, clears them
    made = [(t.shape, t.dtype, t.dtype == torch.int32 and len(bound) == 1) for t in fresh]
    return _BoundProduct([each for each in bound if each is not None], made, y.device)


def _addresses(launched: Launched) -> list[int]:
    return [a.data_ptr() for a in launched.arguments if isinstance(a, torch.Tensor)]
