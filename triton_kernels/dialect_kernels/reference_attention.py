"""A dialect KV cache and attention over it in plain torch: what kernels are compared with.

Follows section 12 of docs/reference/format.md. Stored bytes are exact; outputs of an attention are
computed in float32 from the decoded rows and compared by tolerance.
"""

from __future__ import annotations

import math

import torch

from .formatbook import NAN_ROW
from .kv_cache import (
    CACHE_BLOCK,
    CACHE_BOOK,
    CACHE_WINDOW,
    PROBABILITY_CHUNK,
    Context,
    KvCache,
    Scoring,
)
from .packed import PackedTensor
from .reference import pack_rounded, round_activation
from .rotation import rotate_activation, rotate_weight

__all__ = ["attend", "read", "store"]

_LOG2_E = math.log2(math.e)


def store(cache: KvCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Quantize rows of keys and values into their slots.

    Args:
        cache: written to.
        key: float32, bfloat16 or float16 [T, heads, D].
        value: the same.
        slots: int64 [T], block * tokens of a block + place in the block; -1: the token has none.
    """
    kept = slots >= 0
    block = slots[kept] // cache.block_tokens
    place = slots[kept] % cache.block_tokens
    keys = _pack(cache, key[kept], cache.key_mean)
    values = _pack(cache, value[kept], cache.value_mean)
    parts = [part for pair in zip(keys, values, strict=True) for part in pair]
    # indexed by two tensors with a slice between them: [T, heads, bytes]
    cache.slots[block, :, place] = torch.cat(parts, dim=-1)


def read(cache: KvCache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some slots as they are stored: rotated, without the means.

    Args:
        cache: the cache.
        slots: int64 [T], as for :func:`store`, none of them -1.

    Returns:
        Two float32 tensors [T, heads, D]; a row that held NaN, Inf or overflowed is NaN.
    """
    bytes_ = cache.slots[slots // cache.block_tokens, :, slots % cache.block_tokens]
    half, blocks = cache.head_size // 2, cache.head_size // CACHE_BLOCK
    sizes = [half, half, blocks, blocks, 1, 1]
    key_codes, value_codes, key_meta, value_meta, key_exponent, value_exponent = (
        part.flatten(0, 1).contiguous() for part in torch.split(bytes_, sizes, dim=-1)
    )
    shape = (slots.shape[0], cache.heads, cache.head_size)
    key = _unpack(key_codes, key_meta, key_exponent).view(shape)
    return key, _unpack(value_codes, value_meta, value_exponent).view(shape)


def _round_probabilities(
    weights: torch.Tensor, exponents: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round P of the full path, before the softmax divides by its sum (section 12; ours).

    A chunk of 128 keys, from the first on, is a row of its own: P is multiplied by
    ``2**(R - R_max)``, R the row exponent of the key's value and R_max the largest of those that
    the query sees, and rounded in blocks of 32 keys.

    Args:
        weights: float32 [rows, keys], powers of two from 0 to 1.
        exponents: integers [rows, keys], R; -128 where the value is NaN.
        seen: bool [rows, keys]; what is not seen is 0, whatever stands there.

    Returns:
        What the values over ``2**R`` are multiplied by, float32 [rows, keys], NaN in a chunk with
        NaN; and R_max, int64 [rows, keys / 128 rounded up].
    """
    rows, keys = weights.shape
    chunks = -(-keys // PROBABILITY_CHUNK)
    r = torch.full((rows, chunks * PROBABILITY_CHUNK), NAN_ROW, device=weights.device)
    r[:, :keys] = torch.where(seen, exponents.to(torch.int64), NAN_ROW)
    most = r.view(rows, chunks, -1).amax(dim=-1)
    shift = (r - most.repeat_interleave(PROBABILITY_CHUNK, dim=1)).to(torch.float64)
    p = torch.zeros(r.shape, dtype=torch.float64, device=weights.device)
    p[:, :keys] = torch.where(seen, weights.to(torch.float64), 0.0)
    scaled = (p * torch.exp2(shift)).to(torch.float32).view(-1, PROBABILITY_CHUNK)
    rounded = round_activation(scaled, CACHE_BOOK, CACHE_BLOCK)
    return rounded.view(rows, -1)[:, :keys], most


def attend(
    cache: KvCache,
    query: torch.Tensor,
    context: Context,
    scoring: Scoring,
    dialect_attention: bool = False,
) -> torch.Tensor:
    """Attention of the newest positions of some sequences over their contexts in the cache.

    Args:
        cache: holds the rows of all positions that a query sees.
        query: float32, bfloat16 or float16 [T, query heads, D], sequences one after another.
        context: which queries belong to which sequence, and where its rows are.
        scoring: what happens to ``q k``.
        dialect_attention: whether Q and P are rounded, too (the full path of section 12).

    Returns:
        [T, query heads, D] in the query's dtype. A query that sees a row of NaN gives NaN.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    starts = context.query_start.tolist()
    for sequence, length in enumerate(context.lengths.tolist()):
        part = slice(starts[sequence], starts[sequence + 1])
        causal = context.causal
        if isinstance(causal, torch.Tensor):
            causal = bool(causal[sequence])
        position = torch.arange(length, device=query.device)
        block = context.block_table[sequence].to(torch.int64)[position // cache.block_tokens]
        slots = block * cache.block_tokens + position % cache.block_tokens
        rows = read(cache, slots)
        exponents = _value_exponents(cache, slots) if dialect_attention else None
        out[part] = _attend_one(cache, query[part], *rows, exponents, causal, scoring)
    return out


def _attend_one(
    cache: KvCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    exponents: torch.Tensor | None,
    causal: bool,
    scoring: Scoring,
) -> torch.Tensor:
    """One sequence: query [n, query heads, D], key and value [length, heads, D].

    With the exponents of the values [length, heads], Q and P are rounded.
    """
    group = query.shape[1] // cache.heads
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    seen, scores = _scores(cache, query, key, exponents is not None, causal, scoring)
    largest = scores.amax(dim=-1, keepdim=True)
    sinks = None if scoring.sinks is None else scoring.sinks[:, None, None] * _LOG2_E
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    if exponents is not None:
        largest = largest.ceil()
    weights = torch.exp2(scores - largest.masked_fill(largest == -math.inf, 0.0))
    total = weights.sum(dim=-1, keepdim=True)
    seen_weight = total
    if sinks is not None:
        total = total + torch.exp2(sinks - largest)
    share = (seen_weight / total).masked_fill(total == 0, 0.0)
    if exponents is not None:
        exponents = exponents.repeat_interleave(group, dim=1)
    products = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    for i in range(query.shape[0]):
        if exponents is None:
            products[i] = _weighted(weights[:, i], value, seen[i])
        else:
            products[i] = _rounded_weighted(weights[:, i], value, exponents, seen[i])
    out = products / total.permute(1, 0, 2).masked_fill(total.permute(1, 0, 2) == 0, 1.0)
    if cache.rotated:
        out = rotate_activation(out)
    if cache.value_mean is not None:
        mean = cache.value_mean.repeat_interleave(group, dim=0)
        out = out + mean * share.permute(1, 0, 2)
    return out.to(query.dtype)


def _scores(
    cache: KvCache,
    query: torch.Tensor,
    key: torch.Tensor,
    rounded: bool,
    causal: bool,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is seen, bool [n, length], and exponents of 2, [query heads, n, length]."""
    q = rotate_activation(query) if cache.rotated else query
    q = round_activation(q, CACHE_BOOK, CACHE_BLOCK) if rounded else q.to(query.dtype)
    scores = torch.einsum("qhd,khd->hqk", q.to(torch.float32), key) * scoring.scale
    if cache.key_mean is not None and (scoring.soft_cap or scoring.sinks is not None):
        mean = cache.key_mean.repeat_interleave(query.shape[1] // cache.heads, dim=0)
        shift = (query.to(torch.float32) * mean).sum(dim=-1) * scoring.scale
        scores = scores + shift.T[:, :, None]
    if scoring.soft_cap:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    behind = (
        torch.arange(key.shape[0], device=query.device)[None, :]
        - torch.arange(key.shape[0] - query.shape[0], key.shape[0], device=query.device)[:, None]
    )  # position of the key - of the query
    if scoring.slopes is not None:
        scores = scores + scoring.slopes[:, None, None] * behind
    seen = torch.ones_like(behind, dtype=torch.bool)
    if causal:
        seen &= behind <= 0
    if scoring.window:
        seen &= behind.abs() < scoring.window
    # selected, never multiplied by 0: what is not seen may hold anything
    return seen, torch.where(seen, scores, -math.inf) * _LOG2_E


def _weighted(weights: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Sums [query heads, D] of the values that one query sees, [length, query heads, D]."""
    return torch.einsum("hk,khd->hd", weights[:, seen], value[seen])


def _rounded_weighted(
    weights: torch.Tensor, value: torch.Tensor, exponents: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """As `_weighted`, with rounded weights; exponents [length, query heads] of the values."""
    rounded, most = _round_probabilities(weights, exponents.T, seen.expand(weights.shape))
    relative = value.to(torch.float64) * torch.exp2(-exponents.to(torch.float64))[:, :, None]
    relative = relative.to(torch.float32)
    out = torch.zeros(value.shape[1:], dtype=torch.float32, device=value.device)
    for chunk in range(most.shape[1]):
        part = slice(chunk * PROBABILITY_CHUNK, (chunk + 1) * PROBABILITY_CHUNK)
        chosen = seen[part]
        if chosen.any():
            product = _weighted(rounded[:, part], relative[part], chosen)
            out += torch.ldexp(product, most[:, chunk, None])
    return out


def _value_exponents(cache: KvCache, slots: torch.Tensor) -> torch.Tensor:
    """Row exponents of the values of some slots, int64 [T, heads]."""
    last = cache.slots[slots // cache.block_tokens, :, slots % cache.block_tokens, -1]
    return last.contiguous().view(torch.int8).to(torch.int64)


def _pack(
    cache: KvCache, rows: torch.Tensor, mean: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, meta and row exponents of [T, heads, D], each uint8 [T, heads, ...]."""
    x = rows.to(torch.float32)
    if mean is not None:
        x = x - mean
    x = x.flatten(0, 1)
    if cache.rotated:
        x = rotate_weight(x)
    finite = x.isfinite().all(dim=1)
    clean = torch.where(finite[:, None], x, 0.0)
    p = pack_rounded(clean, CACHE_BOOK, CACHE_BLOCK, "lut", CACHE_WINDOW, "none")
    exponent = p.row_exponent.masked_fill(~finite, NAN_ROW).view(torch.uint8)[:, None]
    codes, meta, stored = (part.view(*rows.shape[:2], -1) for part in (p.codes, p.meta, exponent))
    return codes, meta, stored


def _unpack(codes: torch.Tensor, meta: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    shape = (codes.shape[0], 2 * codes.shape[1])
    row_exponent = exponent.view(torch.int8)[:, 0]
    return PackedTensor(codes, meta, row_exponent, shape, CACHE_BOOK, CACHE_BLOCK).dequantize()
