"""The ops that quantized transformers run: opaque to compilers, plain Python inside.

``semantic_dialect::linear`` looks up which rows of its input are salient and how they are grouped,
and calls the ground floor's linear layer; ``semantic_dialect::observe`` sees the queries and keys
of a block's attention. Both find the block through its slot, see
:mod:`diffusers_hook.tokens.block_state`.
"""

from __future__ import annotations

from typing import Any

import torch

from dialect_kernels.ops import linear as dialect_op
from dialect_kernels.ops import semantic_op

from ..attention.attention import Attention
from ..layouts import Stream
from .block_state import state_of

__all__ = ["linear", "observe"]


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
    state = state_of(slot)
    if state is None:
        return dialect_op(x, *weight, activation_format, "default", rotation)
    count = x.numel() // in_features
    rows = state.rows(Stream(stream), count, x.device)
    with state.meter.clock("linear layers"):
        if rows.salient is None and rows.group is None:
            form = "fp8" if rows.in_fp8 else activation_format
            return dialect_op(x, *weight, form, "default", rotation)
        samples = x.reshape(rows.batch, rows.tokens, in_features)
        y = semantic_op(samples, *weight, rows.salient, rows.group, rotation)
        return y.view(*x.shape[:-1], codes.shape[0])


def _linear_fake(x: torch.Tensor, codes: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


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

observe = _op("observe", _observe, _observe_fake)
"""Show an attention's queries and keys [rows, heads, tokens, head dim] to the slot's block."""
