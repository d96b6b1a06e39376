"""A dialect KV cache and attention over it: kernels where they serve, else plain torch."""

from __future__ import annotations

import torch

from . import cpu, gpu, reference_attention
from .cpu import kv_cache as compiled
from .kv_cache import Context, KvCache, Scoring, check_attend, check_store

__all__ = ["attend", "store", "warm_up"]


def store(cache: KvCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Quantize rows of keys and values into their slots.

    Args:
        cache: written to.
        key: float32, bfloat16 or float16 [T, heads, D], on the cache's device.
        value: the same.
        slots: int64 [T], block * tokens of a block + place in the block; -1: the token has none.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    check_store(cache, key, value, slots)
    if cpu.runs_on(cache.slots.device):
        compiled.store(cache, key, value, slots)
    elif gpu.runs_on(cache.slots.device):
        gpu.store(cache, key, value, slots)
    else:
        reference_attention.store(cache, key, value, slots)


def attend(
    cache: KvCache,
    query: torch.Tensor,
    context: Context,
    scoring: Scoring,
    out: torch.Tensor | None = None,
    dialect_attention: bool = False,
) -> torch.Tensor:
    """Attention of the newest positions of some sequences over their contexts in the cache.

    Rows of the cache are decoded a few at a time: no 16-bit copy of it is ever made.

    Args:
        cache: holds the rows of all positions that a query sees.
        query: float32, bfloat16 or float16 [T, query heads, D], sequences one after another, on the
            cache's device.
        context: which queries belong to which sequence, and where its rows are.
        scoring: what happens to ``q k``.
        out: as `query`; the result is written here. Default: a new tensor.
        dialect_attention: whether queries and probabilities are rounded, too, so that both products
            have two operands in the format (section 12, full path).

    Returns:
        [T, query heads, D] in the query's dtype. A query that sees a row that was stored with NaN
        or Inf gives NaN.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    check_attend(cache, query, context, scoring)
    if cpu.runs_on(cache.slots.device):
        return compiled.attend(
            cache, query, context, scoring, out, dialect_attention=dialect_attention
        )
    if gpu.runs_on(cache.slots.device):
        return gpu.attend(cache, query, context, scoring, out, dialect_attention)
    found = reference_attention.attend(cache, query, context, scoring, dialect_attention)
    return found if out is None else out.copy_(found)


def warm_up(
    cache: KvCache,
    heads: int,
    dtype: torch.dtype,
    scoring: Scoring,
    dialect_attention: bool = False,
) -> None:
    """Compile the kernels of a GPU for such a cache, so that none is compiled while serving.

    Args:
        cache: with at least one block, whose first slot is written over.
        heads: query heads.
        dtype: of queries, keys and values.
        scoring: of the layer.
        dialect_attention: as for :func:`attend`.
    """
    if not cpu.runs_on(cache.slots.device) and gpu.runs_on(cache.slots.device):
        gpu.warm_up_cache(cache, heads, dtype, scoring, dialect_attention)
