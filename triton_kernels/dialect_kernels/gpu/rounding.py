"""Rounding blocks onto dialects inside Triton kernels; shared by every kernel that quantizes.

A block of B elements is scaled by ``2**(2 - E)``, so that an element's *cell* is ``k =
floor(4 |x| / 2**E)``, 0..31. Everything after that is integer, and one load of two words by the
block's largest half-unit M and the element's cell tells all that there is to know::

    word 0   0 | variant 3: 10 bits | variant 2: 10 bits | variant 1: 11 bits
    word 1   index by variant 3 | by variant 2 | by variant 1 | by variant 0      (a byte each)

Word 0 holds how much worse than variant 0 each other variant of M is in this cell, plus
:data:`_BIAS`. Errors are squares of odd numbers, so that their differences are multiples of eight;
in eighths they are so small that the sum over a block of 64 stays within its bits. One integer
sum over the block therefore compares all variants. Of word 1, a byte permute takes the selected
variant's indices, and a second one the result bytes of four elements at a time.

A cell travels as the float32 bits of ``2**23 + k``: this is what one fused multiply-add with
rounding towards zero gives. The address of its two words is then one multiply-add of integers.

The book's tables lie in one int32 tensor, see :func:`book_table`. Functions that take ``ASM`` have
two bodies with the same results: inline PTX, and arithmetic for Triton's interpreter.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from itertools import pairwise

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
    "INFINITY_BITS",
    "block_largest",
    "block_row",
    "book_table",
    "bytes_of_words",
    "e4m3_values",
    "e4m3_words",
    "four",
    "index_words",
    "look_up",
    "power_of_two",
    "row_exponent",
    "row_scale",
    "scale_blocks",
    "select_by_variant",
    "select_online",
    "variant_errors",
]

INFINITY_BITS = tl.constexpr(0x7F800000)
_CELLS = tl.constexpr(CELLS)
_DELTAS = tl.constexpr(E4M3_WINDOW + 1)
_LARGEST = tl.constexpr(LARGEST_HALF_UNIT)
_SMALLEST = tl.constexpr(SMALLEST_RANGE)
_LOWEST_EXPONENT = tl.constexpr(LOWEST_EXPONENT)
_CELL_BASE = tl.constexpr(0x4B000000)  # bits of float32 2**23
_BIAS = 10
"""What is added to each difference of errors, so that none is negative."""
_FIELDS = (0, 11, 21, 31)
"""First bits of the differences of the variants 1, 2 and 3 in a word, and the end of the last."""
_VARIANT_BIAS = tl.constexpr(_BIAS)
_SUMMED = 64
"""Most elements of a block, whose words are added."""

# fma.rz: a floor for the magnitude, exact for every input precision
_CELL_ASM = tl.constexpr("""{
.reg .f32 m;
abs.f32 m, $1;
fma.rz.f32 $0, m, $2, 0f4B000000;
}""")

# The words of the cells of four elements: the sum of the first ones and all second ones. Operands:
# x of four elements, scale, where the words of cell 0 would lie if a cell were its float bits.
_LOOK_UP_ONE = """abs.f32 m, $%d;
fma.rz.f32 m, m, $9, 0f4B000000;
mov.b32 k, m;
mad.wide.u32 a, k, 8, $10;
ld.global.nc.v2.b32 {d%d, $%d}, [a];
"""
_LOOK_UP_ASM = tl.constexpr(
    "{\n.reg .f32 m;\n.reg .b32 k, d0, d1, d2, d3;\n.reg .b64 a;\n"
    + "".join(_LOOK_UP_ONE % (5 + i, i, 1 + i) for i in range(4))
    + "add.u32 d0, d0, d1;\nadd.u32 d2, d2, d3;\nadd.u32 $0, d0, d2;\n}"
)
_LOOK_UP_CONSTRAINTS = tl.constexpr("=r" + ",=r" * 4 + ",f" * 5 + ",l")

# Operands: indices of four elements, variant, low word, high word, four sign sources. Every nibble
# of d selects the byte of one element.
_WORDS_ASM = tl.constexpr("""{
.reg .b32 a, c, d, s, t, v;
mad.lo.u32 v, $5, 0x11, 0x40;
prmt.b32 a, $1, $3, v;
prmt.b32 c, $2, $4, v;
mad.lo.u32 d, c, 16, a;
prmt.b32 d, $6, $7, d;
mov.b32 s, $8;
mov.b32 t, $9;
prmt.b32 s, s, t, 0x0073;
mov.b32 t, $10;
mov.b32 v, $11;
prmt.b32 t, t, v, 0x0073;
prmt.b32 s, s, t, 0x5410;
lop3.b32 $0, d, s, 0x7f7f7f7f, 0xe0;
}""")
_WORDS_CONSTRAINTS = tl.constexpr("=r" + ",r" * 7 + ",f" * 4)


@kept_tables
def book_table(book: Formatbook, device: torch.device) -> torch.Tensor:
    """The tables of a book as the kernels read them, int32, in this order (ours).

    * ``[14 (delta), dialects, 2]`` E4M3 bytes of the magnitudes at that delta, the smallest first;
      bit 7 is set in all that are not zero;
    * ``[8 (M = 15..8), 32 (cell), 2]`` differences of errors and indices, see above. In DialectFP4,
      where counts decide, the difference is 1 where the even dialect is better and -1 where the
      odd one is.

    Args:
        book: the formatbook.
        device: where the table is needed.

    Raises:
        ValueError: if a sum over a block would not fit into its field.
    """
    words = []
    for by_dialect in book.e4m3_lut:
        for by_code in by_dialect:
            marked = bytes(byte | 0x80 if byte else 0 for byte in by_code[:8])
            words += [int.from_bytes(marked[i : i + 4], "little") for i in (0, 4)]
    for first in range(0, len(book), book.variants):
        for k in range(CELLS):
            fields = zip(_differences(book, first, k), pairwise(_FIELDS), strict=False)
            words.append(sum(_field(each, *bits) for each, bits in fields))
            indices = [book.index_lut[first + v][k] for v in range(book.variants)]
            words.append(int.from_bytes(bytes(indices), "little"))
    table = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    return table.to(device)


def _differences(book: Formatbook, first: int, k: int) -> list[int]:
    """What the other variants of dialect `first` lose by an element of cell `k`, in eighths."""
    if book.variants == 2:
        return [book.beneficial_cells[first][k] - book.beneficial_cells[first + 1][k]]
    errors = [book.error_lut[first + v][k] for v in range(book.variants)]
    return [(error - errors[0]) // 8 for error in errors[1:]]


def _field(difference: int, start: int, end: int) -> int:
    biased = difference + _BIAS
    if not 0 <= biased * _SUMMED < 1 << (end - start):
        raise ValueError(
            f"book: a difference of errors is {difference}; the sums of a block need one in "
            f"-{_BIAS}..{((1 << (end - start)) - 1) // _SUMMED - _BIAS}"
        )
    return biased << start


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
def scale_blocks(largest, exponent, window, ASM: tl.constexpr):
    """The grids of the blocks of a row: (scale float32, delta, largest cell), [G] each.

    Args:
        largest: of :func:`block_largest`, int32 [G].
        exponent: the row's R; below the row's true exponent only if the row holds NaN or Inf.
        window: the largest delta.
    """
    delta = tl.maximum(tl.minimum(exponent - _block_exponent(largest), window), 0)
    scale = power_of_two(2 - exponent + delta)
    largest_cell = _cells(largest.to(tl.float32, bitcast=True), scale, ASM) & (_CELLS - 1)
    return scale, delta, largest_cell


@triton.jit
def block_row(largest_cell):
    """15 - M, with M the block's largest half-unit, int32 [G]."""
    return _LARGEST - tl.minimum(tl.maximum((largest_cell + 1) >> 1, _SMALLEST), _LARGEST)


