"""Attention over a dialect KV cache on a GPU, decoding its rows in registers.

    query [T, query heads, D], slots of the context  ->  out [T, query heads, D]

A program has some neighbouring queries of one sequence, in all query heads that share a head of
keys and values, and goes through their context a tile of positions at a time::

    for each tile:   k, v = decode(codes, meta)          [TILE, D]; those of the next tile are
                                                         on their way meanwhile
                     s = q @ k.T * 2**(R of k - 5) / sqrt(D)
                     p = exp(s - largest so far)
                     o = o + (p * 2**(R of v - 5)) @ v
    out = butterfly(o / sum of p) / 32

so a row's exponent is a scale of one column of scores or weights, and no 16-bit copy of the cache
exists. Where sequences are few, a context has several programs: each leaves its sums, and a second
kernel adds them. Columns of D are taken in the parts that words are decoded in, see
:mod:`.decode`. (The online softmax is FlashAttention's, contexts in parts are FlashDecoding's, and
queries that share a head in one tile those of vLLM's unified attention; the rest is ours.)
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..formatbook import ROTATION_GROUP
from ..kv_cache import CACHE_BOOK, PROBABILITY_CHUNK, Context, KvCache, Scoring
from .cache_context import (
    exponential,
    finished,
    load_keys,
    load_values,
    mean_score,
    row_powers,
    sequence_of,
    slots_of,
)
from .decode import e4m3_table, joined_sixteen, sixteen_of_words, sixteen_table
from .dialect_attention import attend_kernel
from .epilogue import rounded, rounded_to
from .launch import launch
from .layout import interpreted, readable
from .rotation import butterfly
from .rounding import book_table

__all__ = ["AttentionPlan", "attend", "warm_up"]

_GROUP_SCALE = tl.constexpr(1 / ROTATION_GROUP)
_MOST_SPLITS = 16
_SPLITS = tl.constexpr(_MOST_SPLITS)
_NO_WINDOW = 1 << 30
_LARGE_PART = tl.constexpr(64)
"""Columns of a part of large heads, from which on tiles of queries have few rows."""
_WHOLE_QUERY = tl.constexpr(16 * 64)
"""Elements of a part of a query up to which each warp has registers for the whole query."""
_PROGRAMS = 2
"""Of a streaming multiprocessor, at least, before a context is split no further."""


@dataclass(frozen=True)
class AttentionPlan:
    """How a launch is divided.

    Attributes:
        rows: of a program, queries times the query heads that share a head: a power of two, at
            least 16 and at least those heads.
        tile: positions at a time, a power of two from 16 on.
        splits: programs that share a context, a power of two.
        num_warps: warps of a program.
        eight_bits: whether operands are E4M3, where queries and probabilities are rounded.
    """

    rows: int
    tile: int
    splits: int
    num_warps: int
    eight_bits: bool = False


def _plan_attention(
    tokens: int,
    sequences: int,
    heads: int,
    group: int,
    head_size: int,
    processors: int,
    dialect_attention: bool = False,
) -> AttentionPlan:
    """A plan for T queries of S sequences, from what the host knows without waiting for the GPU.

    Args:
        tokens, sequences: T and S.
        heads: of keys and values.
        group: query heads that share one of them.
        head_size: D.
        processors: streaming multiprocessors of the GPU.
        dialect_attention: whether queries and probabilities are rounded, too.
    """
    least = max(16, 1 << (group - 1).bit_length())
    padded = _padded_head(head_size)
    narrow = padded == 64
    rows = least
    if tokens > sequences:  # more rows, and a row's query and output no longer fit into registers
        rows = max(least, 64 if padded <= 128 else 32 if padded == 256 else 16)
    if padded > 128:
        tile, num_warps = 16, 8 if rows * padded > 32 * 256 else 4
    elif rows == 16:
        tile, num_warps = 32, 1 if narrow else 4
    else:
        tile, num_warps = 32 if narrow else 16, 4 if rows < 128 else 8
    if dialect_attention:
        rows, tile, num_warps = least, PROBABILITY_CHUNK, 4 if narrow else 8
    programs = (tokens // (rows // group) + sequences) * heads
    splits = 1
    while splits < _MOST_SPLITS and programs * splits < _PROGRAMS * processors:
        splits *= 2
    return AttentionPlan(rows, tile, splits, num_warps)


def _padded_head(head_size: int) -> int:
    """Columns of a row inside the kernels: a power of two, whose quarter an MMA can take."""
    return max(64, 1 << (head_size - 1).bit_length())


@triton.jit
def _product(a, bits, total, TRANSPOSED: tl.constexpr, ASM: tl.constexpr):
    """``total + a @ b``, or ``a @ b.T``, with the bits of b in 16-bit numbers; or four of them.

    Args:
        a: bfloat16 or float16, as b; float32: b is bfloat16, and all products float32.
    """
    WIDE: tl.constexpr = a.dtype == tl.float32
    b = bits.to(tl.bfloat16 if WIDE else a.dtype, bitcast=True)
    if TRANSPOSED:
        b = tl.permute(b, (0, 2, 1)) if len(b.shape) == 3 else tl.trans(b)
    if WIDE or not ASM:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def _in_parts(x):
    """Columns of [R, K] as :func:`.decode.sixteen_parts` orders them, four of [R, K/4]."""
    R: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    x = tl.permute(tl.reshape(x, (R, K // 8, 2, 2, 2)), (0, 1, 4, 2, 3))
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return (
        tl.reshape(x0, (R, K // 4)),
        tl.reshape(x1, (R, K // 4)),
        tl.reshape(x2, (R, K // 4)),
        tl.reshape(x3, (R, K // 4)),
    )


@triton.jit
def _stacked(parts):
    """Parts [R, K/4] one behind the other: [4, R, K/4]."""
    x0, x1, x2, x3 = parts
    joined = tl.join(tl.join(x0, x1), tl.join(x2, x3))
    return tl.reshape(tl.permute(joined, (2, 3, 0, 1)), (4, x0.shape[0], x0.shape[1]))


@triton.jit
def _scores(query, key, ASM: tl.constexpr):
    """Products of queries [R, K] with keys [TILE, K], both in parts: float32 [R, TILE]."""
    query0, query1, query2, query3 = query
    key0, key1, key2, key3 = key
    score = tl.zeros((query0.shape[0], key0.shape[0]), tl.float32)
    if query0.shape[1] >= _LARGE_PART and query0.shape[0] * query0.shape[1] > _WHOLE_QUERY:
        # every warp would hold the whole query, which has no room: here each holds a part of it
        q, k = _stacked(query), _stacked(key)
        zero = tl.zeros((4, score.shape[0], score.shape[1]), tl.float32)
        return tl.sum(_product(q, k, zero, True, ASM), axis=0)
    score = _product(query0, key0, score, True, ASM)
    score = _product(query1, key1, score, True, ASM)
    score = _product(query2, key2, score, True, ASM)
    return _product(query3, key3, score, True, ASM)


@triton.jit
def _shares(score, largest):
    """A step of the softmax: weights [R, TILE], what earlier ones become, the largest score yet."""
    top = tl.maximum(largest, tl.max(score, axis=1))
    base = tl.where(top == float("-inf"), 0.0, top)
    return tl.exp(score - base[:, None]), tl.exp(largest - base), top


# Longer than other functions by its 38 arguments, one a line.
@triton.jit(
    do_not_specialize=[
        "sequences", "query_token", "query_head", "out_token", "out_head", "block_stride",
        "head_stride", "token_stride", "table_stride", "window",
    ]
)  # fmt: skip
def _attend_kernel(
    p_query,
    p_cache,
    p_key_table,
    p_value_table,
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
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROTATED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (blocks of queries, heads of keys, splits)."""
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

    # rows: queries, and within each the query heads that share this head of keys
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
    query = _in_parts(rounded(query, p_query, ASM))

    # positions that any of these queries sees, and this program's part of their tiles
    end = length
    if causal != 0:
        end = tl.minimum(length, length - count + tl.minimum(first + BQ, count))
    tile = tl.maximum(0, length - count + first - window + 1) // TILE
    tiles = tl.cdiv(end, TILE) - tile
    i_split, splits = tl.program_id(2), tl.num_programs(2)
    last = tile + tiles * (i_split + 1) // splits
    tile += tiles * i_split // splits

    largest = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total0 = tl.zeros((BM, DP // 4), tl.float32)
    total1 = tl.zeros((BM, DP // 4), tl.float32)
    total2 = tl.zeros((BM, DP // 4), tl.float32)
    total3 = tl.zeros((BM, DP // 4), tl.float32)
    o_key = tile * TILE + tl.arange(0, TILE)
    p_head = p_cache + i_head.to(tl.int64) * head_stride
    p_blocks += i_sequence.to(tl.int64) * table_stride
    p_slot = slots_of(p_head, p_blocks, o_key, end, block_stride, token_stride, BLOCK_TOKENS)
    code0, meta0, exponent0 = load_keys(p_slot, D, DP)
    code1, meta1, exponent1 = load_values(p_slot, D, DP)
    for _ in range(tile, last):
        score = _scores(query, sixteen_of_words(code0, meta0, p_key_table, ASM), ASM)
        score = score * (row_powers(exponent0) * SCALE)[None, :] + shift[:, None]
        value_scale = row_powers(exponent1)
        part0, part1, part2, part3 = sixteen_of_words(code1, meta1, p_value_table, ASM)
        behind = o_key[None, :] - position[:, None]
        seen = m_row[:, None] & (o_key < end)[None, :]
        seen = seen & ((behind <= 0) | (causal == 0)) & (tl.abs(behind) < window)
        o_key += TILE
        p_slot = slots_of(p_head, p_blocks, o_key, end, block_stride, token_stride, BLOCK_TOKENS)
        code0, meta0, exponent0 = load_keys(p_slot, D, DP)
        code1, meta1, exponent1 = load_values(p_slot, D, DP)
        if SOFT_CAP > 0:  # cap * tanh(score / cap)
            score = SOFT_CAP - 2 * SOFT_CAP / (tl.exp(score * (2 / SOFT_CAP)) + 1)
        if p_slopes is not None:
            slope = tl.load(p_slopes + head, mask=m_row, other=0.0)
            score += slope[:, None] * behind
        # selected, never multiplied by 0: what is not seen may hold anything
        share, rest, largest = _shares(tl.where(seen, score, float("-inf")), largest)
        weight = weight * rest + tl.sum(share, axis=1)
        share = tl.where(seen, share * value_scale[None, :], 0.0)
        if p_query.dtype.element_ty != tl.float32:
            share = rounded_to(share, tl.bfloat16, ASM)  # whose range holds every exponent
        total0 = _product(share, part0, total0 * rest[:, None], False, ASM)
        total1 = _product(share, part1, total1 * rest[:, None], False, ASM)
        total2 = _product(share, part2, total2 * rest[:, None], False, ASM)
        total3 = _product(share, part3, total3 * rest[:, None], False, ASM)

    total = joined_sixteen(total0, total1, total2, total3, BM, DP)
    if not SPLIT:
        y = finished(total, largest, weight, head, p_value_mean, p_sinks, GROUP, D, ROTATED, False)
        p_y = p_out + (o_token * out_token + head * out_head)[:, None] + o_column[None, :]
        tl.store(p_y, rounded(y, p_out, ASM), mask=m_query)
    else:
        o_part = (o_token * (tl.num_programs(1) * GROUP) + head) * splits + i_split
        tl.store(p_partial + o_part[:, None] * DP + o_column[None, :], total, mask=m_row[:, None])
        tl.store(p_extremes + o_part * 2, largest, mask=m_row)
        tl.store(p_extremes + o_part * 2 + 1, weight, mask=m_row)


@triton.jit(do_not_specialize=["splits", "out_token", "out_head"])
def _add_splits_kernel(
    p_partial,
    p_extremes,
    p_sinks,
    p_value_mean,
    p_out,
    splits,
    out_token,
    out_head,
    D: tl.constexpr,
    DP: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATED: tl.constexpr,
    BASE2: tl.constexpr,
    ASM: tl.constexpr,
):
    """One output from the sums of the programs that shared its context. Grid (T, query heads)."""
    i_token = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    o_split = tl.arange(0, _SPLITS)
    m_split = o_split < splits
    o_part = (i_token * tl.num_programs(1) + i_head) * splits + o_split
    largest = tl.load(p_extremes + o_part * 2, mask=m_split, other=float("-inf"))
    weight = tl.load(p_extremes + o_part * 2 + 1, mask=m_split, other=0.0)
    top = tl.max(largest, axis=0)
    rest = exponential(largest - tl.where(top == float("-inf"), 0.0, top), BASE2)
    o_column = tl.arange(0, DP)
    p_part = p_partial + o_part[:, None] * DP + o_column[None, :]
    part = tl.load(p_part, mask=m_split[:, None], other=0.0)
    total = tl.sum(part * rest[:, None], axis=0)[None, :]
    weight = tl.sum(weight * rest, axis=0)
    one = tl.arange(0, 1)
    y = finished(
        total,
        top + one,
        weight + one,
        i_head + one,
        p_value_mean,
        p_sinks,
        GROUP,
        D,
        ROTATED,
        BASE2,
    )
    p_y = p_out + i_token * out_token + i_head * out_head + o_column[None, :]
    tl.store(p_y, rounded(y, p_out, ASM), mask=(o_column < D)[None, :])


def attend(
    cache: KvCache,
    query: torch.Tensor,
    context: Context,
    scoring: Scoring,
    out: torch.Tensor | None = None,
    plan: AttentionPlan | None = None,
    dialect_attention: bool = False,
) -> torch.Tensor:
    """See :func:`dialect_kernels.cached_attention.attend`; never waits for the GPU.

    Args:
        cache, query, context, scoring, out: as there, checked.
        plan: how the launch is divided; default: :func:`_plan_attention`.
        dialect_attention: as there.
    """
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    tokens, heads, size = query.shape
    if not tokens:
        return out
    query = query if query.stride(2) == 1 else query.contiguous()
    written = out if out.stride(2) == 1 else torch.empty_like(out).contiguous()
    group, sequences = heads // cache.heads, context.lengths.shape[0]
    if plan is None:
        device = query.device
        plan = _plan_attention(
            tokens, sequences, cache.heads, group, size, _processors(device), dialect_attention
        )
        if dialect_attention and plan.splits > 1:
            plan = replace(plan, eight_bits=_multiplies_few_in_fp8(device))
    padded = _padded_head(size)
    partial = extremes = None
    if plan.splits > 1:
        parts = tokens * heads * plan.splits
        partial = torch.empty(parts, padded, dtype=torch.float32, device=query.device)
        extremes = torch.empty(parts, 2, dtype=torch.float32, device=query.device)
    sums = partial, extremes
    _launch_attend(cache, query, context, scoring, written, plan, sums, dialect_attention)
    if plan.splits > 1:
        launch(
            _add_splits_kernel,
            (tokens, heads),
            (
                partial, extremes, scoring.sinks, cache.value_mean, written, plan.splits,
                *written.stride()[:2],
            ),
            {
                "D": size, "DP": padded, "GROUP": group, "ROTATED": cache.rotated,
                "BASE2": dialect_attention, "ASM": not interpreted(),
            },
            num_warps=1,
        )  # fmt: skip
    return out if written is out else out.copy_(written)


def _launch_attend(
    cache: KvCache,
    query: torch.Tensor,
    context: Context,
    scoring: Scoring,
    out: torch.Tensor,
    plan: AttentionPlan,
    sums: tuple[torch.Tensor | None, torch.Tensor | None],
    dialect_attention: bool,
) -> None:
    """Fill `out`, or the `sums` of all splits."""
    (tokens, heads, size), memory = query.shape, cache.slots
    group, sequences = heads // cache.heads, context.lengths.shape[0]
    causal = context.causal if isinstance(context.causal, torch.Tensor) else None
    table = context.block_table
    table = table if table.stride(1) == 1 else table.contiguous()
    shifted = bool(scoring.soft_cap) or scoring.sinks is not None
    kernel, shape = (_attend_kernel, {"TILE": plan.tile}) if not dialect_attention else (
        attend_kernel, {"EIGHT": plan.eight_bits}
    )  # fmt: skip
    launch(
        kernel,
        (tokens // (plan.rows // group) + sequences, cache.heads, plan.splits),
        (
            query, memory, *_tables(query, plan, dialect_attention),
            readable(context.query_start), readable(context.lengths), table, causal,
            scoring.slopes, scoring.sinks, cache.key_mean if shifted else None, cache.value_mean,
            out, *sums, sequences, *query.stride()[:2], *out.stride()[:2], *memory.stride()[:3],
            table.stride(0), scoring.window or _NO_WINDOW,
        ),
        {
            "SCALE": scoring.scale, "SOFT_CAP": scoring.soft_cap,
            "CAUSAL": 0 if causal is not None else int(bool(context.causal)),
            "BLOCK_TOKENS": cache.block_tokens, "D": size, "DP": _padded_head(size),
            "GROUP": group, "BM": plan.rows, "SPLIT": plan.splits > 1, "ROTATED": cache.rotated,
            "ASM": not interpreted(), **shape,
        },
        num_warps=plan.num_warps,
    )  # fmt: skip


def _tables(
    query: torch.Tensor, plan: AttentionPlan, dialect_attention: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What keys and values are decoded by; or both of them, and what is rounded."""
    device = query.device
    values = sixteen_table(CACHE_BOOK, torch.bfloat16, device)
    if dialect_attention:
        decoded = e4m3_table(CACHE_BOOK, device) if plan.eight_bits else values
        return decoded, book_table(CACHE_BOOK, device)
    if query.dtype == torch.float16:
        return sixteen_table(CACHE_BOOK, torch.float16, device), values
    return values, values


def warm_up(
    cache: KvCache,
    heads: int,
    dtype: torch.dtype,
    scoring: Scoring,
    dialect_attention: bool = False,
) -> None:
    """Compile what attention over such a cache can need, by small launches.

    Args:
        cache: with at least one block; what is in it does not count.
        heads: query heads.
        dtype: of queries, keys and values.
        scoring: of the layer.
        dialect_attention: as for :func:`attend`.
    """
    device, size, group = cache.slots.device, cache.head_size, heads // cache.heads
    query = torch.zeros(1, heads, size, dtype=dtype, device=device)
    start, length, table = (
        torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in ([0, 1], [1], [[0]])
    )
    for tokens in (1, 2):
        plan = _plan_attention(tokens, 1, cache.heads, group, size, 1, dialect_attention)
        for splits in (1, 2):
            context = Context(start, length, table)
            in_eight_bits = dialect_attention and splits > 1 and _multiplies_few_in_fp8(device)
            divided = replace(plan, splits=splits, eight_bits=in_eight_bits)
            attend(
                cache, query, context, scoring, None, divided, dialect_attention=dialect_attention
            )


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; some number in the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=16)
def _multiplies_few_in_fp8(device: torch.device) -> bool:
    """Whether an MMA takes 16 rows of E4M3, as that of Ada does.

    Those of Hopper and of Blackwell's data center cards take 64 or more; for 16 rows Triton would
    convert the operands to float16.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (8, 9)
