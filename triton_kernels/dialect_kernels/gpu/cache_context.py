"""What programs that attend over a dialect KV cache share: their place, slots, means, outputs.

The two kernels are :mod:`.cache_attention` and :mod:`.dialect_attention`.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ..formatbook import LOWEST_EXPONENT, NAN_ROW, ROTATION_GROUP
from ..kv_cache import CACHE_BLOCK
from .rotation import butterfly
from .rounding import power_of_two

__all__ = [
    "exponential",
    "finished",
    "load_keys",
    "load_values",
    "mean_score",
    "row_powers",
    "sequence_of",
    "slots_of",
]

_LOWEST_EXPONENT = tl.constexpr(LOWEST_EXPONENT)
_NAN_ROW = tl.constexpr(NAN_ROW)
_BLOCK = tl.constexpr(CACHE_BLOCK)
_GROUP_SCALE = tl.constexpr(1 / ROTATION_GROUP)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence_of(p_start, i_block, sequences, BQ: tl.constexpr):
    """The sequence whose queries a program has: the last that begins at or before its block.

    Sequence s has its blocks from ``start[s] // BQ + s`` on, enough of them and at most one more.
    """
    low = 0
    high = sequences
    while low < high - 1:
        middle = (low + high) // 2
        before = tl.load(p_start + middle) // BQ + middle <= i_block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _load_rows(p_row, p_meta, p_exponent, D: tl.constexpr, DP: tl.constexpr):
    """Codes [TILE, blocks, 4], meta [TILE * blocks] and exponents [TILE] of keys or of values.

    Eight codes are a word, which is loaded as two halves, because slots begin at even addresses.

    Args:
        p_row: their codes, at even addresses, [TILE].
        p_meta, p_exponent: the rest of them, [TILE].
    """
    TILE: tl.constexpr = p_row.shape[0]
    o_word = tl.arange(0, DP // 8)[None, :]
    p_half = p_row.to(tl.pointer_type(tl.uint16), bitcast=True)[:, None] + o_word * 2
    o_block = tl.arange(0, DP // _BLOCK)[None, :]
    p_block = p_meta[:, None] + o_block
    if D == DP:
        low, high = tl.load(p_half), tl.load(p_half + 1)
        meta = tl.load(p_block)
    else:  # a block of zeros has meta 0 and codes 0
        low = tl.load(p_half, mask=o_word < D // 8, other=0)
        high = tl.load(p_half + 1, mask=o_word < D // 8, other=0)
        meta = tl.load(p_block, mask=o_block < D // _BLOCK, other=0)
    word = low.to(tl.int32) | (high.to(tl.int32) << 16)
    return (
        tl.reshape(word, (TILE, DP // _BLOCK, 4)),
        tl.reshape(meta, (TILE * (DP // _BLOCK),)).to(tl.int32),
        tl.load(p_exponent),
    )


@triton.jit
def slots_of(p_head, p_blocks, o_key, end, block_stride, token_stride, BLOCK_TOKENS: tl.constexpr):
    """Where the slots of the positions `o_key` begin; that of the last one beyond `end`."""
    o_key = tl.minimum(o_key, end - 1).to(tl.uint32)  # whose division is a shift
    block = tl.load(p_blocks + o_key // BLOCK_TOKENS).to(tl.int64)
    return p_head + block * block_stride + (o_key % BLOCK_TOKENS).to(tl.int32) * token_stride


@triton.jit
def load_keys(p_slot, D: tl.constexpr, DP: tl.constexpr):
    """Keys of slots as they are stored, see :func:`_load_rows`."""
    return _load_rows(p_slot, p_slot + D, p_slot + D + D // 16, D, DP)


@triton.jit
def load_values(p_slot, D: tl.constexpr, DP: tl.constexpr):
    """As :func:`load_keys`."""
    p_meta = p_slot + D + D // _BLOCK
    return _load_rows(p_slot + D // 2, p_meta, p_slot + D + D // 16 + 1, D, DP)


@triton.jit
def row_powers(exponent):
    """``2**(R - 5)`` from stored bytes; NaN for rows that are no numbers."""
    r = exponent.to(tl.int8, bitcast=True).to(tl.int32)
    scale = power_of_two(tl.maximum(r, _LOWEST_EXPONENT) - 5)
    return tl.where(r == _NAN_ROW, float("nan"), scale)


@triton.jit
def mean_score(query, p_mean, o_mean, m_mean):
    """What queries [R, K] score with the mean of the keys [K]; 0 if there is none."""
    if p_mean is None:
        return tl.zeros((query.shape[0],), tl.float32)
    else:
        mean = tl.load(p_mean + o_mean, mask=m_mean, other=0.0)
        return tl.sum(query * mean[None, :], axis=1)


@triton.jit
def exponential(x, BASE2: tl.constexpr):
    """``2**x``, or ``e**x``."""
    if BASE2:
        return tl.exp2(x)
    else:
        return tl.exp(x)


@triton.jit
def finished(
    total,
    largest,
    weight,
    head,
    p_value_mean,
    p_sinks,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    BASE2: tl.constexpr,
):
    """Outputs in float32 from the sums of a context.

    Args:
        total: weighted values [R, DP].
        largest: the largest score of each row [R].
        weight: sum of weights [R].
        head: query heads [R].
        BASE2: whether `largest` is an exponent of 2, else of e.
    """
    seen = weight
    if p_sinks is not None:
        sink = tl.load(p_sinks + head)
        if BASE2:
            sink *= _LOG2_E
        top = tl.maximum(largest, sink)
        rest = exponential(largest - top, BASE2)
        total *= rest[:, None]
        seen = weight * rest
        weight = seen + exponential(sink - top, BASE2)
    divisor = tl.where(weight == 0, 1.0, weight)
    total = total / divisor[:, None]
    if ROTATED:
        total = butterfly(total) * _GROUP_SCALE
    if p_value_mean is not None:
        o_column = tl.arange(0, total.shape[1])
        p_mean = p_value_mean + (head // GROUP)[:, None] * D + o_column[None, :]
        mean = tl.load(p_mean, mask=(o_column < D)[None, :], other=0.0)
        total += mean * (seen / divisor)[:, None]
    return total
