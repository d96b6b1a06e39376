"""A paged key/value cache in the dialect format: its slots, and what an attention over it is given.

Layout (section 12 of the format; ours). Keys after norms and rotary embedding, and values, are rows
of D numbers in the 32-dialect book, blocks of 32, rule ``lut``, window 7. A slot holds those of one
token in one head, D + D/16 + 2 bytes::

    codes of K | codes of V | meta of K | meta of V | R of K | R of V
       D/2          D/2         D/32        D/32        1        1

A cache is a uint8 tensor [blocks, heads, tokens of a block, bytes of a slot]; only its slots need
to be contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from .formatbook import SEMANTIC_32, Formatbook

__all__ = [
    "CACHE_BLOCK",
    "CACHE_BOOK",
    "CACHE_WINDOW",
    "PROBABILITY_CHUNK",
    "Context",
    "KvCache",
    "Scoring",
    "check_attend",
    "check_store",
    "slot_bytes",
]

CACHE_BOOK: Final[Formatbook] = SEMANTIC_32
"""The formatbook of every cache, whatever that of the weights."""
CACHE_BLOCK: Final = 32
"""Elements per block, which divides the head size."""
CACHE_WINDOW: Final = 7
"""The largest delta, that of stored tensors in this book."""
PROBABILITY_CHUNK: Final = 128
"""Keys that share a row exponent where P is rounded, counted from a sequence's first."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def slot_bytes(head_size: int) -> int:
    """Bytes of a slot: a key and a value of `head_size` numbers.

    Raises:
        ValueError: if the head size is no multiple of 32.
    """
    if head_size % CACHE_BLOCK or head_size <= 0:
        raise ValueError(
            f"head_size: {head_size}; a dialect cache needs a multiple of {CACHE_BLOCK}: keep this "
            "layer's cache in 16 bit"
        )
    return head_size + 2 * head_size // CACHE_BLOCK + 2


@dataclass(frozen=True)
class KvCache:
    """A cache, and how rows are changed before they are stored in it.

    Attributes:
        slots: uint8 [blocks, heads, tokens of a block, :func:`slot_bytes` of `head_size`].
        head_size: D.
        rotated: whether keys and values are multiplied by a Hadamard matrix in groups of 32.
        key_mean: float32 [heads, D], subtracted from keys before; None: nothing.
        value_mean: the same for values.

    Raises:
        ValueError: on construction, if these do not fit each other.
    """

    slots: torch.Tensor
    head_size: int
    rotated: bool = True
    key_mean: torch.Tensor | None = None
    value_mean: torch.Tensor | None = None

    def __post_init__(self) -> None:
        size = slot_bytes(self.head_size)
        slots = self.slots
        fits = slots.dtype == torch.uint8 and slots.dim() == 4 and slots.shape[3] == size
        if not fits or (slots.numel() and slots.stride(3) != 1):
            raise ValueError(
                f"slots: {slots.dtype} {list(slots.shape)} with strides {slots.stride()}; for heads"
                f" of {self.head_size} it must be torch.uint8 [blocks, heads, tokens, {size}], "
                "every slot contiguous"
            )
        for name in ("key_mean", "value_mean"):
            mean = getattr(self, name)
            wanted = (torch.float32, (self.heads, self.head_size), slots.device)
            if mean is not None and (mean.dtype, tuple(mean.shape), mean.device) != wanted:
                raise ValueError(
                    f"{name}: {mean.dtype} {list(mean.shape)} on {mean.device}; it must be "
                    f"torch.float32 [{self.heads}, {self.head_size}] on {slots.device}"
                )

    @property
    def heads(self) -> int:
        """Heads of keys and values."""
        return self.slots.shape[1]

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.slots.shape[2]


class Context(NamedTuple):
    """Which queries belong to which sequence, and where its keys and values are; S sequences."""

    query_start: torch.Tensor
    """int32 [S + 1]: sequence s has the queries ``query_start[s]:query_start[s + 1]``, which are
    its last positions."""
    lengths: torch.Tensor
    """int32 [S], positions of each sequence, those of its queries among them."""
    block_table: torch.Tensor
    """int32 [S, most blocks]: position p is in block ``block_table[s, p // tokens of a block]``."""
    causal: torch.Tensor | bool = True
    """Whether a query sees no positions behind its own; bool [S] if sequences differ."""


@dataclass(frozen=True)
class Scoring:
    """What happens to ``q k`` before the softmax.

    Attributes:
        scale: a factor, usually ``1 / sqrt(D)``.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0: they stay.
        window: a query sees so many positions, its own among them (not causal: as many behind it);
            0: all.
        slopes: float32 [query heads], ALiBi: ``slope * (position of the key - of the query)`` is
            added.
        sinks: float32 [query heads], the score of a further key, whose value is 0.
    """

    scale: float
    soft_cap: float = 0.0
    window: int = 0
    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


def check_store(
    cache: KvCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """Raise ValueError unless rows [T, heads, D] of keys and values fit the cache."""
    for name, rows in (("key", key), ("value", value)):
        wanted = (cache.heads, cache.head_size)
        if rows.dim() != 3 or tuple(rows.shape[1:]) != wanted or rows.dtype not in _DTYPES:
            raise ValueError(
                f"{name}: {rows.dtype} {list(rows.shape)}; it must be float32, bfloat16 or float16 "
                f"[T, {cache.heads}, {cache.head_size}]"
            )
    if key.shape[0] != value.shape[0] or key.dtype != value.dtype:
        raise ValueError(
            f"value: {value.dtype}, {value.shape[0]} tokens; it must be as the keys, {key.dtype}, "
            f"{key.shape[0]} tokens"
        )
    if slots.dtype != torch.int64 or tuple(slots.shape) != (key.shape[0],):
        raise ValueError(
            f"slots: {slots.dtype} {list(slots.shape)}; it must be torch.int64 [{key.shape[0]}]"
        )


def check_attend(cache: KvCache, query: torch.Tensor, context: Context, scoring: Scoring) -> None:
    """Raise ValueError unless queries [T, query heads, D] and their contexts fit the cache."""
    fits = query.dim() == 3 and query.shape[2] == cache.head_size and query.dtype in _DTYPES
    if not fits or query.shape[1] % cache.heads:
        raise ValueError(
            f"query: {query.dtype} {list(query.shape)}; it must be float32, bfloat16 or float16 "
            f"[T, a multiple of {cache.heads}, {cache.head_size}]"
        )
    sequences = context.lengths.shape[0]
    shapes = {
        "query_start": (context.query_start, 1, sequences + 1),
        "lengths": (context.lengths, 1, sequences),
        "block_table": (context.block_table, 2, sequences),
    }
    for name, (tensor, dimensions, first) in shapes.items():
        fits = tensor.dtype == torch.int32 and tensor.dim() == dimensions
        if not fits or tensor.shape[0] != first:
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}; it must be torch.int32 with "
                f"{dimensions} dimensions, the first {first}"
            )
    for name in ("slopes", "sinks"):
        given = getattr(scoring, name)
        wanted = (torch.float32, (query.shape[1],))
        if given is not None and (given.dtype, tuple(given.shape)) != wanted:
            raise ValueError(
                f"{name}: {given.dtype} {list(given.shape)}; it must be torch.float32 "
                f"[{query.shape[1]}]"
            )
