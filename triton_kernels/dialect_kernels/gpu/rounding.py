"""Rounding blocks onto dialects inside Triton kernels; shared by every kernel that quantizes.

A block of B elements is scaled by ``2**(2 - E)``, so that an element's *cell* is ``k =
floor(4 |x| / 2**E)``, 0..31. Everything after that is integer: the dialect is selected from the
cells, and with the dialect's seven thresholds as bits of one word ::

    above = popcount(thresholds >> k)      number of thresholds beyond k; index = 7 - above
    byte  = byte `above` of the block's two result words, which hold the eight possible results

so the level search costs a shift, a count and a byte permute. A cell travels as the float32 bits
of ``2**23 + k``: this is what one fused multiply-add with rounding towards zero gives, and shifts
read only the five low bits of it.

The book's tables lie in one int32 tensor, see :func:`book_table`. Functions that take ``ASM`` have
two bodies with the same results: inline PTX, and arithmetic for Triton's interpreter.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..device_tables import kept_tables
from ..formatbook import (
    CELLS,
    E4M3_WINDOW,
    LARGEST_HALF_UNIT,
    LOWEST_EXPONENT,
    SMALLEST_RANGE,
    Formatbook,
)

__all__ = [
    "DELTAS",
    "INFINITY_BITS",
    "WINDOW",
    "block_largest",
    "block_range",
    "book_table",
    "e4m3_bytes",
    "e4m3_values",
    "index_bytes",
    "power_of_two",
    "row_exponent",
    "row_scale",
    "scale_blocks",
    "select_by_variant",
    "select_online",
    "variant_errors",
]

INFINITY_BITS = tl.constexpr(0x7F800000)
WINDOW = tl.constexpr(E4M3_WINDOW)
_CELLS = tl.constexpr(CELLS)
DELTAS = tl.constexpr(E4M3_WINDOW + 1)
_LARGEST = tl.constexpr(LARGEST_HALF_UNIT)
_SMALLEST = tl.constexpr(SMALLEST_RANGE)
_LOWEST_EXPONENT = tl.constexpr(LOWEST_EXPONENT)
_CELL_BASE = tl.constexpr(0x4B000000)  # bits of float32 2**23

# fma.rz: a floor for the magnitude, exact for every input precision
_CELL_ASM = tl.constexpr("""{
.reg .f32 m;
abs.f32 m, $1;
fma.rz.f32 $0, m, $2, 0f4B000000;
}""")

# Four elements at a time, but each with its own words: whatever layout the compiler chooses, the
# result is right. Operands, four of each: thresholds, cell, low word, high word, sign source.
_BYTES_ASM = tl.constexpr("""{
.reg .b32 a, b, c, d, s, t;
shf.r.wrap.b32 a, $1, 0, $5;
shf.r.wrap.b32 b, $2, 0, $6;
shf.r.wrap.b32 c, $3, 0, $7;
shf.r.wrap.b32 d, $4, 0, $8;
popc.b32 a, a;
popc.b32 b, b;
popc.b32 c, c;
popc.b32 d, d;
prmt.b32 a, $9, $13, a;
prmt.b32 b, $10, $14, b;
prmt.b32 c, $11, $15, c;
prmt.b32 d, $12, $16, d;
prmt.b32 a, a, b, 0x0040;
prmt.b32 c, c, d, 0x0040;
prmt.b32 a, a, c, 0x5410;
prmt.b32 s, $17, $18, 0x0073;
prmt.b32 t, $19, $20, 0x0073;
prmt.b32 s, s, t, 0x5410;
add.u32 t, a, 0x7f7f7f7f;
lop3.b32 s, s, t, 0x80808080, 0x80;
or.b32 $0, a, s;
}""")
_BYTES_CONSTRAINTS = tl.constexpr("=r" + ",r" * 20)


@kept_tables
def book_table(book: Formatbook, device: torch.device) -> torch.Tensor:
    """The tables of a book as the kernels read them, int32, in this order (ours).

    * ``[dialects]`` thresholds: bit ``t_i - 1`` for each of the seven thresholds;
    * ``[14 (delta), dialects, 2]`` E4M3 bytes of the magnitudes at that delta, largest first;
    * selection: 32-dialect book, ``[8 (M = 15..8), 32]`` the packed errors of the four variants;
      DialectFP4, ``[8, 2]`` two bits per cell, the lowest cell's on top: 1 where the even dialect
      is better, 3 (-1) where the odd one is.

    Args:
        book: the formatbook.
        device: where the table is needed.
    """
    words = [sum(1 << (t - 1) for t in thresholds) for thresholds in book.thresholds]
    for by_dialect in book.e4m3_lut:
        for by_code in by_dialect:
            largest_first = bytes(reversed(by_code[:8]))
            words += [int.from_bytes(largest_first[i : i + 4], "little") for i in (0, 4)]
    if book.variants == 2:
        for even in range(0, len(book), 2):
            ours, theirs = book.beneficial_cells[even : even + 2]
            fields = sum((ours[k] | theirs[k] * 3) << (62 - 2 * k) for k in range(CELLS))
            words += [fields & 0xFFFFFFFF, fields >> 32]
    else:
        words += [word for by_cell in book.packed_error_lut for word in by_cell]
    table = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    return table.to(device)


@triton.jit
def power_of_two(exponent):
    """``2**exponent`` as float32 for exponents in -126..127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def block_largest(x):
    """Bits of the largest magnitude of each block, [G, B] -> int32 [G].

    Not below the bits of infinity if the block holds NaN or Inf: as integers, NaNs are the largest
    magnitudes, whereas a float maximum would drop them.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _block_exponent(largest):
    """The block's own exponent e from the bits of its largest magnitude, int32."""
    return tl.maximum((largest >> 23) - 129, _LOWEST_EXPONENT)


