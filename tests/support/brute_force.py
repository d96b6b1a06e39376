"""The format by brute force, written from docs/reference/format.md alone and from nothing else.

Everything that decides a byte is a Python integer: a float32 is `n * 2**-149`, a grid magnitude is
`h * 2**(E - 1)`, so both are whole numbers of 2**-149 and every distance and every squared error is
exact.  There are no tables but the ones typed below from sections 1 and 4; rounding is a search
over all eight magnitudes, selection a sum of squared errors over all dialects.  Slow on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

ONE = 149  # a float32 is a whole number of 2**-149

# Section 1, typed from the page: id -> (half-units, thresholds t1..t7, first and last beneficial
# cell).
DIALECT_FP4_PAGE = {
    0: ((0, 1, 2, 3, 4, 6, 11, 15), (1, 3, 5, 7, 10, 17, 26), (20, 25)),
    1: ((0, 1, 2, 3, 4, 6, 9, 15), (1, 3, 5, 7, 10, 15, 24), (15, 19)),
    2: ((0, 1, 2, 3, 4, 6, 11, 14), (1, 3, 5, 7, 10, 17, 25), (20, 24)),
    3: ((0, 1, 2, 3, 4, 6, 9, 14), (1, 3, 5, 7, 10, 15, 23), (15, 19)),
    4: ((0, 1, 2, 3, 4, 6, 10, 13), (1, 3, 5, 7, 10, 16, 23), (18, 22)),
    5: ((0, 1, 2, 3, 4, 6, 8, 13), (1, 3, 5, 7, 10, 14, 21), (14, 17)),
    6: ((0, 1, 2, 3, 4, 6, 10, 12), (1, 3, 5, 7, 10, 16, 22), (18, 21)),
    7: ((0, 1, 2, 3, 4, 6, 8, 12), (1, 3, 5, 7, 10, 14, 20), (14, 17)),
    8: ((0, 1, 2, 3, 4, 6, 9, 11), (1, 3, 5, 7, 10, 15, 20), (16, 19)),
    9: ((0, 1, 2, 3, 4, 6, 7, 11), (1, 3, 5, 7, 10, 13, 18), (13, 15)),
    10: ((0, 1, 2, 3, 4, 6, 9, 10), (1, 3, 5, 7, 10, 15, 19), (16, 18)),
    11: ((0, 1, 2, 3, 4, 6, 7, 10), (1, 3, 5, 7, 10, 13, 17), (13, 15)),
    12: ((0, 1, 2, 3, 4, 6, 8, 9), (1, 3, 5, 7, 10, 14, 17), (15, 16)),
    13: ((0, 1, 2, 3, 4, 6, 7, 9), (1, 3, 5, 7, 10, 13, 16), (13, 14)),
    14: ((0, 1, 2, 3, 4, 6, 7, 8), (1, 3, 5, 7, 10, 13, 15), (13, 14)),
    15: ((0, 1, 2, 3, 4, 5, 6, 8), (1, 3, 5, 7, 9, 11, 14), (9, 10)),
}

# Section 4, typed from the page: M -> (v2, v3).
SEMANTIC_32_PAGE = {
    15: ((0, 1, 2, 4, 6, 8, 11, 15), (0, 1, 3, 5, 7, 9, 12, 15)),
    14: ((0, 1, 2, 4, 6, 8, 11, 14), (0, 1, 3, 5, 7, 9, 11, 14)),
    13: ((0, 1, 2, 4, 6, 8, 10, 13), (0, 1, 3, 5, 7, 9, 11, 13)),
    12: ((0, 1, 2, 4, 6, 8, 10, 12), (0, 1, 2, 3, 5, 7, 9, 12)),
    11: ((0, 1, 2, 3, 5, 7, 9, 11), (0, 1, 2, 3, 4, 6, 8, 11)),
    10: ((0, 1, 2, 3, 4, 6, 8, 10), (0, 1, 2, 3, 4, 5, 7, 10)),
    9: ((0, 1, 2, 3, 4, 5, 7, 9), (0, 1, 2, 3, 4, 5, 6, 9)),
    8: ((0, 1, 2, 3, 5, 6, 7, 8), (0, 1, 2, 3, 4, 5, 7, 8)),
}


@dataclass(frozen=True)
class Book:
    """`grids[id]` is the dialect's eight half-units; `id_bits` is the id's width in a meta byte."""

    name: str
    id_bits: int
    grids: tuple[tuple[int, ...], ...]
    stored_window: int


def _semantic_grids() -> tuple[tuple[int, ...], ...]:
    grids = []
    for largest in range(15, 7, -1):
        even = 2 * (15 - largest)
        grids += [DIALECT_FP4_PAGE[even][0], DIALECT_FP4_PAGE[even + 1][0]]
        grids += list(SEMANTIC_32_PAGE[largest])
    return tuple(grids)


FP4 = Book("dialect_fp4", 4, tuple(DIALECT_FP4_PAGE[i][0] for i in range(16)), 13)
SEM = Book("semantic_32", 5, _semantic_grids(), 7)
BOOKS = (FP4, SEM)


@dataclass(frozen=True)
class Packed:
    """The storage fields of section 3; `halves` and `exponents` say the same as exact numbers.

    `halves[n][k]` is the signed half-unit of an element (padding included) and
    `exponents[n][b]` the effective exponent of a block, so a value is `halves * 2**(E - 1)`.
    """

    codes: np.ndarray  # uint8 [N, Kp / 2]
    meta: np.ndarray  # uint8 [N, Kp / B]
    row_exponent: np.ndarray  # int8 [N]
    shape: tuple[int, int]
    book: Book
    block_size: int
    halves: np.ndarray  # int64 [N, Kp]
    deltas: np.ndarray  # int64 [N, Kp / B]

    def values(self) -> np.ndarray:
        """float64 [N, K], exact: four significant bits and an exponent of at most 8 bits."""
        rows, columns = self.shape
        exponent = self.row_exponent.astype(np.int64)[:, None] - self.deltas - 1
        spread = np.repeat(exponent, self.block_size, axis=1)
        return np.ldexp(self.halves.astype(np.float64), spread)[:rows, :columns]


def whole(value: float) -> int:
    """The float32 number `value` as a whole number of 2**-149."""
    number = Fraction(float(value)) * 2**ONE
    assert number.denominator == 1
    return number.numerator


def nearest_index(grid: tuple[int, ...], magnitude: int, exponent: int) -> int:
    """Index of the half-unit nearest to `magnitude` (in 2**-149); if two are, the larger."""
    best, best_distance = 0, None
    for index, half in enumerate(grid):
        distance = abs(magnitude - (half << (exponent - 1 + ONE)))
        if best_distance is None or distance <= best_distance:
            best, best_distance = index, distance
    return best


def nearest_indices(grid: tuple[int, ...], scaled: np.ndarray) -> np.ndarray:
    """`nearest_index` for many scaled magnitudes m, in float64, uint8 of the same shape.

    Distances are exact wherever two of them can be equal: there m lies within a factor two of the
    half-units, or next to 1/4.
    """
    best = np.zeros(scaled.shape, np.uint8)
    least = np.abs(scaled - grid[0] / 2)
    for index, half in enumerate(grid[1:], 1):
        distance = np.abs(scaled - half / 2)
        closer = distance <= least
        best[closer] = index
        least = np.minimum(least, distance)
    return best


def cell(magnitude: int, exponent: int) -> int:
    """k = min(31, floor(4 m))."""
    return min(31, magnitude >> (exponent - 2 + ONE))


def block_exponent(magnitudes: list[int]) -> int:
    """e = floor(log2(max)) - 2, clamped below at -120; a block of zeros has -120."""
    largest = max(magnitudes)
    if largest == 0:
        return -120
    floor_log2 = largest.bit_length() - 1 - ONE
    return max(-120, floor_log2 - 2)


def block_maximum(cells: list[int]) -> int:
    """M, the largest half-unit."""
    rounded = (max(cells) + 1) >> 1
    return min(15, max(8, rounded))


def squared_error(grid: tuple[int, ...], magnitudes: list[int], exponent: int) -> int:
    """The block's squared error in 2**-298, exactly."""
    total = 0
    for magnitude in magnitudes:
        half = grid[nearest_index(grid, magnitude, exponent)]
        total += (magnitude - (half << (exponent - 1 + ONE))) ** 2
    return total


