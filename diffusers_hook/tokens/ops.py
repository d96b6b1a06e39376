"""The ops that quantized transformers run: opaque to compilers, plain Python inside.

``semantic_dialect::linear`` looks up which rows of its input are salient and how they are grouped,
and calls the ground floor's linear layer; ``semantic_dialect::linears`` does so for several layers
that read the same input; ``semantic_dialect::observe`` sees the queries and keys of a block's
attention. All find the block through its slot, see :mod:`diffusers_hook.tokens.block_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import torch

from dialect_kernels import PackedTensor
from dialect_kernels.ops import linear as dialect_op
from dialect_kernels.ops import linears as linears_of_one_input
from dialect_kernels.ops import semantic_op

from ..attention.attention import Attention
from ..layouts import Stream
from .block_state import state_of
from .token_rows import Rows

__all__ = ["linear", "linears", "observe"]

_Y = TypeVar("_Y")


def _with_rows(
    multiply: Callable[[torch.Tensor, str, Rows | None], _Y],
    x: torch.Tensor,
    slot: torch.Tensor,
    in_features: int,
    activation_format: str,
    stream: str,
    layers: int = 1,
) -> _Y:
    """What `multiply` gives for the input of some layers of a block.

    Args:
        multiply: (the input [..., K], its format, None), or where rows are salient or in groups
            (the input [B, T, K], ``"dialect"``, these rows) -> the products.
        x: the input [..., K].
        slot: of the block.
        in_features: K.
        activation_format: the layers'; a protected step may have another one.
        stream: the tokens that the rows of `x` are.
        layers: how many layers read it.
    """
    state = state_of(slot)
    if state is None:
        return multiply(x, activation_format, None)
    count = x.numel() // in_features
    for _ in range(layers):  # the rows of each are counted
        rows = state.rows(Stream(stream), count, x.device)
    with state.meter.clock("linear layers"):
        if rows.salient is None and rows.group is None:
            return multiply(x, "fp8" if rows.in_fp8 else activation_format, None)
        samples = x.reshape(rows.batch, rows.tokens, in_features)
        return multiply(samples, "dialect", rows)


def _linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    bias: torch.Tensor | None,
    slot: torch.Tensor,
    in_features: int,
    book: str,
    block_size: int,
    activation_format: str,
    stream: str,
    rotation: str = "none",
) -> torch.Tensor:
    weight = (codes, meta, row_exponent, bias, in_features, book, block_size)

    def product(x: torch.Tensor, form: str, rows: Rows | None) -> torch.Tensor:
        y: torch.Tensor
        if rows is None:
            y = dialect_op(x, *weight, form, "default", rotation)
        else:
            y = semantic_op(x, *weight, rows.salient, rows.group, rotation)
        return y

    y = _with_rows(product, x, slot, in_features, activation_format, stream)
    return y.view(*x.shape[:-1], codes.shape[0])


def _linear_fake(x: torch.Tensor, codes: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _linears(
    x: torch.Tensor,
    codes: list[torch.Tensor],
    meta: list[torch.Tensor],
    row_exponent: list[torch.Tensor],
    bias: list[torch.Tensor],
    slot: torch.Tensor,
    in_features: int,
    book: str,
    block_size: int,
    activation_format: str,
    stream: str,
    rotation: str = "none",
) -> list[torch.Tensor]:
    packed = [
        PackedTensor.from_op(*tensors, in_features, book, block_size, rotation)
        for tensors in zip(codes, meta, row_exponent, strict=True)
    ]
    weights = list(zip_longest(packed, bias))

    def products(x: torch.Tensor, form: str, rows: Rows | None) -> Sequence[torch.Tensor]:
        if rows is None:
            return linears_of_one_input(x, weights, form)
        return linears_of_one_input(x, weights, form, rows.salient, rows.group)

    found = _with_rows(products, x, slot, in_features, activation_format, stream, len(weights))
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in found]


def _linears_fake(x: torch.Tensor, codes: Sequence[torch.Tensor], *_: object) -> list[torch.Tensor]:
    return [x.new_empty(*x.shape[:-1], each.shape[0]) for each in codes]


def _observe(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    slot: torch.Tensor,
    scale: float | None,
) -> None:
    slot[1] += 1  # never read; the schema says that the op writes the slot, so it must
    state = state_of(slot)
    if state is not None:
        state.observe(Attention.checked(query, key, mask, scale))


def _observe_fake(*_: object) -> None:
    return None


_library = torch.library.Library("semantic_dialect", "DEF")  # type: ignore[no-untyped-call]


def _op(name: str, run: Any, fake: Any) -> Any:
    """An op of this library whose schema is that of the annotations of `run`.

    It says that it writes the slot, so that compilers keep the order of ops: a layer before its
    block's attention must not see the salient tokens that the attention is about to choose.
    """
    schema = torch.library.infer_schema(run, mutates_args={"slot"})
    _library.define(name + schema)  # type: ignore[no-untyped-call]
    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{_library.ns}::{name}", fake, lib=_library)
    return getattr(torch.ops.semantic_dialect, name)


linear = _op("linear", _linear, _linear_fake)
"""``x @ weight.T + bias``, [..., K] -> [..., N], with the slot's salient rows and groups."""

linears = _op("linears", _linears, _linears_fake)
"""What `linear` gives for each of several weights, biases of all of them or none."""

observe = _op("observe", _observe, _observe_fake)
"""Show an attention's queries and keys [rows, heads, tokens, head dim] to the slot's block."""
