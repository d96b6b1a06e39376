"""Decoding packed weights by byte permutes: into the operands of a matrix product, or to memory.

    codes uint8 [N, Kp/2], meta uint8 [N, Kp/B]  ->  h * 2**(4 - delta) as E4M3, bfloat16 or float16

With the row scale ``2**(R - 5)`` beside them these are the weights, exactly. A 32-bit word of codes
holds eight elements, element i in nibble i. The eight possible results of a block lie in two words
(one byte each), which the meta byte selects from a table; ``prmt`` looks four of them up at once::

    w            7654 3210          nibbles of the word: sign, index
    w & 0x7...7  prmt(low, high)    bytes 3 2 1 0; 16 bits further on bytes 7 6 5 4
    w << 4, w    bit 7 of the bytes of w holds the signs 7 5 3 1, of w << 4 the signs 6 4 2 0

Nine instructions make eight E4M3 bytes, fifteen make eight 16-bit numbers, whose low and high bytes
have tables of their own. The stored layout is read as it is: nothing is rearranged while loading.

Results leave the permutes in *parts*, tensors whose columns are every 8 elements' first four and
last four (E4M3), or its four pairs (16 bits). A product over K may take its columns in any order,
so the GEMM multiplies part by part. In memory the E4M3 parts are the halves of a row (the order of
operands, see :mod:`dialect_kernels.gpu.layout`); :func:`joined_sixteen` restores the natural order.

Functions that take ``ASM`` have two bodies with the same results: inline PTX, and arithmetic for
Triton's interpreter. (Tables, layout and instructions: ours.)
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..device_tables import kept_tables
from ..formatbook import E4M3_WINDOW, LOWEST_EXPONENT, NAN_ROW, Formatbook
from ..packed import PackedTensor
from .launch import launch
from .layout import interpreted
from .rounding import bytes_of_words, e4m3_values, power_of_two

__all__ = [
    "decode_bf16",
    "decode_e4m3",
    "e4m3_parts",
    "e4m3_table",
    "joined_sixteen",
    "operand_of_bytes",
    "operand_of_words",
    "sixteen_of_words",
    "sixteen_parts",
    "sixteen_table",
]

_LOWEST_EXPONENT = tl.constexpr(LOWEST_EXPONENT)
_NAN_ROW = tl.constexpr(NAN_ROW)
_ROWS = 32
_COLUMNS = 256


# Operands: two results, the word, then the table words, of which Triton passes a copy for every
# element that it packs into the word.
def _e4m3_asm(copies: int) -> tl.constexpr:
    low, high = 3, 3 + copies
    return tl.constexpr(f"""{{
.reg .b32 t, u, a, b, c, d;
and.b32 t, $2, 0x77777777;
shr.u32 u, t, 16;
prmt.b32 a, ${low}, ${high}, t;
prmt.b32 b, ${low}, ${high}, u;
shl.b32 u, $2, 4;
prmt.b32 c, u, $2, 0x5140;
prmt.b32 d, u, $2, 0x7362;
lop3.b32 $0, c, 0x80808080, a, 0xEA;
lop3.b32 $1, d, 0x80808080, b, 0xEA;
}}""")


_E4M3_ASM = _e4m3_asm(4)
_E4M3_CONSTRAINTS = tl.constexpr("=r,=r" + ",r" * 9)
_E4M3_OF_WORDS_ASM = _e4m3_asm(1)
_E4M3_OF_WORDS_CONSTRAINTS = tl.constexpr("=r,=r" + ",r" * 3)


# Operands: four results, the word, then the four table words, of which Triton passes a copy for
# every element that it packs into the word.
def _sixteen_asm(copies: int) -> tl.constexpr:
    low0, low1, high0, high1 = (5 + i * copies for i in range(4))
    return tl.constexpr(f"""{{
.reg .b32 t, u, a, b, c, d, e;
and.b32 t, $4, 0x77777777;
shr.u32 u, t, 16;
shl.b32 e, $4, 4;
prmt.b32 a, ${low0}, ${low1}, t;
prmt.b32 b, ${high0}, ${high1}, t;
prmt.b32 c, ${low0}, ${low1}, u;
prmt.b32 d, ${high0}, ${high1}, u;
prmt.b32 t, e, $4, 0x5140;
prmt.b32 u, e, $4, 0x7362;
lop3.b32 b, t, 0x80808080, b, 0xEA;
lop3.b32 d, u, 0x80808080, d, 0xEA;
prmt.b32 $0, a, b, 0x5140;
prmt.b32 $1, a, b, 0x7362;
prmt.b32 $2, c, d, 0x5140;
prmt.b32 $3, c, d, 0x7362;
}}""")


_SIXTEEN_ASM = _sixteen_asm(2)
_SIXTEEN_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r" + ",r" * 9)
_SIXTEEN_OF_WORDS_ASM = _sixteen_asm(1)
_SIXTEEN_OF_WORDS_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r" + ",r" * 5)


def _by_meta(book: Formatbook) -> list[tuple[int, ...]]:
    """E4M3 bytes of the eight magnitudes for each meta byte; reserved deltas are read as 13."""
    ids = (1 << book.id_bits) - 1
    return [
        book.e4m3_lut[min(meta >> book.id_bits, E4M3_WINDOW)][meta & ids][:8] for meta in range(256)
    ]


@kept_tables
def e4m3_table(book: Formatbook, device: torch.device) -> torch.Tensor:
    """E4M3 bytes of a block's eight magnitudes by meta byte, int64 [256]: index 0 lowest."""
    table = torch.tensor(_by_meta(book), dtype=torch.uint8)
    return table.view(torch.int64).flatten().to(device)


