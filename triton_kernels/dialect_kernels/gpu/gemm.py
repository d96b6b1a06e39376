"""``y = x @ w.T`` with packed weights that are decoded in registers, or for a library's GEMM.

    x [T, K] E4M3 (with float32 scales [T]), bfloat16 or float16;  w packed [N, K]  ->  y [T, N]

A program computes a tile of y, weights on the side of the MMA's 64 rows, so that a single token
costs no more than sixteen::

    for each step of BK columns:   w = decode(codes, meta)     [BN, BK] in registers
                                   sum += w @ x.T              [BN, BM] in float32
    y = sum * x_scale * 2**(R - 5) + bias

Columns are taken in the order in which parts of words are decoded, see
:mod:`.decode`: E4M3 tokens lie in this order in memory (the order of operands, see
:mod:`.layout`), 16-bit ones are read accordingly. Every step of FP8 starts from
zero, because Hopper's FP8 accumulator keeps about 13 bits; the accumulator of 16-bit MMAs is
float32. In the mode ``exact`` a step is one block: its sum is exact in the 16-bit MMA, and float32
sums of blocks ascend, as in the reference. Splits, scales and
bias: :mod:`dialect_kernels.gpu.epilogue`.

With experts, w holds the rows of E weights one behind the other, and every tile of rows belongs to
one of them: a schedule names it, see :mod:`dialect_kernels.gpu.grouped`.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..packed import PackedTensor
from .decode import e4m3_parts, e4m3_table, joined_sixteen, sixteen_parts, sixteen_table
from .epilogue import MOST_EARLY, load_scales, store_tile
from .launch import launch
from .layout import aligned, interpreted
from .tuning import GemmPlan

__all__ = [
    "RowTiles",
    "arrivals",
    "eight_bit_kernel",
    "launch_eight_bits",
    "launch_sixteen_bits",
    "sixteen_bit_kernel",
]


@triton.jit
def _split(padded, BK: tl.constexpr):
    """The columns of this program: first and one beyond the last."""
    steps = tl.cdiv(padded, BK)
    splits = tl.num_programs(2)
    i_split = tl.program_id(2)
    return steps * i_split // splits * BK, steps * (i_split + 1) // splits * BK


@triton.jit
def _rows_of_tile(p_tiles, p_rows, tokens, BM: tl.constexpr):
    """Rows of the result and their tokens [BM], one beyond the last row, expert, whether it works.

    Without a schedule `p_tiles` rows are tokens, and there is one weight.
    """
    if p_tiles is None:
        o_row = tl.program_id(0) * BM + tl.arange(0, BM)
        return o_row, o_row, tokens, 0, 1
    else:
        p_tile = p_tiles + 3 * tl.program_id(0)
        first = tl.load(p_tile + 1)
        last = tl.load(p_tile + 2)
        o_row = first + tl.arange(0, BM)
        o_token = o_row
        if p_rows is not None:
            o_token = tl.load(p_rows + o_row, mask=o_row < last, other=0)
        return o_row, o_token, last, tl.load(p_tile), (first < last).to(tl.int32)


@triton.jit
def _load_tokens(p_x, o_column, m_token, columns, EVEN: tl.constexpr):
    """Columns of tokens, [BM, columns]; zero beyond the end of rows and tokens."""
    mask = m_token[:, None]
    if not EVEN:
        mask = mask & (o_column < columns)[None, :]
    return tl.load(p_x + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def _added(total, step, ASM: tl.constexpr):
    """total + step in float32; a plain sum would become the accumulator of the step's MMA."""
    if ASM:
        return tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [total, step], tl.float32, is_pure=True, pack=1
        )
    else:
        return total + step


@triton.jit
def _eight_bit_dot(part, x, total, ASM: tl.constexpr):
    w = part.to(tl.float8e4nv, bitcast=True)
    if ASM:
        return tl.dot(w, tl.trans(x), total)
    else:
        return tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), total)


