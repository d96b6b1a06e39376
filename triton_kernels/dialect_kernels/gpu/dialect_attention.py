"""Attention over a dialect KV cache on a GPU with queries and probabilities in the format, too.

    query [T, query heads, D], slots of the context  ->  out [T, query heads, D]

The full path of section 12 (ours): both products have two operands in the format, one scale for
each of their rows. A program has some neighbouring queries of one sequence, as in
:mod:`.cache_attention`, and goes through their context in chunks of 128 positions, counted from the
sequence's first, because a row of a chunk of P has an exponent of its own::

    q = rounded(butterfly(query) / 32)                        once, R of each row
    for each chunk:   k, v = decode(codes, meta)              [128, D]
                      s = q @ k.T * 2**(R of q - 5 + R of k - 5) / sqrt(D) * log2(e)
                      m = the largest score so far, rounded up to an integer
                      p = 2**(s - m)                          summed as it is
                      p = rounded(p * 2**(R of v - largest R of v))     R of each row
                      o = o * 2**(m before - m) + p @ v * 2**(R of p - 5 + largest R of v - 5)
    out = butterfly(o / sum of p) / 32

An integer m makes every rescaling exact. The operands are E4M3, or bfloat16 where a GPU has no FP8:
both hold them exactly.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ..formatbook import E4M3_WINDOW, LOWEST_EXPONENT, NAN_ROW, ROTATION_GROUP
from ..kv_cache import CACHE_BLOCK, CACHE_BOOK, PROBABILITY_CHUNK
from .cache_context import (
    finished,
    load_keys,
    load_values,
    mean_score,
    row_powers,
    sequence_of,
    slots_of,
)
from .decode import operand_of_bytes, operand_of_words
from .epilogue import rounded
from .rotation import butterfly
from .rounding import (
    block_largest,
    block_row,
    e4m3_words,
    four,
    look_up,
    power_of_two,
    row_exponent,
    row_scale,
    scale_blocks,
    select_online,
)

__all__ = ["attend_kernel"]

_CHUNK = tl.constexpr(PROBABILITY_CHUNK)
_PARTS = tl.constexpr(PROBABILITY_CHUNK // CACHE_BLOCK)
_LOWEST_EXPONENT = tl.constexpr(LOWEST_EXPONENT)
_NAN_ROW = tl.constexpr(NAN_ROW)
_BLOCK = tl.constexpr(CACHE_BLOCK)
_DIALECTS = tl.constexpr(len(CACHE_BOOK))
_WINDOW = tl.constexpr(E4M3_WINDOW)
_GROUP_SCALE = tl.constexpr(1 / ROTATION_GROUP)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rounded_rows(x, p_book, ASM: tl.constexpr):
    """Rows [R, K] rounded in blocks of 32, rule ``lut``, window 13.

    Returns:
        E4M3 numbers, four in a word, int32 [R, K / 4], and float32 scales [R]; NaN for a row with
        NaN or Inf.

    Args:
        x: float32, columns in their natural order.
        p_book: of :func:`.rounding.book_table`.
    """
    R: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[0] * x.shape[1] // _BLOCK
    blocks = tl.reshape(x, (G, _BLOCK))
    largest = block_largest(blocks)
    exponent, finite = row_exponent(tl.max(tl.reshape(largest, (R, G // R)), axis=1))
    blocks = tl.where(_of_blocks(finite, G)[:, None] != 0, blocks, 0.0)
    largest = tl.where(_of_blocks(finite, G) != 0, largest, 0)
    scale, delta, largest_cell = scale_blocks(largest, _of_blocks(exponent, G), _WINDOW, ASM)
    row = block_row(largest_cell)
    parts = four(blocks)
    differences, indices = look_up(parts, scale, row, p_book, _DIALECTS, ASM)
    variant = select_online(differences, _BLOCK, _DIALECTS)
    words = e4m3_words(parts, indices, delta, row, variant, p_book, _DIALECTS, ASM)
    return tl.reshape(words, (R, x.shape[1] // 4)), row_scale(exponent, finite)


@triton.jit
def _of_blocks(of_row, G: tl.constexpr):
    """A number of each row [R] for each of its blocks, [G]."""
    R: tl.constexpr = of_row.shape[0]
    return tl.reshape(tl.broadcast_to(of_row[:, None], (R, G // R)), (G,))


@triton.jit
def _dot(a, b, total, ASM: tl.constexpr):
    """``total + a @ b`` of exact operands in float32."""
    if ASM:
        return tl.dot(a, b, total)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


@triton.jit
def _placed(part, i_part, whole):
    """`whole` [R, parts, W] with a part [R, W] in its place."""
    o_part = tl.arange(0, whole.shape[1])[None, :, None]
    return tl.where(o_part == i_part, part[:, None, :], whole)


@triton.jit
def _part_of(whole, i_part):
    """A part [R, W] of int32 [R, parts, W]."""
    o_part = tl.arange(0, whole.shape[1])[None, :, None]
    return tl.sum(tl.where(o_part == i_part, whole, 0), axis=1)


@triton.jit
def _power(difference):
    """``2**difference`` of integers in float32 not above 0; 0 where it would be subnormal."""
    exponent = tl.maximum(difference, -126.0).to(tl.int32)
    return tl.where(difference < -126.0, 0.0, power_of_two(exponent))


@triton.jit
def _probabilities(score, largest):
    """P [R, CHUNK] by integers m, what earlier sums become, and m so far.

    Args:
        score: float32, times log2(e).
        largest: m before, an integer in float32, or -inf.
    """
    top = tl.maximum(largest, tl.ceil(tl.max(score, axis=1)))
    base = tl.where(top == float("-inf"), 0.0, top)
    return tl.exp2(score - base[:, None]), _power(largest - base), top


@triton.jit
def _values_exponent(exponent, seen):
    """The largest R of the values that each row sees, and whether one of them is NaN, [R] each.

    Args:
        exponent: as stored, [CHUNK].
        seen: [R, CHUNK].
    """
    stored = tl.where(seen, exponent[None, :], _LOWEST_EXPONENT)
    is_nan = tl.min(stored, axis=1) == _NAN_ROW
    return tl.maximum(tl.max(stored, axis=1), _LOWEST_EXPONENT), is_nan


# Longer than other functions by its 37 arguments, one a line.
@triton.jit(
    do_not_specialize=[
        "sequences", "query_token", "query_head", "out_token", "out_head", "block_stride",
        "head_stride", "token_stride", "table_stride", "window",
    ]
)  # fmt: skip
def attend_kernel(
    p_query,
    p_cache,
    p_table,
    p_book,
    p_start,
    p_lengths,
    p_blocks,
    p_causal,
    p_slopes,
    p_sinks,
    p_key_mean,
    p_value_mean,
    p_out,
    p_partial,
    p_extremes,
    sequences,
    query_token,
    query_head,
    out_token,
    out_head,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    window,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    ROTATED: tl.constexpr,
    EIGHT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (blocks of queries, heads of keys, splits), as of :mod:`.cache_attention`."""
    BQ: tl.constexpr = BM // GROUP
    i_head = tl.program_id(1)
    i_sequence = sequence_of(p_start, tl.program_id(0), sequences, BQ)
    start = tl.load(p_start + i_sequence)
    count = tl.load(p_start + i_sequence + 1) - start
    first = (tl.program_id(0) - (start // BQ + i_sequence)) * BQ
    if first >= count:
        return
    length = tl.load(p_lengths + i_sequence)
    causal = CAUSAL
    if p_causal is not None:
        causal = tl.load(p_causal + i_sequence).to(tl.int32)

    o_row = tl.arange(0, BM)
    o_query = first + o_row // GROUP
    head = i_head * GROUP + o_row % GROUP
    m_row = (o_row < BQ * GROUP) & (o_query < count)
    position = length - count + o_query
    o_column = tl.arange(0, DP)
    m_query = m_row[:, None] & (o_column < D)[None, :]
    o_token = (start + o_query).to(tl.int64)
    p_row = p_query + (o_token * query_token + head * query_head)[:, None] + o_column[None, :]
    query = tl.load(p_row, mask=m_query, other=0.0).to(tl.float32)
    shift = mean_score(query, p_key_mean, i_head * D + o_column, o_column < D) * SCALE
    if ROTATED:
        query = butterfly(query) * _GROUP_SCALE
    query_words, query_scale = _rounded_rows(query, p_book, ASM)
    query = operand_of_bytes(query_words, EIGHT, ASM)
    query_scale *= SCALE

    # chunks with positions that any of these queries sees, and this program's part of them
    end = length
    if causal != 0:
        end = tl.minimum(length, length - count + tl.minimum(first + BQ, count))
    chunk = tl.maximum(0, length - count + first - window + 1) // _CHUNK
    chunks = tl.cdiv(end, _CHUNK) - chunk
    i_split, splits = tl.program_id(2), tl.num_programs(2)
    last = chunk + chunks * (i_split + 1) // splits
    chunk += chunks * i_split // splits

    largest = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, DP), tl.float32)
    p_head = p_cache + i_head.to(tl.int64) * head_stride
    p_blocks += i_sequence.to(tl.int64) * table_stride
    for i_chunk in range(chunk, last):
        o_key = i_chunk * _CHUNK + tl.arange(0, _CHUNK)
        p_slot = slots_of(p_head, p_blocks, o_key, end, block_stride, token_stride, BLOCK_TOKENS)
        exponent = tl.load(p_slot + D + D // 16 + 1).to(tl.int8, bitcast=True).to(tl.int32)
        behind = o_key[None, :] - position[:, None]
        seen = m_row[:, None] & (o_key < end)[None, :]
        seen = seen & ((behind <= 0) | (causal == 0)) & (tl.abs(behind) < window)

        scores = tl.zeros((BM, _PARTS, _BLOCK), tl.float32)
        for i_part in range(_PARTS):
            o_part = i_chunk * _CHUNK + i_part * _BLOCK + tl.arange(0, _BLOCK)
            p_part = slots_of(
                p_head, p_blocks, o_part, end, block_stride, token_stride, BLOCK_TOKENS
            )
            code, meta, key_exponent = load_keys(p_part, D, DP)
            key = operand_of_words(code, meta, p_table, EIGHT, ASM)
            part = _dot(query, tl.trans(key), tl.zeros((BM, _BLOCK), tl.float32), ASM)
            scores = _placed(part * row_powers(key_exponent)[None, :], i_part, scores)
        score = tl.reshape(scores, (BM, _CHUNK)) * query_scale[:, None] + shift[:, None]
        if SOFT_CAP > 0:  # cap * tanh(score / cap)
            score = SOFT_CAP - 2 * SOFT_CAP / (tl.exp(score * (2 / SOFT_CAP)) + 1)
        if p_slopes is not None:
            slope = tl.load(p_slopes + head, mask=m_row, other=0.0)
            score += slope[:, None] * behind
        # selected, never multiplied by 0: what is not seen may hold anything
        score = tl.where(seen, score * _LOG2_E, float("-inf"))
        share, rest, largest = _probabilities(score, largest)
        weight = weight * rest + tl.sum(share, axis=1)

        most, is_nan = _values_exponent(exponent, seen)
        share *= _power((exponent[None, :] - most[:, None]).to(tl.float32))
        # NaN is in the sum of weights already, and has no cell
        share = tl.where(seen & (share == share), share, 0.0)
        share_words, share_scale = _rounded_rows(share, p_book, ASM)
        words = tl.reshape(share_words, (BM, _PARTS, _BLOCK // 4))
        product = tl.zeros((BM, DP), tl.float32)
        for i_part in range(_PARTS):
            o_part = i_chunk * _CHUNK + i_part * _BLOCK + tl.arange(0, _BLOCK)
            p_part = slots_of(
                p_head, p_blocks, o_part, end, block_stride, token_stride, BLOCK_TOKENS
            )
            code, meta, _ = load_values(p_part, D, DP)
            value = operand_of_words(code, meta, p_table, EIGHT, ASM)
            rounded_share = operand_of_bytes(_part_of(words, i_part), EIGHT, ASM)
            product = _dot(rounded_share, value, product, ASM)
        scale = tl.where(is_nan, float("nan"), share_scale)
        total = total * rest[:, None] + product * scale[:, None] * power_of_two(most - 5)[:, None]

    if not SPLIT:
        y = finished(total, largest, weight, head, p_value_mean, p_sinks, GROUP, D, ROTATED, True)
        p_y = p_out + (o_token * out_token + head * out_head)[:, None] + o_column[None, :]
        tl.store(p_y, rounded(y, p_out, ASM), mask=m_query)
    else:
        o_part = (o_token * (tl.num_programs(1) * GROUP) + head) * splits + i_split
        tl.store(p_partial + o_part[:, None] * DP + o_column[None, :], total, mask=m_row[:, None])
        tl.store(p_extremes + o_part * 2, largest, mask=m_row)
        tl.store(p_extremes + o_part * 2 + 1, weight, mask=m_row)