@kept_tables
def sixteen_table(book: Formatbook, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Magnitudes as `dtype` by meta byte, int64 [256, 2]: eight low bytes, then eight high ones.

    Args:
        book: the formatbook.
        dtype: bfloat16 or float16; both hold every ``h * 2**(4 - delta)`` exactly.
        device: where the table is needed.
    """
    e4m3 = torch.tensor(_by_meta(book), dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = e4m3.to(torch.float32).to(dtype).view(torch.uint8).view(256, 8, 2)
    return numbers.transpose(1, 2).contiguous().view(torch.int64).flatten(1).to(device)


@triton.jit
def _load(p, mask, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(p)
    else:
        return tl.load(p, mask=mask, other=0)


@triton.jit
def _load_meta(p_meta, o_row, first, padded, B: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """Meta bytes of the blocks of columns first..first+BK-1 of rows, int32 [BN * blocks].

    A row of four is read as a word: copies of fewer bytes to a thread are not asynchronous.
    """
    BN: tl.constexpr = o_row.shape[0]
    BLOCKS: tl.constexpr = BK // B
    if EVEN and BLOCKS == 4:
        word = tl.load(p_meta.to(tl.pointer_type(tl.int32)) + o_row * (padded // BK) + first // BK)
        b_meta = (word[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 0xFF
        return tl.reshape(b_meta, (BN * BLOCKS,))
    else:
        o_block = first // B + tl.arange(0, BLOCKS)
        p_block = p_meta + o_row[:, None] * (padded // B) + o_block[None, :]
        b_meta = _load(p_block, (o_block < padded // B)[None, :], EVEN)
        return tl.reshape(b_meta, (BN * BLOCKS,)).to(tl.int32)


@triton.jit
def _load_codes(
    p_codes, o_row, first, padded, B: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr
):
    """Codes of columns first..first+BK-1 of rows, integers like `p_codes` [BN, blocks, ..].

    Loaded in two dimensions: only then do compilers make neighbouring lanes read neighbouring
    bytes, and order them in shared memory so that no bank is needed twice at a time.
    """
    BN: tl.constexpr = o_row.shape[0]
    EACH: tl.constexpr = p_codes.dtype.element_ty.primitive_bitwidth // 4  # codes of an integer
    o_code = first // EACH + tl.arange(0, BK // EACH)
    p_code = p_codes + o_row[:, None] * (padded // EACH) + o_code[None, :]
    b_code = _load(p_code, (o_code < padded // EACH)[None, :], EVEN)
    return tl.reshape(b_code, (BN, BK // B, B // EACH))


@triton.jit
def _load_pair(p_table, entry, BN: tl.constexpr):
    """Two neighbouring words of the table by one load for each of [BN * blocks] entries.

    Returns:
        Both int32 [BN, blocks, 1]. In one dimension, because neighbouring lanes must then write
        neighbouring places of shared memory, wherever in the table they read.
    """
    pair = tl.load(p_table + entry)
    pair = tl.reshape(pair, (BN, entry.shape[0] // BN, 1))
    return pair.to(tl.int32), (pair >> 32).to(tl.int32)


@triton.jit
def _block_bytes(word, low, high, shift):
    """The table byte that the nibble at `shift` selects, its sign bit apart (both int32)."""
    code = word >> shift
    index = code & 7
    byte = (tl.where(index < 4, low, high) >> (8 * (index & 3))) & 0xFF
    return byte, (code & 8) << 4


@triton.jit
def _words(b_code):
    """For the interpreter: every integer of codes replaced by the word of 8 codes it lies in."""
    BN: tl.constexpr = b_code.shape[0]
    BLOCKS: tl.constexpr = b_code.shape[1]
    WIDTH: tl.constexpr = b_code.shape[2]
    EACH: tl.constexpr = 32 // b_code.dtype.primitive_bitwidth
    b_code = tl.reshape(b_code, (BN, BLOCKS, WIDTH // EACH, EACH)).to(tl.int32)
    shift = tl.arange(0, EACH) * (32 // EACH)
    word = tl.sum(b_code << shift[None, None, None, :], axis=3, keep_dims=True)
    return tl.reshape(tl.broadcast_to(word, b_code.shape), (BN, BLOCKS, WIDTH))


@triton.jit
def e4m3_parts(
    p_codes,
    p_meta,
    p_table,
    o_row,
    first,
    padded,
    B: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    """Columns first..first+BK-1 of rows `o_row` as E4M3 bytes, two uint8 [BN, BK/2].

    Column i of part j is element ``8 (i // 4) + 4 j + i % 4``; zeros beyond the row's end.

    Args:
        o_row: int64 [BN], rows to read.
        first, padded: multiples of B; padded is Kp.
        EVEN: whether all columns lie inside the row.
    """
    low, high = _load_pair(p_table, _load_meta(p_meta, o_row, first, padded, B, BK, EVEN), BN)
    b_code = _load_codes(p_codes, o_row, first, padded, B, BK, EVEN)
    if ASM:
        part0, part1 = tl.inline_asm_elementwise(
            _E4M3_ASM,
            _E4M3_CONSTRAINTS,
            [b_code, tl.broadcast_to(low, b_code.shape), tl.broadcast_to(high, b_code.shape)],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    else:
        word = _words(b_code)
        shift = (tl.arange(0, B // 2) % 4 * 4)[None, None, :]
        byte, sign = _block_bytes(word, low, high, shift)
        part0 = (byte | sign).to(tl.uint8)
        byte, sign = _block_bytes(word, low, high, shift + 16)
        part1 = (byte | sign).to(tl.uint8)
    return tl.reshape(part0, (BN, BK // 2)), tl.reshape(part1, (BN, BK // 2))


@triton.jit
def _sixteen_bits(word, low0, low1, high0, high1, shift):
    low, sign = _block_bytes(word, low0, low1, shift)
    high, _ = _block_bytes(word, high0, high1, shift)
    return (low | ((high | sign) << 8)).to(tl.uint16)


@triton.jit
def sixteen_parts(
    p_codes,
    p_meta,
    p_table,
    o_row,
    first,
    padded,
    B: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    """As :func:`e4m3_parts`, but the bits of 16-bit numbers, four uint16 [BN, BK/4].

    Column i of part j is element ``8 (i // 2) + 2 j + i % 2``.
    """
    b_meta = _load_meta(p_meta, o_row, first, padded, B, BK, EVEN)
    p_pair = p_codes.to(tl.pointer_type(tl.uint16))
    b_code = _load_codes(p_pair, o_row, first, padded, B, BK, EVEN)
    return _sixteen_of(b_code, b_meta, p_table, ASM)


@triton.jit
def _sixteen_of(b_code, b_meta, p_table, ASM: tl.constexpr):
    """The parts of :func:`sixteen_parts` from codes and meta bytes that have been loaded.

    Args:
        b_code: four codes each, uint16 [BN, blocks, B/4].
        b_meta: int32 [BN * blocks].
        p_table: of :func:`sixteen_table`.
    """
    BN: tl.constexpr = b_code.shape[0]
    WIDTH: tl.constexpr = b_code.shape[2]
    COLUMNS: tl.constexpr = b_code.shape[1] * WIDTH
    low0, low1 = _load_pair(p_table, b_meta * 2, BN)
    high0, high1 = _load_pair(p_table, b_meta * 2 + 1, BN)
    if ASM:
        part0, part1, part2, part3 = tl.inline_asm_elementwise(
            _SIXTEEN_ASM,
            _SIXTEEN_CONSTRAINTS,
            [
                b_code,
                tl.broadcast_to(low0, b_code.shape),
                tl.broadcast_to(low1, b_code.shape),
                tl.broadcast_to(high0, b_code.shape),
                tl.broadcast_to(high1, b_code.shape),
            ],
            dtype=(tl.uint16, tl.uint16, tl.uint16, tl.uint16),
            is_pure=True,
            pack=2,
        )
    else:
        word = _words(b_code)
        shift = (tl.arange(0, WIDTH) % 2 * 4)[None, None, :]
        part0 = _sixteen_bits(word, low0, low1, high0, high1, shift)
        part1 = _sixteen_bits(word, low0, low1, high0, high1, shift + 8)
        part2 = _sixteen_bits(word, low0, low1, high0, high1, shift + 16)
        part3 = _sixteen_bits(word, low0, low1, high0, high1, shift + 24)
    return (
        tl.reshape(part0, (BN, COLUMNS)),
        tl.reshape(part1, (BN, COLUMNS)),
        tl.reshape(part2, (BN, COLUMNS)),
        tl.reshape(part3, (BN, COLUMNS)),
    )


@triton.jit
def _halves(word):
    """The halves of words as neighbours, [BN, blocks, W] -> uint16 [BN, blocks * W * 2]."""
    pair = tl.join((word & 0xFFFF).to(tl.uint16), ((word >> 16) & 0xFFFF).to(tl.uint16))
    return tl.reshape(pair, (word.shape[0], word.shape[1] * word.shape[2] * 2))


@triton.jit
def sixteen_of_words(b_word, b_meta, p_table, ASM: tl.constexpr):
    """The parts of :func:`sixteen_parts` from words of eight codes and meta bytes.

    For codes that are loaded in pieces of less than four bytes: a thread does not have neighbouring
    pieces then, and Triton would pack into a word what belongs to different rows.

    Args:
        b_word: int32 [BN, blocks, B/8].
        b_meta: int32 [BN * blocks].
        p_table: of :func:`sixteen_table`.
    """
    BN: tl.constexpr = b_word.shape[0]
    low0, low1 = _load_pair(p_table, b_meta * 2, BN)
    high0, high1 = _load_pair(p_table, b_meta * 2 + 1, BN)
    if ASM:
        part0, part1, part2, part3 = tl.inline_asm_elementwise(
            _SIXTEEN_OF_WORDS_ASM,
            _SIXTEEN_OF_WORDS_CONSTRAINTS,
            [
                b_word,
                tl.broadcast_to(low0, b_word.shape),
                tl.broadcast_to(low1, b_word.shape),
                tl.broadcast_to(high0, b_word.shape),
                tl.broadcast_to(high1, b_word.shape),
            ],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        part0 = _sixteen_word(b_word, low0, low1, high0, high1, 0)
        part1 = _sixteen_word(b_word, low0, low1, high0, high1, 8)
        part2 = _sixteen_word(b_word, low0, low1, high0, high1, 16)
        part3 = _sixteen_word(b_word, low0, low1, high0, high1, 24)
    return _halves(part0), _halves(part1), _halves(part2), _halves(part3)


@triton.jit
def _sixteen_word(word, low0, low1, high0, high1, shift):
    """The interpreter's way: the numbers of the nibbles at `shift` and behind it, in a word."""
    first = _sixteen_bits(word, low0, low1, high0, high1, shift).to(tl.int32)
    return first | (_sixteen_bits(word, low0, low1, high0, high1, shift + 4).to(tl.int32) << 16)


@triton.jit
def joined_sixteen(part0, part1, part2, part3, BN: tl.constexpr, BK: tl.constexpr):
    """The parts as one tensor in the order of the elements, uint16 [BN, BK]."""
    joined = tl.join(tl.join(part0, part2), tl.join(part1, part3))
    joined = tl.reshape(joined, (BN, BK // 8, 2, 2, 2))
    return tl.reshape(tl.permute(joined, (0, 1, 3, 4, 2)), (BN, BK))


@triton.jit
def operand_of_bytes(words, EIGHT: tl.constexpr, ASM: tl.constexpr):
    """E4M3 numbers, four in each word [R, W], as an operand of a product [R, 4 W].

    Args:
        words: int32.
        EIGHT: whether the operand is E4M3; else the same numbers in bfloat16.
    """
    if EIGHT and ASM:
        pair = tl.join(words, words)
        copies = tl.reshape(tl.join(pair, pair), (words.shape[0], words.shape[1] * 4))
        bytes_ = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [copies], dtype=tl.uint8, is_pure=True, pack=4
        )
        return bytes_.to(tl.float8e4nv, bitcast=True)
    elif EIGHT:
        return bytes_of_words(words).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return e4m3_values(bytes_of_words(words)).to(tl.bfloat16)


@triton.jit
def operand_of_words(b_word, b_meta, p_table, EIGHT: tl.constexpr, ASM: tl.constexpr):
    """Decoded rows as an operand of a product, in the order of the elements: [BN, columns].

    Args:
        b_word, b_meta: as for :func:`sixteen_of_words`.
        p_table: of :func:`e4m3_table` if EIGHT, else of :func:`sixteen_table` in bfloat16.
        EIGHT: whether the operand is E4M3; else the same numbers in bfloat16.
    """
    BN: tl.constexpr = b_word.shape[0]
    COLUMNS: tl.constexpr = b_word.shape[1] * b_word.shape[2] * 8
    if EIGHT:
        low, high = _load_pair(p_table, b_meta, BN)
        if ASM:
            part0, part1 = tl.inline_asm_elementwise(
                _E4M3_OF_WORDS_ASM,
                _E4M3_OF_WORDS_CONSTRAINTS,
                [
                    b_word,
                    tl.broadcast_to(low, b_word.shape),
                    tl.broadcast_to(high, b_word.shape),
                ],
                dtype=(tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            part0 = _e4m3_word(b_word, low, high, 0)
            part1 = _e4m3_word(b_word, low, high, 16)
        words = tl.reshape(tl.join(part0, part1), (BN, COLUMNS // 4))
        return operand_of_bytes(words, True, ASM)
    else:
        part0, part1, part2, part3 = sixteen_of_words(b_word, b_meta, p_table, ASM)
        bits = joined_sixteen(part0, part1, part2, part3, BN, COLUMNS)
        return bits.to(tl.bfloat16, bitcast=True)


@triton.jit
def _e4m3_word(word, low, high, shift):
    """The interpreter's way: the bytes of the four nibbles from `shift` on, in a word."""
    result = tl.zeros(word.shape, tl.int32)
    for i in tl.static_range(4):
        byte, sign = _block_bytes(word, low, high, shift + 4 * i)
        result |= (byte | sign) << (8 * i)
    return result


@triton.jit(do_not_specialize=["rows", "padded"])
def _decode_kernel(
    p_codes,
    p_meta,
    p_row_exponent,
    p_table,
    p_w,
    p_scale,
    rows,
    padded,
    B: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    E4M3: tl.constexpr,
    ASM: tl.constexpr,
):
    """A tile of the weight as E4M3 bytes with scales, or as bfloat16 values. Grid (N/BN, Kp/BK).

    E4M3 is written in the order of operands, bfloat16 in the natural one. Rows beyond the weight's
    last (padding of the output) repeat it.
    """
    padded = padded // 16 * 16
    o_row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_source = tl.minimum(o_row, rows - 1)
    first = tl.program_id(1) * BK
    p_out = p_w + o_row[:, None] * padded
    exponent = tl.load(p_row_exponent + o_source).to(tl.int32)
    scale = power_of_two(tl.maximum(exponent, _LOWEST_EXPONENT) - 5)
    scale = tl.where(exponent == _NAN_ROW, float("nan"), scale)
    if E4M3:
        part0, part1 = e4m3_parts(
            p_codes, p_meta, p_table, o_source, first, padded, B, BN, BK, False, ASM
        )
        o_half = first // 2 + tl.arange(0, BK // 2)
        m_half = (o_half < padded // 2)[None, :]
        tl.store(p_out + o_half[None, :], part0, mask=m_half)
        tl.store(p_out + padded // 2 + o_half[None, :], part1, mask=m_half)
        if first == 0:
            tl.store(p_scale + o_row, scale)
    else:
        part0, part1, part2, part3 = sixteen_parts(
            p_codes, p_meta, p_table, o_source, first, padded, B, BN, BK, False, ASM
        )
        bits = joined_sixteen(part0, part1, part2, part3, BN, BK)
        values = bits.to(tl.bfloat16, bitcast=True).to(tl.float32) * scale[:, None]
        o_column = first + tl.arange(0, BK)
        m_column = (o_column < padded)[None, :]
        tl.store(p_out + o_column[None, :], values.to(tl.bfloat16), mask=m_column)


def _launch(
    p: PackedTensor, table: torch.Tensor, w: torch.Tensor, scale: torch.Tensor | None
) -> None:
    """Fill `w` [N rounded up to whole programs, Kp] and `scale`; one launch."""
    if p.shape[0] == 0:
        return
    rows, padded = w.shape
    launch(
        _decode_kernel,
        (rows // _ROWS, max(1, -(-padded // _COLUMNS))),
        (p.codes, p.meta, p.row_exponent, table, w, scale, p.shape[0], padded),
        {
            "B": p.block_size,
            "BN": _ROWS,
            "BK": _COLUMNS,
            "E4M3": scale is not None,
            "ASM": not interpreted(),
        },
        num_warps=4,
    )


def _whole_programs(rows: int) -> int:
    return -(-rows // _ROWS) * _ROWS


def decode_e4m3(
    p: PackedTensor, into: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as FP8, exactly, padded for a library's GEMM.

    Args:
        p: packed weight [N, K] on a GPU (or anywhere, in Triton's interpreter).
        into: an earlier result for a weight of this shape, to be overwritten; None takes new
            memory.

    Returns:
        (float8_e4m3fn [Np, Kp], columns in the order of operands; float32 scale [Np]): Kp as in the
        packed tensor, Np is N rounded up to 32; what is beyond N has no meaning. A value is
        ``e4m3 * scale``.
    """
    rows, padded = _whole_programs(p.shape[0]), p.codes.shape[1] * 2
    if into is None:
        into = (
            torch.empty(rows, padded, dtype=torch.float8_e4m3fn, device=p.device),
            torch.empty(rows, dtype=torch.float32, device=p.device),
        )
    w, scale = into
    _launch(p, e4m3_table(p.book, p.device), w.view(torch.uint8), scale)
    return w, scale


def decode_bf16(p: PackedTensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """The weight as bfloat16, padded: the bytes of ``p.dequantize(bfloat16)``.

    Args:
        p, into: as for :func:`decode_e4m3`.

    Returns:
        [Np, Kp], of which [N, K] has a meaning.
    """
    rows, padded = _whole_programs(p.shape[0]), p.codes.shape[1] * 2
    if into is None:
        into = torch.empty(rows, padded, dtype=torch.bfloat16, device=p.device)
    _launch(p, sixteen_table(p.book, torch.bfloat16, p.device), into, None)
    return into