@triton.jit(do_not_specialize=["tokens", "features", "padded"])
def eight_bit_kernel(
    p_x,
    p_x_scale,
    p_codes,
    p_meta,
    p_row_exponent,
    p_table,
    p_bias,
    p_y,
    p_partial,
    p_arrived,
    p_tiles,
    p_rows,
    tokens,
    features,
    padded,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    """E4M3 tokens [T, Kp] in the order of operands times weights. Grid (tiles, N/BN, splits)."""
    padded = padded // (BK if EVEN else 16) * (BK if EVEN else 16)
    o_feature = tl.program_id(1) * BN + tl.arange(0, BN)
    o_token, o_x, tokens, expert, works = _rows_of_tile(p_tiles, p_rows, tokens, BM)
    o_row = tl.minimum(o_feature, features - 1).to(tl.int64) + expert * features
    p_row = p_x + o_x.to(tl.int64)[:, None] * padded
    m_token = o_token < tokens
    pointers = p_x_scale, p_row_exponent, p_bias
    scales = 0
    if BM <= MOST_EARLY:
        scales = load_scales(pointers, o_token, tokens, o_row)

    first, last = _split(padded * works, BK)
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(first, last, BK):
        part0, part1 = e4m3_parts(
            p_codes, p_meta, p_table, o_row, start, padded, B, BN, BK, EVEN, ASM
        )
        o_half = start // 2 + tl.arange(0, BK // 2)
        x0 = _load_tokens(p_row, o_half, m_token, padded // 2, EVEN)
        x1 = _load_tokens(p_row + padded // 2, o_half, m_token, padded // 2, EVEN)
        step = _eight_bit_dot(part0, x0, tl.zeros((BN, BM), tl.float32), ASM)
        total = _added(total, _eight_bit_dot(part1, x1, step, ASM), ASM)
    store_tile(
        total, pointers, scales, p_y, p_partial, p_arrived, o_token, o_feature, o_row, tokens,
        features, SPLIT, ASM,
    )  # fmt: skip


@triton.jit
def _sixteen_bit_dot(part, x, total, FLOAT16: tl.constexpr, ASM: tl.constexpr):
    w = part.to(tl.float16 if FLOAT16 else tl.bfloat16, bitcast=True)
    if ASM:
        return tl.dot(w, tl.trans(x), total)
    else:
        return tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), total, input_precision="ieee")


# Longer than other functions by its 29 arguments, one a line.
@triton.jit(do_not_specialize=["tokens", "features", "columns", "padded", "stride"])
def sixteen_bit_kernel(
    p_x,
    p_x_scale,
    p_codes,
    p_meta,
    p_row_exponent,
    p_table,
    p_bias,
    p_y,
    p_partial,
    p_arrived,
    p_tiles,
    p_rows,
    tokens,
    features,
    columns,
    padded,
    stride,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    FLOAT16: tl.constexpr,
    ASM: tl.constexpr,
):
    """Tokens [T, K] times weights, both of 16 bits. Grid (tiles, N/BN, splits)."""
    padded = padded // (BK if EVEN else 16) * (BK if EVEN else 16)
    if ALIGNED:
        columns = columns // 16 * 16
        stride = stride // 16 * 16
    o_feature = tl.program_id(1) * BN + tl.arange(0, BN)
    o_token, o_x, tokens, expert, works = _rows_of_tile(p_tiles, p_rows, tokens, BM)
    o_row = tl.minimum(o_feature, features - 1).to(tl.int64) + expert * features
    p_row = p_x + o_x.to(tl.int64)[:, None] * stride
    m_token = o_token < tokens
    i_pair = tl.arange(0, BK // 4)
    o_pair = i_pair // 2 * 8 + i_pair % 2
    pointers = p_x_scale, p_row_exponent, p_bias
    scales = 0
    if BM <= MOST_EARLY:
        scales = load_scales(pointers, o_token, tokens, o_row)

    first, last = _split(padded * works, BK)
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(first, last, BK):
        part0, part1, part2, part3 = sixteen_parts(
            p_codes, p_meta, p_table, o_row, start, padded, B, BN, BK, EVEN, ASM
        )
        if EXACT:
            w = joined_sixteen(part0, part1, part2, part3, BN, BK)
            x = _load_tokens(p_row, start + tl.arange(0, BK), m_token, columns, EVEN)
            step = _sixteen_bit_dot(w, x, tl.zeros((BN, BM), tl.float32), FLOAT16, ASM)
            total = _added(total, step, ASM)
        else:
            x0 = _load_tokens(p_row, start + o_pair, m_token, columns, EVEN)
            total = _sixteen_bit_dot(part0, x0, total, FLOAT16, ASM)
            x1 = _load_tokens(p_row, start + o_pair + 2, m_token, columns, EVEN)
            total = _sixteen_bit_dot(part1, x1, total, FLOAT16, ASM)
            x2 = _load_tokens(p_row, start + o_pair + 4, m_token, columns, EVEN)
            total = _sixteen_bit_dot(part2, x2, total, FLOAT16, ASM)
            x3 = _load_tokens(p_row, start + o_pair + 6, m_token, columns, EVEN)
            total = _sixteen_bit_dot(part3, x3, total, FLOAT16, ASM)
    store_tile(
        total, pointers, scales, p_y, p_partial, p_arrived, o_token, o_feature, o_row, tokens,
        features, SPLIT, ASM,
    )  # fmt: skip


class RowTiles(NamedTuple):
    """The rows of a result in tiles, each of which belongs to one of several weights."""

    table: torch.Tensor
    """int64 [tiles, 3]: the expert, its first row here and one beyond its last row; a tile takes
    as many of them as it has tokens. All 0: nothing to do."""
    tokens: torch.Tensor | None
    """int64 [R], the token of each row; None: row i is of token i."""


def arrivals(
    tokens: int, features: int, plan: GemmPlan, device: torch.device
) -> torch.Tensor | None:
    """Memory for the counters of a plan that splits K, int32; they must be zeros at the launch.

    Args:
        tokens, features: T and N.
    """
    if plan.splits == 1:
        return None
    across, along, _ = _grid(tokens, features, plan)
    return torch.empty(across * along, dtype=torch.int32, device=device)


def launch_eight_bits(
    q: torch.Tensor,
    scale: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    plan: GemmPlan,
    arrived: torch.Tensor | None,
    tiles: RowTiles | None = None,
) -> None:
    """Fill `y` [T, N] (float32, bfloat16 or float16) with ``(q * scale) @ p.T + bias``.

    Args:
        q: float8_e4m3fn [T, Kp], contiguous, columns in the order of operands.
        scale: float32 [T].
        p: packed weight [N, K].
        bias: [N], contiguous, or None.
        plan: tile and splits.
        arrived: zeros in the memory from :func:`arrivals`, if the plan splits K.
        tiles: with experts, p is [E * N, K], bias [E, N], y and scale have rows of the result, and
            the plan has one split.
    """
    (tokens, features), padded = y.shape, q.shape[1]
    grid = _grid(tokens, features, plan, tiles)
    tensors = (q, scale, p.codes, p.meta, p.row_exponent, e4m3_table(p.book, q.device), bias, y)
    launch(
        eight_bit_kernel,
        grid,
        (*tensors, _partial(grid, plan, y), arrived, *_schedule(tiles), tokens, features, padded),
        _shape(p.block_size, plan, plan.columns) | {"EVEN": padded % plan.columns == 0},
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


def launch_sixteen_bits(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    p: PackedTensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    plan: GemmPlan,
    arrived: torch.Tensor | None,
    exact: bool = False,
    tiles: RowTiles | None = None,
) -> None:
    """Fill `y` [T, N] with ``(x * scale) @ p.T + bias`` on the 16-bit MMA.

    Args:
        x: bfloat16 or float16 [T, K] or [T, Kp], of any row stride.
        scale: float32 [T] or None.
        p: packed weight [N, K].
        bias: [N], contiguous, or None.
        plan: tile and splits; with `exact` its `columns` do not count, and it has one split.
        arrived: zeros in the memory from :func:`arrivals`, if the plan splits K.
        exact: add block by block, blocks ascending. Equal to the reference for tokens that were
            rounded with the weight's book and block size.
        tiles: as for :func:`launch_eight_bits`.
    """
    step = p.block_size if exact else plan.columns
    operand = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    (tokens, features), columns, padded = y.shape, x.shape[1], p.codes.shape[1] * 2
    grid = _grid(tokens, features, plan, tiles)
    table = sixteen_table(p.book, operand, x.device)
    tensors = (x, scale, p.codes, p.meta, p.row_exponent, table, bias, y)
    sizes = (tokens, features, columns, padded, x.stride(0))
    launch(
        sixteen_bit_kernel,
        grid,
        (*tensors, _partial(grid, plan, y), arrived, *_schedule(tiles), *sizes),
        {
            **_shape(p.block_size, plan, step),
            "EVEN": padded % step == 0 and columns == padded,
            "ALIGNED": aligned(x),
            "EXACT": exact,
            "FLOAT16": operand == torch.float16,
        },
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


def _grid(
    tokens: int, features: int, plan: GemmPlan, tiles: RowTiles | None = None
) -> tuple[int, int, int]:
    """Tiles of tokens first: those that share weights run at the same time and read them once."""
    of_rows = -(-tokens // plan.tokens) if tiles is None else len(tiles.table)
    return of_rows, -(-features // plan.features), plan.splits


def _schedule(tiles: RowTiles | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if tiles is None else tiles


def _partial(grid: tuple[int, int, int], plan: GemmPlan, y: torch.Tensor) -> torch.Tensor | None:
    """Memory for the sums of every split, float32, or None if there is one."""
    if plan.splits == 1:
        return None
    count = grid[0] * grid[1] * grid[2] * plan.features * plan.tokens
    return torch.empty(count, dtype=torch.float32, device=y.device)


def _shape(block_size: int, plan: GemmPlan, step: int) -> dict[str, int | bool]:
    """What both kernels are compiled for."""
    return {
        "B": block_size,
        "BM": plan.tokens,
        "BN": plan.features,
        "BK": step,
        "SPLIT": plan.splits > 1,
        "ASM": not interpreted(),
    }