@triton.jit
def four(x):
    """Columns 0, 1, 2 and 3 of every four, [G, B] -> [G, B / 4] each."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def look_up(x, scale, row, p_book, DIALECTS: tl.constexpr, ASM: tl.constexpr):
    """Differences of errors, int32 [G], and indices of all variants, four int32 [G, B / 4].

    Args:
        x: :func:`four` of a row without NaN and Inf: cells of no other lie inside the table.
        scale: float32 [G].
        row: 15 - M of each block, int32 [G].
    """
    p_row = p_book + 2 * DIALECTS * _DELTAS + row * (2 * _CELLS)
    scale = scale[:, None]
    x0, x1, x2, x3 = x
    if ASM:
        # not loads of the compiler's, which would carry the cells of rotated tokens through
        # shared memory into the layout of the store
        base = (p_row.to(tl.int64) - 8 * _CELL_BASE)[:, None]
        d, i0, i1, i2, i3 = tl.inline_asm_elementwise(
            _LOOK_UP_ASM,
            _LOOK_UP_CONSTRAINTS,
            [x0, x1, x2, x3, scale, base],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        d0, i0 = _words(x0, scale, p_row)
        d1, i1 = _words(x1, scale, p_row)
        d2, i2 = _words(x2, scale, p_row)
        d3, i3 = _words(x3, scale, p_row)
        d = d0 + d1 + d2 + d3
    return tl.sum(d, axis=1), (i0, i1, i2, i3)


@triton.jit
def _words(x, scale, p_row):
    """The interpreter's way: the two words of the elements' cells."""
    p_words = p_row[:, None] + (_cells(x, scale, False) & (_CELLS - 1)) * 2
    return tl.load(p_words), tl.load(p_words + 1)


@triton.jit
def variant_errors(differences, B: tl.constexpr):
    """LUT errors of M's variants 1, 2 and 3 beyond that of variant 0, in eighths, int32 [G]."""
    none: tl.constexpr = _VARIANT_BIAS * B
    low = differences & 0x7FF
    return low - none, ((differences >> 11) & 0x3FF) - none, (differences >> 21) - none