def select_mse(book: Book, magnitudes: list[int], exponent: int) -> int:
    errors = [squared_error(grid, magnitudes, exponent) for grid in book.grids]
    return errors.index(min(errors))


def select_two_stage(book: Book, magnitudes: list[int], exponent: int) -> int:
    assert book is FP4
    cells = [cell(m, exponent) for m in magnitudes]
    even = 2 * (15 - block_maximum(cells))
    count = {}
    for dialect in (even, even + 1):
        first, last = DIALECT_FP4_PAGE[dialect][2]
        count[dialect] = sum(first <= k <= last for k in cells)
    return even + 1 if count[even + 1] > count[even] else even


def centre_error(grid: tuple[int, ...], k: int) -> int:
    """Squared error at the centre of cell k, in (1/8)**2: the centre is 2k+1, a half-unit is 4."""
    distances = [abs(2 * k + 1 - 4 * half) for half in grid]
    return min(distances) ** 2


def select_lut(book: Book, magnitudes: list[int], exponent: int) -> int:
    assert book is SEM
    cells = [cell(m, exponent) for m in magnitudes]
    first = 4 * (15 - block_maximum(cells))
    sums = [sum(centre_error(book.grids[first + v], k) for k in cells) for v in range(4)]
    return first + sums.index(min(sums))


