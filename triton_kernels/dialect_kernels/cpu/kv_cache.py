"""The entry points of the CPU kernel for a dialect KV cache, called through ctypes."""

from __future__ import annotations

import ctypes
from functools import cache as cached

import torch

from ..kv_cache import CACHE_BOOK, Context, KvCache, Scoring
from .calls import DTYPES, book_tables
from .library import call, instructions_or_best, threads_or_torch

__all__ = ["attend", "store"]

_LINE = 64
"""Bytes of a cache line."""


def store(
    cache: KvCache,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    threads: int | None = None,
    instructions: str | None = None,
) -> None:
    """The bytes of ``reference_attention.store``.

    Args:
        cache: on CPU; written to.
        key: float32, bfloat16 or float16 [T, heads, D] on CPU; only rows need to be contiguous.
        value: the same.
        slots: int64 [T]; -1: the token has none. Others are not checked.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`~.library.features`.
    """
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    slots = slots.contiguous()
    rows = _KvRows(
        key.data_ptr(),
        value.data_ptr(),
        *(key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        slots.data_ptr(),
        key.shape[0],
        DTYPES[key.dtype],
    )
    call(
        "dialect_cache_store",
        ctypes.byref(_kv_cache(cache)),
        ctypes.byref(rows),
        ctypes.byref(book_tables(CACHE_BOOK)),
        threads_or_torch(threads),
        instructions_or_best(instructions),
    )


def attend(
    cache: KvCache,
    query: torch.Tensor,
    context: Context,
    scoring: Scoring,
    out: torch.Tensor | None = None,
    threads: int | None = None,
    instructions: str | None = None,
    dialect_attention: bool = False,
) -> torch.Tensor:
    """``reference_attention.attend``, but for the order and the rounding of its sums.

    The result is the same whatever the number of threads, and for a sequence whatever the others
    of the call.

    Args:
        cache: on CPU.
        query: float32, bfloat16 or float16 [T, query heads, D] on CPU.
        context: as there; lengths and blocks are not checked.
        scoring: as there.
        out: the result is written here; default: a new tensor.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`~.library.features`.
        dialect_attention: as there.
    """
    query = query if query.stride(2) == 1 else query.contiguous()
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device="cpu")
    sequences = context.lengths.shape[0]
    causal = context.causal
    if not isinstance(causal, torch.Tensor):
        causal = torch.full((sequences,), causal)
    kept = [
        context.query_start.contiguous(),
        context.lengths.contiguous(),
        context.block_table if context.block_table.stride(1) == 1 else _dense(context.block_table),
        causal.to(torch.uint8).contiguous(),
    ]
    slopes, sinks = (None if x is None else x.contiguous() for x in (scoring.slopes, scoring.sinks))
    attention = _Attention(
        query.data_ptr(),
        out.data_ptr(),
        *(query.stride(0), query.stride(1), out.stride(0), out.stride(1)),
        *(kept[0].data_ptr(), kept[1].data_ptr(), kept[2].data_ptr(), kept[2].stride(0)),
        kept[3].data_ptr(),
        None if slopes is None else slopes.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        *(sequences, query.shape[1], DTYPES[query.dtype], scoring.window),
        *(scoring.scale, scoring.soft_cap, int(dialect_attention)),
    )
    call(
        "dialect_cache_attend",
        ctypes.byref(_kv_cache(cache)),
        ctypes.byref(attention),
        ctypes.byref(book_tables(CACHE_BOOK)),
        _words().data_ptr(),
        threads_or_torch(threads),
        instructions_or_best(instructions),
    )
    return out


class _KvCache(ctypes.Structure):
    """A cache; the same layout as `KvCache` in kv_cache.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("slot_stride", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("rotated", ctypes.c_int32),
        ("key_mean", ctypes.c_void_p),
        ("value_mean", ctypes.c_void_p),
    )


class _KvRows(ctypes.Structure):
    """New rows; the same layout as `KvRows` in kv_cache.h."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_token_stride", ctypes.c_int64),
        ("key_head_stride", ctypes.c_int64),
        ("value_token_stride", ctypes.c_int64),
        ("value_head_stride", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class _Attention(ctypes.Structure):
    """A call; the same layout as `Attention` in kv_attention.h."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("query_token_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("out_token_stride", ctypes.c_int64),
        ("out_head_stride", ctypes.c_int64),
        ("query_start", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("causal", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("rounded", ctypes.c_int32),
    )


def _kv_cache(cache: KvCache) -> _KvCache:
    means = (None if x is None else x.data_ptr() for x in (cache.key_mean, cache.value_mean))
    return _KvCache(
        cache.slots.data_ptr(),
        *cache.slots.stride()[:3],
        cache.block_tokens,
        cache.heads,
        cache.head_size,
        int(cache.rotated),
        *means,
    )


def _dense(table: torch.Tensor) -> torch.Tensor:
    return table.contiguous()


@cached
def _words() -> torch.Tensor:
    """The numbers of every meta byte's codes in bfloat16, as the kernel reads them."""
    memory = torch.empty(256 * 16 * 2 + _LINE, dtype=torch.uint8, device="cpu")
    words = memory[-memory.data_ptr() % _LINE :]
    call("dialect_cache_words", ctypes.byref(book_tables(CACHE_BOOK)), words.data_ptr())
    return words
