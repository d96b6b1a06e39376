"""Quantizing to codes, meta and row exponents on a GPU: weights while loading.

    x [N, K] -> codes uint8 [N, Kp/2], meta [N, Kp/B], row_exponent int8 [N]

One program per row; the layout of the bytes is that of :mod:`dialect_kernels.packed`.

The exact-error rule needs no rounding. With q = 4 |x| / 2**E, a dialect's half-units h_i and its
thresholds ``t_i = h_(i-1) + h_i``, the cost of an element is ::

    h (h - q) = - sum over i of (h_i - h_(i-1)) * max(q - t_i, 0)

because every threshold that q passes adds ``h_i**2 - h_(i-1)**2 = (h_i - h_(i-1)) t_i`` to h**2.
The block's dialect is the one with the largest sum on the right. All its terms are non-negative, so
no partial sum exceeds 64 * 255: with the 11 significant bits of float16 or the 8 of bfloat16
float32 holds each of them exactly, for float32 and rotated input float64 does. (Definition of the
cost: the format, section 1; this form of it: ours.)
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl

from ..arithmetic import padded_columns
from ..device_tables import kept_tables
from ..formatbook import NAN_ROW, Formatbook, Rotation
from ..packed import PackedTensor
from .launch import launch
from .layout import RowConfig, aligned, interpreted, readable_rows, row_config
from .rotation import load_weight
from .rounding import (
    block_largest,
    block_row,
    book_table,
    four,
    index_words,
    look_up,
    row_exponent,
    scale_blocks,
    select_online,
)

__all__ = ["quantize_weight", "round_online", "store_blocks"]

_NAN_ROW = tl.constexpr(NAN_ROW)


@kept_tables
def _step_table(book: Formatbook, device: torch.device) -> torch.Tensor:
    """``(t_i, h_i - h_(i-1))`` of every dialect, int32 [dialects, 7, 2]."""
    steps = [
        [(low + high, high - low) for low, high in pairwise(dialect)] for dialect in book.half_units
    ]
    return torch.tensor(steps, dtype=torch.int32, device=device)


@triton.jit
def _select_by_exact_error(b_quarters, p_steps, DIALECTS: tl.constexpr):
    """Rule ``mse``: the id with the largest gain; ties take the lowest id. int32 [G]."""
    best = tl.full((b_quarters.shape[0],), -1.0, b_quarters.dtype)
    dialect = tl.zeros((b_quarters.shape[0],), tl.int32)
    for i_dialect in range(DIALECTS):
        total = tl.zeros((b_quarters.shape[0],), b_quarters.dtype)
        for i in tl.static_range(7):
            p_step = p_steps + (i_dialect * 7 + i) * 2
            threshold = tl.load(p_step).to(b_quarters.dtype)
            above = tl.sum(tl.maximum(b_quarters - threshold, 0), axis=1)
            total += tl.load(p_step + 1).to(b_quarters.dtype) * above
        dialect = tl.where(total > best, i_dialect, dialect)
        best = tl.maximum(best, total)
    return dialect


@triton.jit
def round_online(
    b_x, exponent, window, p_book, ID_BITS: tl.constexpr, DIALECTS: tl.constexpr, ASM: tl.constexpr
):
    """Blocks [G, B] of a row, rounded by the book's online rule.

    Returns:
        Meta [G], and what :func:`index_words` takes: numbers, indices and variants.

    Args:
        b_x: finite float32.
        exponent: the row's R.
        window: the largest delta.
    """
    B: tl.constexpr = b_x.shape[1]
    scale, delta, largest_cell = scale_blocks(block_largest(b_x), exponent, window, ASM)
    x = four(b_x)
    row = block_row(largest_cell)
    differences, indices = look_up(x, scale, row, p_book, DIALECTS, ASM)
    variant = select_online(differences, B, DIALECTS)
    dialect = row * (DIALECTS // 8) + variant
    meta = tl.where(largest_cell == 0, 0, (delta << ID_BITS) | dialect)
    return meta, x, indices, variant


@triton.jit
def _round_by_error(
    b_x,
    exponent,
    window,
    p_book,
    p_steps,
    ID_BITS: tl.constexpr,
    DIALECTS: tl.constexpr,
    WIDE: tl.constexpr,
    ASM: tl.constexpr,
):
    """As :func:`round_online`, by the rule ``mse``; gains are added in float64 if `WIDE`."""
    scale, delta, largest_cell = scale_blocks(block_largest(b_x), exponent, window, ASM)
    b_quarters = tl.abs(b_x) * scale[:, None]
    if WIDE:
        b_quarters = b_quarters.to(tl.float64)
    dialect = _select_by_exact_error(b_quarters, p_steps, DIALECTS)
    x = four(b_x)
    _, indices = look_up(x, scale, dialect // (DIALECTS // 8), p_book, DIALECTS, ASM)
    meta = tl.where(largest_cell == 0, 0, (delta << ID_BITS) | dialect)
    return meta, x, indices, dialect % (DIALECTS // 8)


@triton.jit
def store_blocks(p_codes, p_meta, found, o_block, blocks, B: tl.constexpr, ASM: tl.constexpr):
    """Write the rounded blocks `o_block` [G] of a row that has so many.

    Args:
        p_codes: the row's codes, at an even address; four of a block are written at a time.
        p_meta: the row's meta.
        found: of :func:`round_online`.
    """
    meta, x, indices, variant = found
    tl.store(p_meta + o_block, meta.to(p_meta.dtype.element_ty), mask=o_block < blocks)
    index = index_words(x, indices, variant, ASM)
    code = (index & 0x07070707) | ((index >> 4) & 0x08080808)
    pairs = code | (code >> 4)  # two codes in the bytes 0 and 2 each
    codes = (pairs & 0xFF) | ((pairs >> 8) & 0xFF00)
    o_codes = o_block[:, None] * (B // 4) + tl.arange(0, B // 4)[None, :]
    p_codes = p_codes.to(tl.pointer_type(tl.int16), bitcast=True) + o_codes
    tl.store(p_codes, codes.to(tl.int16), mask=o_block[:, None] < blocks)


@triton.jit(do_not_specialize=["columns", "stride", "window"])
def _quantize_packed_kernel(
    p_x,
    p_codes,
    p_meta,
    p_row_exponent,
    p_book,
    p_steps,
    columns,
    stride,
    window,
    DIALECTS: tl.constexpr,
    ID_BITS: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    EXACT_ERROR: tl.constexpr,
    WIDE: tl.constexpr,
    ROTATED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
):
    if ALIGNED:
        columns = columns // 16 * 16
        stride = stride // 16 * 16
    G: tl.constexpr = CHUNK // B
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_x + i_row * stride
    blocks = tl.cdiv(columns, B)

    largest = tl.zeros((G,), tl.int32)
    for first in range(0, columns, CHUNK):
        b_x = load_weight(p_row, first, columns, B, CHUNK, ROTATED)
        largest = tl.maximum(largest, block_largest(b_x))
    exponent, finite = row_exponent(tl.max(largest, axis=0))
    tl.store(p_row_exponent + i_row, tl.where(finite != 0, exponent, _NAN_ROW).to(tl.int8))

    for first in range(0, columns, CHUNK):
        b_x = load_weight(p_row, first, columns, B, CHUNK, ROTATED)
        b_x = tl.where(finite != 0, b_x, 0.0)
        if EXACT_ERROR:
            found = _round_by_error(
                b_x, exponent, window, p_book, p_steps, ID_BITS, DIALECTS, WIDE, ASM
            )
        else:
            found = round_online(b_x, exponent, window, p_book, ID_BITS, DIALECTS, ASM)
        o_block = first // B + tl.arange(0, G)
        p_code = p_codes + i_row * (blocks * (B // 2))
        store_blocks(p_code, p_meta + i_row * blocks, found, o_block, blocks, B, ASM)


def quantize_weight(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int,
    rotation: Rotation = "none",
    config: RowConfig | None = None,
) -> PackedTensor:
    """Quantize a matrix to the bytes of ``reference.quantize``; arguments are not checked.

    Args:
        x: finite float32, bfloat16 or float16 [N, K].
        book: the formatbook.
        block_size: 16, 32 or 64.
        rule: one of the book's rules.
        window: largest delta, 0..book.largest_stored_delta.
        rotation: what the matrix is multiplied by before.
        config: how a program works on a row; any gives the same bytes.
    """
    # only a rotation is worth whole groups on each thread: rounding alone spills a register then
    config = config or row_config(min(x.shape[1], 2048), groups=rotation != "none")
    x = readable_rows(x)
    rows, columns = x.shape
    padded = padded_columns(columns, block_size)
    codes = torch.empty(rows, padded // 2, dtype=torch.uint8, device=x.device)
    meta = torch.empty(rows, padded // block_size, dtype=torch.uint8, device=x.device)
    row_exponent = torch.empty(rows, dtype=torch.int8, device=x.device)
    if rows:
        tables = (book_table(book, x.device), _step_table(book, x.device))
        launch(
            _quantize_packed_kernel,
            (rows,),
            (x, codes, meta, row_exponent, *tables, columns, x.stride(0), window),
            {
                "DIALECTS": len(book),
                "ID_BITS": book.id_bits,
                "B": block_size,
                "CHUNK": config.chunk,
                "EXACT_ERROR": rule == "mse",
                "WIDE": x.dtype == torch.float32 or rotation != "none",
                "ROTATED": rotation != "none",
                "ALIGNED": aligned(x),
                "ASM": not interpreted(),
            },
            num_warps=config.num_warps,
        )
    return PackedTensor(codes, meta, row_exponent, (rows, columns), book, block_size, rotation)