def squared_errors(book: Book, block: np.ndarray) -> list[int]:
    """Every dialect's exact squared error for one block at its own exponent."""
    magnitudes = [abs(whole(value)) for value in block]
    exponent = block_exponent(magnitudes)
    return [squared_error(grid, magnitudes, exponent) for grid in book.grids]


SELECT = {"mse": select_mse, "two_stage": select_two_stage, "lut": select_lut}


def quantize(
    x: np.ndarray,
    book: Book = FP4,
    block_size: int = 32,
    rule: str = "mse",
    window: int | None = None,
) -> Packed:
    """Sections 1 to 4 for `x`, float32 [N, K] of finite numbers."""
    assert x.dtype == np.float32
    assert x.ndim == 2
    window = book.stored_window if window is None else window
    rows, columns = x.shape
    blocks = -(-columns // block_size)
    padded = blocks * block_size
    halves = np.zeros((rows, padded), np.int64)
    index = np.zeros((rows, padded), np.uint8)
    negative = np.zeros((rows, padded), bool)
    meta = np.zeros((rows, blocks), np.uint8)
    deltas = np.zeros((rows, blocks), np.int64)
    row_exponent = np.full(rows, -120, np.int8)
    for n in range(rows):
        signed = [whole(v) for v in x[n]] + [0] * (padded - columns)
        cut = [signed[b * block_size : (b + 1) * block_size] for b in range(blocks)]
        own = [block_exponent([abs(s) for s in block]) for block in cut]
        largest = max(own, default=-120)
        row_exponent[n] = largest
        for b, block in enumerate(cut):
            delta = min(largest - own[b], window)
            exponent = largest - delta
            magnitudes = [abs(s) for s in block]
            if all(cell(m, exponent) == 0 for m in magnitudes):
                continue
            dialect = SELECT[rule](book, magnitudes, exponent)
            # with a wider window than the stored one, delta has no byte; `deltas` holds it
            meta[n, b] = ((delta << book.id_bits) | dialect) & 0xFF
            deltas[n, b] = delta
            for i, number in enumerate(block):
                k = b * block_size + i
                index[n, k] = nearest_index(book.grids[dialect], abs(number), exponent)
                half = book.grids[dialect][index[n, k]]
                negative[n, k] = number < 0 and half > 0
                halves[n, k] = -half if number < 0 else half
    code = index | (negative.astype(np.uint8) << 3)
    codes = code[:, 0::2] | (code[:, 1::2] << 4)
    return Packed(codes, meta, row_exponent, (rows, columns), book, block_size, halves, deltas)


def decode(
    codes: np.ndarray,
    meta: np.ndarray,
    row_exponent: np.ndarray,
    shape: tuple[int, int],
    book: Book,
    block_size: int,
) -> Packed:
    """The storage fields read back (reserved delta 14 and 15 as 13, code 8 as zero)."""
    rows, width = codes.shape
    halves = np.zeros((rows, 2 * width), np.int64)
    deltas = np.minimum(meta >> book.id_bits, 13).astype(np.int64)
    for n in range(rows):
        for k in range(2 * width):
            byte = int(codes[n, k // 2])
            code = byte >> 4 if k % 2 else byte & 15
            dialect = int(meta[n, k // block_size]) & ((1 << book.id_bits) - 1)
            half = book.grids[dialect][code & 7]
            halves[n, k] = -half if code & 8 else half
    return Packed(codes, meta, row_exponent, shape, book, block_size, halves, deltas)


ONLINE_RULE = {FP4.name: "two_stage", SEM.name: "lut"}


def round_activation(x: np.ndarray, book: Book = FP4, block_size: int = 32) -> np.ndarray:
    """float64 [T, K]: the values a W4A4 linear sees; a row with NaN or Inf is a row of NaN."""
    out = np.full(x.shape, np.nan)
    good = np.isfinite(x).all(axis=1)
    out[good] = quantize(x[good], book, block_size, ONLINE_RULE[book.name], 13).values()
    return out


# FP8 E4M3 (no infinities), its non-negative numbers in the order of their bytes 0..126.
E4M3 = [Fraction(m, 2**9) for m in range(8)] + [
    Fraction(8 + m, 8) * Fraction(2) ** (e - 7) for e in range(1, 16) for m in range(8)
]
E4M3 = E4M3[:127]  # byte 127 is NaN
E2M1 = [Fraction(h, 2) for h in (0, 1, 2, 3, 4, 6, 8, 12)]


def in_units(levels: list[Fraction], exponent: int) -> list[int]:
    """levels * 2**exponent as whole numbers of 2**-149."""
    units = [level * Fraction(2) ** (exponent + ONE) for level in levels]
    assert all(unit.denominator == 1 for unit in units)
    return [unit.numerator for unit in units]


E4M3_WHOLE = in_units(E4M3, 0)
E2M1_WHOLE = in_units(E2M1, 0)


def round_even(levels: list[int], value: int) -> int:
    """Index of the level nearest to `value` >= 0; a tie takes the even index."""
    distances = [abs(value - level) for level in levels]
    least = min(distances)
    near = [i for i, distance in enumerate(distances) if distance == least]
    return near[0] if len(near) == 1 else next(i for i in near if i % 2 == 0)


def round_signed(levels: list[Fraction], whole_levels: list[int], value: float) -> float:
    magnitude = float(levels[round_even(whole_levels, abs(whole(value)))])
    return -magnitude if value < 0 else magnitude


def fp8_row(row: np.ndarray) -> tuple[np.ndarray, float]:
    """One token of the `fp8` format: (E4M3 values as float64, s_t)."""
    amax = np.float32(np.abs(row).max(initial=0))
    scale = np.float32(amax / np.float32(448)) if amax > 0 else np.float32(1)
    quotient = (row / scale).astype(np.float32)
    return np.array([round_signed(E4M3, E4M3_WHOLE, q) for q in quotient], np.float64), float(scale)


def quantize_mxfp4(x: np.ndarray, block_size: int = 32) -> np.ndarray:
    """float64 values of section 7's MXFP4."""
    out = np.zeros(x.shape)
    for n in range(x.shape[0]):
        for first in range(0, x.shape[1], block_size):
            block = x[n, first : first + block_size]
            largest = whole(np.abs(block).max())
            if largest == 0:
                continue
            exponent = max(-127, largest.bit_length() - 1 - ONE - 2)
            levels = in_units(E2M1, exponent)
            for i, value in enumerate(block):
                level = float(E2M1[round_even(levels, abs(whole(value)))]) * 2.0**exponent
                out[n, first + i] = -level if value < 0 else level
    return out


def quantize_nvfp4(x: np.ndarray, block_size: int = 16) -> np.ndarray:
    """float32 values of section 7's NVFP4, every step of the formula one float32 operation."""
    f32 = np.float32
    out = np.zeros(x.shape, f32)
    amax = f32(np.abs(x).max(initial=0))
    tensor_scale = f32(amax / f32(448 * 6)) if amax > 0 else f32(1)
    for n in range(x.shape[0]):
        for first in range(0, x.shape[1], block_size):
            block = x[n, first : first + block_size]
            wanted = f32(f32(np.abs(block).max() / f32(6)) / tensor_scale)
            block_scale = f32(round_signed(E4M3, E4M3_WHOLE, wanted))
            scale = f32(block_scale * tensor_scale)
            if scale == 0:
                continue
            for i, value in enumerate(block):
                rounded = round_signed(E2M1, E2M1_WHOLE, f32(value / scale))
                out[n, first + i] = f32(f32(rounded) * scale)
    return out


def butterfly(x: np.ndarray) -> np.ndarray:
    """Section 9: float32 [N, K] times the Hadamard matrix in groups of 32, one sum at a time."""
    out = x.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for group in out.reshape(-1, 32):  # a view
            for step in (1, 2, 4, 8, 16):
                for i in range(32):
                    if i & step == 0:
                        a, b = group[i], group[i + step]
                        group[i], group[i + step] = a + b, a - b
    return out


def rotate_activation(x: np.ndarray) -> np.ndarray:
    """Section 9: the float32 [T, K] that a rotated layer rounds."""
    return butterfly(x) * np.float32(1 / 32)


def row_products(
    numerators: Sequence[int], below: Sequence[int], token_scale: float, weight: Packed
) -> np.ndarray:
    """One token, `numerators[k] * 2**-below[k // B] * token_scale`, times a weight: float32 [N].

    Block sums are Python integers; scaling them and the sum over blocks (ascending) are float32
    operations, and so is the final scale: one rounding of an exact product (24 by 24 bits fit in
    float64).
    """
    f32, size = np.float32, weight.block_size
    out = np.zeros(weight.shape[0], f32)
    for n in range(weight.shape[0]):
        total = f32(0)
        for b in range(weight.meta.shape[1]):
            pair = range(b * size, (b + 1) * size)
            block_sum = sum(int(numerators[k]) * int(weight.halves[n, k]) for k in pair)
            power = 4 - int(weight.deltas[n, b]) - below[b]
            total = f32(total + f32(f32(block_sum) * f32(2.0**power)))
        row_scale = 2.0 ** (int(weight.row_exponent[n]) - 5)
        out[n] = f32(float(total) * (float(token_scale) * row_scale))
    return out


def linear(
    x: np.ndarray, weight: Packed, bias: np.ndarray | None, activation_format: str
) -> np.ndarray:
    """Section 3a, accumulation `exact`: float32 [T, N] before the one output rounding.

    The bias is added in float32.  Formats `dialect` and `fp8` only.
    """
    book, size = weight.book, weight.block_size
    tokens, outputs = x.shape[0], weight.shape[0]
    blocks = weight.meta.shape[1]
    padded = np.zeros((tokens, blocks * size), np.float32)
    padded[:, : x.shape[1]] = x
    good = np.isfinite(x).all(axis=1)
    out = np.full((tokens, outputs), np.nan, np.float32)
    for t in range(tokens):
        if not good[t]:
            continue
        if activation_format == "dialect":
            q = quantize(padded[t : t + 1], book, size, ONLINE_RULE[book.name], 13)
            numerators, below = q.halves[0], [int(d) - 4 for d in q.deltas[0]]
            token_scale = 2.0 ** (int(q.row_exponent[0]) - 5)
        else:
            values, token_scale = fp8_row(padded[t])
            numerators, below = [int(v * 2**9) for v in values], [9] * blocks
        y = row_products(numerators, below, token_scale, weight)
        out[t] = y + bias if bias is not None else y
    return out


def linear_none(x: np.ndarray, weight: Packed) -> np.ndarray:
    """Section 3a, format `none` in `exact`: float32 [T, N] without a bias, K in whole blocks.

    Products are exact in float64 (24 by 4 bits); so the sums are the only roundings.
    """
    size, half_units = weight.block_size, weight.halves.astype(np.float64)
    out = np.zeros((x.shape[0], weight.shape[0]), np.float32)
    for t, n in np.ndindex(out.shape):
        for b in range(weight.meta.shape[1]):
            block_sum = 0.0
            for k in range(b * size, (b + 1) * size):
                block_sum += float(x[t, k]) * float(half_units[n, k])
            exponent = int(weight.row_exponent[n]) - int(weight.deltas[n, b]) - 1
            out[t, n] += np.float32(block_sum * 2.0**exponent)
    return out


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> the 16 bits of bfloat16, nearest even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