@triton.jit
def select_by_variant(e1, e2, e3):
    """Rule ``lut``: M's variant with the smallest error; ties take the smallest."""
    variant = tl.where(e1 < 0, 1, 0)
    best = tl.minimum(e1, 0)
    variant = tl.where(e2 < best, 2, variant)
    best = tl.minimum(best, e2)
    return tl.where(e3 < best, 3, variant)


@triton.jit
def select_online(differences, B: tl.constexpr, DIALECTS: tl.constexpr):
    """The variants of the blocks by the book's online rule, int32 [G].

    The rule ``two_stage`` (BlockDialect) takes the better of the pair of M, and the even id if both
    are as good.
    """
    if DIALECTS == 16:
        return tl.where(differences < _VARIANT_BIAS * B, 1, 0)
    else:
        e1, e2, e3 = variant_errors(differences, B)
        return select_by_variant(e1, e2, e3)


@triton.jit
def _result_words(x, indices, variant, low, high, ASM: tl.constexpr):
    """Result bytes of four elements in a word, the first one lowest, int32 [G, B / 4].

    Args:
        x: :func:`four` of the numbers, for their signs, which become bits 7; a 0 has none.
        indices: of :func:`look_up`.
        variant: int32 [G], 0..3.
        low, high: eight result bytes, bit 7 set in all but 0; int32 [G, 1] or a number.
    """
    x0, x1, x2, x3 = x
    i0, i1, i2, i3 = indices
    if ASM:
        return tl.inline_asm_elementwise(
            _WORDS_ASM,
            _WORDS_CONSTRAINTS,
            [i0, i1, i2, i3, variant[:, None], low, high, x0, x1, x2, x3],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        shift = variant[:, None] * 8
        b0 = _result_byte(x0, i0 >> shift, low, high)
        b1 = _result_byte(x1, i1 >> shift, low, high)
        b2 = _result_byte(x2, i2 >> shift, low, high)
        b3 = _result_byte(x3, i3 >> shift, low, high)
        return b0 | (b1 << 8) | (b2 << 16) | (b3 << 24)


@triton.jit
def _result_byte(x, index, low, high):
    """The interpreter's way: the byte of an index in bits 0..2, its bit 7 kept if x is negative."""
    bits = x.to(tl.int32, bitcast=True)
    word = tl.where((index & 4) != 0, high, low)
    byte = word >> (8 * (index & 3))
    return byte & tl.where(bits < 0, 0xFF, 0x7F)


@triton.jit
def e4m3_words(x, indices, delta, row, variant, p_book, DIALECTS: tl.constexpr, ASM: tl.constexpr):
    """The E4M3 bytes of rounded blocks, four in a word, int32 [G, B / 4].

    Args:
        x, indices, variant: see :func:`_result_words`.
        delta, row: of each block; row is 15 - M.
    """
    dialect = row * (DIALECTS // 8) + variant
    p_words = p_book + (delta * DIALECTS + dialect) * 2
    low = tl.load(p_words)[:, None]
    high = tl.load(p_words + 1)[:, None]
    return _result_words(x, indices, variant, low, high, ASM)


@triton.jit
def index_words(x, indices, variant, ASM: tl.constexpr):
    """The indices 0..7 of rounded blocks with x's sign in bit 7; as :func:`e4m3_words`."""
    low = tl.full((1, 1), 0x83828100 - (1 << 32), tl.int32)
    high = tl.full((1, 1), 0x87868584 - (1 << 32), tl.int32)
    return _result_words(x, indices, variant, low, high, ASM)


@triton.jit
def bytes_of_words(words):
    """Bytes as int32, [G, B / 4] -> [G, B]."""
    byte = (words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 0xFF
    return tl.reshape(byte, (words.shape[0], words.shape[1] * 4))


@triton.jit
def e4m3_values(byte):
    """E4M3 bytes (no NaN) as float32, exact, subnormals included."""
    bits = byte.to(tl.int32)
    # with its exponent field in place, an E4M3 number reads as float32 2**120 times too small
    small = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
    return small * 1329227995784915872903807060280344576.0  # 2**120