@triton.jit
def _cells(x, scale, ASM: tl.constexpr):
    """``2**23 + floor(|x| * scale)`` as int32 float bits; the product must be below 32."""
    if ASM:
        bits = tl.inline_asm_elementwise(
            _CELL_ASM, "=f,f,f", [x, scale], dtype=tl.float32, is_pure=True, pack=1
        )
        return bits.to(tl.int32, bitcast=True)
    else:
        quarters = tl.abs(x) * scale
        inside = tl.where(quarters < 32.0, quarters, 31.0)  # NaN and Inf rows are discarded later
        return inside.to(tl.int32) | _CELL_BASE


@triton.jit
def row_exponent(largest):
    """R and a mask, from the bits of the row's largest magnitude, both int32.

    The mask is -1, or 0 for a row with NaN or Inf, whose R is that of a row of zeros.
    """
    finite = largest < INFINITY_BITS
    return _block_exponent(tl.where(finite, largest, 0)), tl.where(finite, -1, 0)


@triton.jit
def row_scale(exponent, finite):
    """``2**(R - 5)``, the FP8 scale of a row; NaN for a row with NaN or Inf."""
    return tl.where(finite != 0, power_of_two(exponent - 5), float("nan"))


@triton.jit
def scale_blocks(x, largest, exponent, window, ASM: tl.constexpr):
    """Put the blocks of a row on their grids: int32 (cell [G, B], delta [G], largest cell [G]).

    Args:
        x: float32 [G, B].
        largest: of :func:`block_largest`, int32 [G].
        exponent: the row's R; below the row's true exponent only if the row holds NaN or Inf.
        window: the largest delta.
    """
    delta = tl.maximum(tl.minimum(exponent - _block_exponent(largest), window), 0)
    scale = power_of_two(2 - exponent + delta)
    cell = _cells(x, scale[:, None], ASM)
    largest_cell = _cells(largest.to(tl.float32, bitcast=True), scale, ASM) & (_CELLS - 1)
    return cell, delta, largest_cell


@triton.jit
def block_range(largest_cell):
    """M, the block's largest half-unit."""
    return tl.minimum(tl.maximum((largest_cell + 1) >> 1, _SMALLEST), _LARGEST)


@triton.jit
def _select_in_pairs(cell, m, p_selection):
    """Rule ``two_stage`` (BlockDialect): the better of the pair of M; ties take the even id."""
    row = (_LARGEST - m) * 2
    low = tl.load(p_selection + row).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(p_selection + row + 1).to(tl.int64)
    fields = (high << 32) | low
    # the cell's two bits move to the top, so that they can be read as a signed number
    shift = (cell << 1) & 62
    surplus = ((fields[:, None] << shift.to(tl.int64)) >> 62).to(tl.int32)
    return row + (tl.sum(surplus, axis=1) < 0).to(tl.int32)


