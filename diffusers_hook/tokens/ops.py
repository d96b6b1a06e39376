"""The ops that quantized transformers run: opaque to compilers, plain Python inside.

``semantic_dialect::linear`` looks up which rows of its input are salient and how they are grouped,
and calls the ground floor's linear layer; ``semantic_dialect::observe`` sees the queries and keys
of a block's attention. Both find the block through its slot, see
:mod:`diffusers_hook.tokens.block_state`.
"""

from __future__ import annotations

import torch

from dialect_kernels.ops import linear as dialect_op
from dialect_kernels.ops import semantic_op

from ..layouts.layouts import Stream
from .block_state import state_of

__all__ = ["linear", "observe"]

# Both ops say that they write the slot, so that compilers keep their order: a layer before its
# block's attention must not see the salient tokens that the attention is about to choose.
# torch.library is not annotated
_library = torch.library.Library("semantic_dialect", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor codes, Tensor meta, Tensor row_exponent, Tensor? bias, "
    "Tensor(a!) slot, SymInt in_features, str book, int block_size, str activation, "
    "str stream) -> Tensor"
)
_library.define(  # type: ignore[no-untyped-call]
    "observe(Tensor query, Tensor key, Tensor? mask, Tensor(a!) slot, float? scale) -> ()"
)

linear = torch.ops.semantic_dialect.linear
"""``x @ weight.T + bias``, [..., K] -> [..., N], with the slot's salient rows and groups."""

observe = torch.ops.semantic_dialect.observe
"""Show an attention's queries and keys [rows, heads, tokens, head dim] to the slot's block."""


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
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
    activation: str,
    stream: str,
) -> torch.Tensor:
    weight = (codes, meta, row_exponent, bias, in_features, book, block_size)
    state = state_of(slot)
    if state is None:
        return dialect_op(x, *weight, activation, "default")
    count = x.numel() // in_features
    rows = state.rows(Stream(stream), count, x.device)
    with state.model.clock("linear layers"):
        if rows.salient is None and rows.group is None:
            return dialect_op(x, *weight, activation, "default")
        samples = x.reshape(rows.batch, rows.tokens, in_features)
        y = semantic_op(samples, *weight, rows.salient, rows.group)
        return y.view(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("semantic_dialect::linear", lib=_library)
def _linear_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    bias: torch.Tensor | None,
    slot: torch.Tensor,
    in_features: int,
    book: str,
    block_size: int,
    activation: str,
    stream: str,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.impl(_library, "observe", "CompositeExplicitAutograd")
def _observe(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    slot: torch.Tensor,
    scale: float | None,
) -> None:
    slot[1] += 1  # nobody reads it; it makes true that the op writes the slot
    state = state_of(slot)
    if state is not None:
        state.observe(query, key, mask, scale)


@torch.library.register_fake("semantic_dialect::observe", lib=_library)
def _observe_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    slot: torch.Tensor,
    scale: float | None,
) -> None:
    return None
