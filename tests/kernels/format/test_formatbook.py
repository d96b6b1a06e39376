"""Everything the formatbooks derive, against docs/reference/format.md typed a second time."""

import dataclasses

import pytest

from dialect_kernels import DIALECT_FP4, SEMANTIC_32
from dialect_kernels.formatbook import book_by_name
from tests.support import brute_force as brute

BOOKS = [(DIALECT_FP4, brute.FP4), (SEMANTIC_32, brute.SEM)]
CELLS = range(32)


def cells_needed(dialect_maximum: int) -> range:
    """Cells an element of a block with this M can be in: (k + 1) >> 1 at most M (15 is clipped)."""
    return CELLS if dialect_maximum == 15 else range(2 * dialect_maximum + 1)


@pytest.mark.parametrize(("book", "page"), BOOKS, ids=lambda book: book.name)
def test_half_units_are_the_pages(book, page):
    assert book.half_units == page.grids
    assert len(book) == len(page.grids)
    assert book.id_bits == page.id_bits
    assert book.largest_stored_delta == page.stored_window


@pytest.mark.parametrize(("book", "page"), BOOKS, ids=lambda book: book.name)
def test_every_dialect_ascends_from_zero_to_the_range_its_id_names(book, page):
    for dialect, grid in enumerate(book.half_units):
        assert grid[0] == 0
        assert list(grid) == sorted(set(grid))
        assert grid[-1] == 15 - dialect // book.variants


def test_thresholds_and_beneficial_cells_are_the_pages():
    for dialect, (_, thresholds, (first, last)) in brute.DIALECT_FP4_PAGE.items():
        assert DIALECT_FP4.thresholds[dialect] == thresholds
        beneficial = [k for k in CELLS if DIALECT_FP4.beneficial_cells[dialect][k]]
        assert beneficial == list(range(first, last + 1)), dialect


def test_beneficial_cells_are_those_with_the_strictly_smaller_error_at_the_centre():
    for dialect in range(16):
        own, partner = brute.FP4.grids[dialect], brute.FP4.grids[dialect ^ 1]
        for k in cells_needed(own[-1]):
            better = brute.centre_error(own, k) < brute.centre_error(partner, k)
            assert DIALECT_FP4.beneficial_cells[dialect][k] == better, (dialect, k)


def test_the_papers_two_printed_expressions():
    for k in CELLS:
        k4, k3, k2, k1, k0 = ((k >> bit) & 1 for bit in (4, 3, 2, 1, 0))
        id_4 = k4 and not k3 and ((not k2 and k1) or (k2 and not (k1 and k0)))
        id_5 = (not k4 and k3 and k2 and k1) or (k4 and not (k3 or k2 or k1))
        assert DIALECT_FP4.beneficial_cells[4][k] == bool(id_4), k
        assert DIALECT_FP4.beneficial_cells[5][k] == bool(id_5), k


@pytest.mark.parametrize(("book", "page"), BOOKS, ids=lambda book: book.name)
def test_index_and_rounded_half_unit_are_the_nearest_at_every_cells_centre(book, page):
    for dialect, grid in enumerate(page.grids):
        for k in CELLS:
            distances = [abs(2 * k + 1 - 4 * h) for h in grid]
            nearest = distances.index(min(distances))
            assert book.index_lut[dialect][k] == nearest
            assert book.rounded_half_units[dialect][k] == grid[nearest]


@pytest.mark.parametrize(("book", "page"), BOOKS, ids=lambda book: book.name)
def test_error_lut(book, page):
    for dialect, grid in enumerate(page.grids):
        needed = cells_needed(grid[-1])
        for k in CELLS:
            expected = brute.centre_error(grid, k) if k in needed else 0
            assert book.error_lut[dialect][k] == expected
    assert max(map(max, book.error_lut)) <= 121


def test_packed_error_lut_holds_the_four_variants_in_one_word():
    assert len(SEMANTIC_32.packed_error_lut) == 8
    for row, words in enumerate(SEMANTIC_32.packed_error_lut):
        for k, word in enumerate(words):
            assert 0 <= word < 2**32
            split = [(word >> (8 * v)) & 255 for v in range(4)]
            assert split == [SEMANTIC_32.error_lut[4 * row + v][k] for v in range(4)]


@pytest.mark.parametrize(("book", "page"), BOOKS, ids=lambda book: book.name)
def test_every_half_unit_in_the_window_is_its_e4m3_byte(book, page):
    assert len(book.e4m3_lut) == 14
    for delta, dialects in enumerate(book.e4m3_lut):
        for dialect, row in enumerate(dialects):
            for code, byte in enumerate(row):
                value = page.grids[dialect][code & 7] * brute.Fraction(2) ** (4 - delta)
                assert brute.E4M3[byte & 0x7F] == value
                assert byte >> 7 == code >> 3


@pytest.mark.parametrize(("book", "page"), BOOKS, ids=lambda book: book.name)
def test_signed_half_units(book, page):
    for dialect, row in enumerate(book.signed_half_units):
        grid = page.grids[dialect]
        assert list(row) == [*grid, *(-h for h in grid)]


def test_two_variant_tables_are_refused_where_they_are_not_defined():
    with pytest.raises(ValueError, match=r"semantic_32.*4 variants"):
        _ = SEMANTIC_32.beneficial_cells
    with pytest.raises(ValueError, match=r"dialect_fp4.*2 variants"):
        _ = DIALECT_FP4.packed_error_lut


def test_books_are_found_by_name_and_cannot_be_changed():
    assert book_by_name("dialect_fp4") is DIALECT_FP4
    assert book_by_name("semantic_32") is SEMANTIC_32
    with pytest.raises(ValueError, match="'int4' is not known; allowed are 'dialect_fp4'"):
        book_by_name("int4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        DIALECT_FP4.version = 2