@triton.jit
def variant_errors(cell, m, p_selection, PTX: tl.constexpr = False):
    """Summed LUT errors of the four variants of M, four int32 [G] (SemanticDialect).

    The table word of a cell holds four bytes; even and odd variants are added as two 16-bit lanes.

    Args:
        PTX: look the words up without the compiler's knowledge. For a load of its own it would
            carry the cells of rotated tokens through shared memory, into the layout of the store.
    """
    row = (_LARGEST - m) * _CELLS
    p_word = p_selection + (row[:, None] + (cell & (_CELLS - 1)))
    if PTX:
        word = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [p_word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        word = tl.load(p_word)
    even = tl.sum(word & 0x00FF00FF, axis=1)
    odd = tl.sum((word >> 8) & 0x00FF00FF, axis=1)
    return even & 0xFFFF, odd & 0xFFFF, even >> 16, odd >> 16


@triton.jit
def select_by_variant(e0, e1, e2, e3, m):
    """Rule ``lut``: the id of M's variant with the smallest error; ties take the smallest."""
    variant = tl.where(e1 < e0, 1, 0)
    best = tl.minimum(e0, e1)
    variant = tl.where(e2 < best, 2, variant)
    best = tl.minimum(best, e2)
    variant = tl.where(e3 < best, 3, variant)
    return (_LARGEST - m) * 4 + variant


@triton.jit
def select_online(cell, m, p_book, DIALECTS: tl.constexpr, PTX: tl.constexpr = False):
    """The dialects of the blocks by the book's online rule, int32 [G]; `PTX`: `variant_errors`."""
    p_selection = p_book + DIALECTS * (1 + 2 * DELTAS)
    if DIALECTS == 16:
        return _select_in_pairs(cell, m, p_selection)
    else:
        e0, e1, e2, e3 = variant_errors(cell, m, p_selection, PTX)
        return select_by_variant(e0, e1, e2, e3, m)


@triton.jit
def _thresholds_above(thresholds, cell):
    """Number of thresholds beyond the cell; the interpreter's way."""
    rest = thresholds >> (cell & (_CELLS - 1))
    rest = rest - ((rest >> 1) & 0x55555555)
    rest = (rest & 0x33333333) + ((rest >> 2) & 0x33333333)
    rest = (rest + (rest >> 4)) & 0x0F0F0F0F
    return (rest + (rest >> 8) + (rest >> 16) + (rest >> 24)) & 0xFF


@triton.jit
def _result_bytes(x, cell, thresholds, low, high, ASM: tl.constexpr):
    """The result byte of every element with x's sign in bit 7, uint8 [G, B].

    Args (all broadcast to x's shape):
        x: float32, for its sign; a result of 0 has none.
        cell: from :func:`_cells`.
        thresholds: bits of the seven thresholds.
        low, high: eight result bytes below 0x80, that of the largest magnitude first.
    """
    bits = x.to(tl.int32, bitcast=True)
    if ASM:
        return tl.inline_asm_elementwise(
            _BYTES_ASM,
            _BYTES_CONSTRAINTS,
            [thresholds, cell, low, high, bits],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        above = _thresholds_above(thresholds, cell)
        word = tl.where(above < 4, low, high)
        byte = (word >> (8 * (above & 3))) & 0xFF
        sign = tl.where((bits < 0) & (byte != 0), 0x80, 0)
        return (byte | sign).to(tl.uint8)


@triton.jit
def e4m3_bytes(x, cell, delta, dialect, finite, p_book, DIALECTS: tl.constexpr, ASM: tl.constexpr):
    """The E4M3 bytes of rounded blocks, uint8 [G, B]; zeros where the mask `finite` is 0."""
    thresholds = tl.load(p_book + dialect)
    p_words = p_book + DIALECTS + (delta * DIALECTS + dialect) * 2
    low = tl.load(p_words) & finite
    high = tl.load(p_words + 1) & finite
    return _result_bytes(x, cell, thresholds[:, None], low[:, None], high[:, None], ASM)


@triton.jit
def index_bytes(x, cell, dialect, finite, p_book, ASM: tl.constexpr):
    """The indices 0..7 of rounded blocks with x's sign in bit 7, uint8 [G, B]; as `e4m3_bytes`."""
    thresholds = tl.load(p_book + dialect)
    low = 0x04050607 & finite  # indices 7, 6, 5, 4, then 3, 2, 1, 0
    high = 0x00010203 & finite
    return _result_bytes(x, cell, thresholds[:, None], low, high, ASM)


@triton.jit
def e4m3_values(byte):
    """E4M3 bytes (no NaN) as float32, exact, subnormals included."""
    bits = byte.to(tl.int32)
    # with its exponent field in place, an E4M3 number reads as float32 2**120 times too small
    small = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
    return small * 1329227995784915872903807060280344576.0  # 2**120
