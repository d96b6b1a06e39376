"""The inline PTX of rounding, executed in numpy: equal to the formatbook for all there can be."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32
from dialect_kernels.formatbook import CELLS
from dialect_kernels.gpu import rounding
from tests.support.ptx import execute

all_books = pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda b: b.name)


def words_of(bytes_):
    """Words of bytes [n, 4], the first byte lowest."""
    return (bytes_.astype(np.uint64) << (8 * np.arange(4)).astype(np.uint64)).sum(axis=1)


def table_of(book):
    """The two words of every M and cell, uint64 [8, 32, 2]."""
    table = rounding.book_table(book, torch.device("cpu")).numpy().view(np.uint32)
    return table[-8 * CELLS * 2 :].astype(np.uint64).reshape(8, CELLS, 2)


def gains(book, row, k):
    """What decides between the variants of M = 15 - row: how much worse each is than the first."""
    first = row * book.variants
    if book.variants == 2:
        return [book.beneficial_cells[first][k] - book.beneficial_cells[first + 1][k]]
    return [book.error_lut[first + v][k] - book.error_lut[first][k] for v in range(1, 4)]


@all_books
def test_a_word_compares_all_variants(book):
    """64 times the largest value of a field does not reach the next one: no sum of a block can."""
    table = table_of(book)
    unit = 8 if book.variants == 4 else 1
    for row in range(8):
        for k in range(CELLS):
            word = int(table[row, k, 0])
            for gain, (start, end) in zip(gains(book, row, k), pairwise(rounding._FIELDS)):  # noqa: B905 (one gain or three)
                field = word >> start & (1 << end - start) - 1
                assert unit * (field - rounding._BIAS) == gain
                assert 64 * field < 1 << end - start
            assert word < 1 << 31
            indices = int(table[row, k, 1]).to_bytes(4, "little")[: book.variants]
            first = row * book.variants
            assert list(indices) == [book.index_lut[first + v][k] for v in range(book.variants)]


def test_a_field_that_would_overflow_is_refused():
    with pytest.raises(ValueError, match=r"the sums of a block need one in -10\.\.5$"):
        rounding._field(6, 11, 21)


@all_books
@pytest.mark.parametrize("exponent", [-120, 0, 125])
def test_look_up(book, exponent):
    """Every cell of every M, at its lowest number, inside, and at its highest; both signs."""
    table = table_of(book).reshape(-1)
    k = np.tile(np.arange(CELLS), 3)
    low = (k / 4.0 * 2.0**exponent).astype(np.float32)
    end = np.minimum((k + 1) / 4.0 * 2.0**exponent, 2.0**127 * 1.9999999).astype(np.float32)
    high = np.nextafter(end, np.float32(0))
    x = np.where(np.arange(3 * CELLS) // CELLS == 0, low, high)
    x = np.where(np.arange(3 * CELLS) // CELLS == 1, low / 2 + high / 2, x).astype(np.float32)
    x[1::2] *= -1
    bits = x.view(np.uint32).astype(np.uint64)
    scale = np.full_like(bits, (127 + 2 - exponent) << 23)
    for row in range(8):
        base = (row * CELLS * 8 - 8 * rounding._CELL_BASE.value) % (1 << 64)
        operands = {5 + i: np.roll(bits, i) for i in range(4)}
        operands |= {9: scale, 10: np.full_like(bits, base)}
        total, *indices = execute(rounding._LOOK_UP_ASM.value, operands, 5, table)
        want = table.reshape(8, CELLS, 2)[row, k]
        assert np.array_equal(total, sum(np.roll(want[:, 0], i) for i in range(4)))
        for i in range(4):
            assert np.array_equal(indices[i], np.roll(want[:, 1], i))


@pytest.mark.parametrize("variant", range(4))
def test_result_words(variant):
    """All indices at all places with both signs; a byte without bit 7 is a zero and has none."""
    generator = np.random.default_rng(variant)
    count = 8 * 2 * 64
    index = generator.integers(0, 8, (4, count))
    negative = generator.integers(0, 2, (4, count))
    for place in range(4):
        index[place, place * 256 : place * 256 + 256] = np.arange(256) & 7
        negative[place, place * 256 : place * 256 + 256] = np.arange(256) >> 3 & 1
    results = generator.integers(0, 128, (count, 8)) | 0x80
    results[:, 0] = 0
    operands = {5: np.full(count, variant, np.uint64)}
    operands |= {6: words_of(results[:, :4]), 7: words_of(results[:, 4:])}
    for i in range(4):
        of_variants = generator.integers(0, 8, (count, 4))
        of_variants[:, variant] = index[i]
        operands[1 + i] = words_of(of_variants)
        noise = generator.integers(0, 1 << 31, count).astype(np.uint64)
        operands[8 + i] = negative[i].astype(np.uint64) << np.uint64(31) | noise
    (got,) = execute(rounding._WORDS_ASM.value, operands, 1)
    found = np.take_along_axis(results, index.T, axis=1)
    want = np.where(negative.T == 1, found, found & 0x7F)
    assert np.array_equal(got, words_of(want))
