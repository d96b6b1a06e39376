"""The two formatbooks, as data, and everything that is derived from them.

A *dialect* is a tiny number format: eight ascending magnitudes in half-units (value = h/2). A
*formatbook* is an ordered list of dialects; a block of a quantized tensor stores the id of one of
them. Only :data:`_DIALECT_FP4_HALF_UNITS` and :data:`_SEMANTIC_32_HALF_UNITS` are written by hand;
thresholds, beneficial cells, error and index tables and E4M3 bytes are computed from them.

Vocabulary: ``h`` is a half-unit (0..15), ``m`` a magnitude scaled by the block's power of two
(0 <= m < 8), ``k = min(31, floor(4 m))`` its *cell* (0..31), ``M`` a block's largest half-unit
(8..15), ``f = 4 - delta`` the exponent that turns a half-unit into an E4M3 number ``h * 2**f``.

Every table is nested tuples of plain integers: reading one needs neither torch nor numpy, and
``torch.tensor(book.index_lut)`` is all it takes to use one.

Sources: DialectFP4 and its scaling, BlockDialect (arXiv 2501.01144v5); the 32-dialect size,
SemanticDialect (arXiv 2603.02883); the contents of the 32-dialect book, ties and layouts: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Final, Literal, get_args

__all__ = [
    "BLOCK_SIZES",
    "BOOKS",
    "CELLS",
    "DIALECT_FP4",
    "E4M3_MAX",
    "E4M3_WINDOW",
    "HIGHEST_EXPONENT",
    "LARGEST_HALF_UNIT",
    "LOWEST_EXPONENT",
    "NAN_ROW",
    "ROTATIONS",
    "ROTATION_GROUP",
    "SEMANTIC_32",
    "SMALLEST_RANGE",
    "ActivationFormat",
    "BlockSize",
    "BookName",
    "Formatbook",
    "Rotation",
    "book_by_name",
    "rotation_by_name",
]

BlockSize = Literal[16, 32, 64]
BookName = Literal["dialect_fp4", "semantic_32"]
ActivationFormat = Literal["dialect", "fp8", "none"]
Rotation = Literal["none", "hadamard_32"]

BLOCK_SIZES: Final[tuple[int, ...]] = get_args(BlockSize)
ROTATIONS: Final[tuple[Rotation, ...]] = get_args(Rotation)

ROTATION_GROUP: Final = 32
"""Columns that a rotation mixes with each other, whatever the block size."""
CELLS: Final = 32
"""Number of quarter-unit cells k that a scaled magnitude can fall into."""
LARGEST_HALF_UNIT: Final = 15
SMALLEST_RANGE: Final = 8
"""The smallest M: a block whose scaled maximum lies lower still uses a dialect that ends at 8."""
E4M3_WINDOW: Final = 13
"""Largest delta for which ``h * 2**(4 - delta)`` is an E4M3 number for every h in 0..15."""

LOWEST_EXPONENT: Final = -120
HIGHEST_EXPONENT: Final = 125
"""Row exponents R lie between the two: ``2**(R - 5)`` is then a normal float32."""
NAN_ROW: Final = -128
"""Row exponent of a row that held NaN or Inf; never stored in files."""
E4M3_MAX: Final = 448.0
"""Largest E4M3 number."""

HalfUnits = tuple[int, int, int, int, int, int, int, int]
Table = tuple[tuple[int, ...], ...]
"""A table with one row per dialect (or as its docstring says)."""

_DIALECT_FP4_HALF_UNITS: Final[tuple[HalfUnits, ...]] = (
    (0, 1, 2, 3, 4, 6, 11, 15),
    (0, 1, 2, 3, 4, 6, 9, 15),
    (0, 1, 2, 3, 4, 6, 11, 14),
    (0, 1, 2, 3, 4, 6, 9, 14),
    (0, 1, 2, 3, 4, 6, 10, 13),
    (0, 1, 2, 3, 4, 6, 8, 13),
    (0, 1, 2, 3, 4, 6, 10, 12),
    (0, 1, 2, 3, 4, 6, 8, 12),
    (0, 1, 2, 3, 4, 6, 9, 11),
    (0, 1, 2, 3, 4, 6, 7, 11),
    (0, 1, 2, 3, 4, 6, 9, 10),
    (0, 1, 2, 3, 4, 6, 7, 10),
    (0, 1, 2, 3, 4, 6, 8, 9),
    (0, 1, 2, 3, 4, 6, 7, 9),
    (0, 1, 2, 3, 4, 6, 7, 8),
    (0, 1, 2, 3, 4, 5, 6, 8),
)

_SEMANTIC_32_HALF_UNITS: Final[tuple[HalfUnits, ...]] = (
    # M = 15
    (0, 1, 2, 3, 4, 6, 11, 15),
    (0, 1, 2, 3, 4, 6, 9, 15),
    (0, 1, 2, 4, 6, 8, 11, 15),
    (0, 1, 3, 5, 7, 9, 12, 15),
    # M = 14
    (0, 1, 2, 3, 4, 6, 11, 14),
    (0, 1, 2, 3, 4, 6, 9, 14),
    (0, 1, 2, 4, 6, 8, 11, 14),
    (0, 1, 3, 5, 7, 9, 11, 14),
    # M = 13
    (0, 1, 2, 3, 4, 6, 10, 13),
    (0, 1, 2, 3, 4, 6, 8, 13),
    (0, 1, 2, 4, 6, 8, 10, 13),
    (0, 1, 3, 5, 7, 9, 11, 13),
    # M = 12
    (0, 1, 2, 3, 4, 6, 10, 12),
    (0, 1, 2, 3, 4, 6, 8, 12),
    (0, 1, 2, 4, 6, 8, 10, 12),
    (0, 1, 2, 3, 5, 7, 9, 12),
    # M = 11
    (0, 1, 2, 3, 4, 6, 9, 11),
    (0, 1, 2, 3, 4, 6, 7, 11),
    (0, 1, 2, 3, 5, 7, 9, 11),
    (0, 1, 2, 3, 4, 6, 8, 11),
    # M = 10
    (0, 1, 2, 3, 4, 6, 9, 10),
    (0, 1, 2, 3, 4, 6, 7, 10),
    (0, 1, 2, 3, 4, 6, 8, 10),
    (0, 1, 2, 3, 4, 5, 7, 10),
    # M = 9
    (0, 1, 2, 3, 4, 6, 8, 9),
    (0, 1, 2, 3, 4, 6, 7, 9),
    (0, 1, 2, 3, 4, 5, 7, 9),
    (0, 1, 2, 3, 4, 5, 6, 9),
    # M = 8
    (0, 1, 2, 3, 4, 6, 7, 8),
    (0, 1, 2, 3, 4, 5, 6, 8),
    (0, 1, 2, 3, 5, 6, 7, 8),
    (0, 1, 2, 3, 4, 5, 7, 8),
)


@dataclass(frozen=True)
class Formatbook:
    """An ordered list of dialects together with its derived tables.

    Attributes:
        name: the book's name in files and configuration, e.g. ``"dialect_fp4"``.
        version: version of the data below; a change of any half-unit is a new version.
        half_units: one row of eight ascending half-units per dialect. Rows come in groups of
            :attr:`variants`, the groups ordered by descending largest half-unit 15, 14, ..., 8.
        id_bits: bits of the dialect id in a meta byte (4 or 5).
        online_rule: the selection rule for activations, ``"two_stage"`` or ``"lut"``.
        rules: every selection rule defined for this book.
    """

    name: str
    version: int
    half_units: tuple[HalfUnits, ...] = field(repr=False)
    id_bits: int
    online_rule: str
    rules: tuple[str, ...]

    def __len__(self) -> int:
        """Number of dialects."""
        return len(self.half_units)

    def __hash__(self) -> int:
        """Of the name alone: every product on a GPU looks its tables up by the book."""
        return hash(self.name)

    @property
    def variants(self) -> int:
        """Dialects per largest half-unit M: ids ``variants * (15 - M) + v``, v = 0..variants-1."""
        return len(self) // (LARGEST_HALF_UNIT - SMALLEST_RANGE + 1)

    @property
    def largest_stored_delta(self) -> int:
        """Largest delta a stored meta byte of this book may carry: 13 or 7 (ours)."""
        return min(E4M3_WINDOW, (1 << (8 - self.id_bits)) - 1)

    @cached_property
    def thresholds(self) -> Table:
        """Rounding thresholds ``t_i = h_{i-1} + h_i`` in cells, [dialects, 7].

        A magnitude in cell k rounds to ``index = #{i : k >= t_i}``. Midpoints of half-units are
        multiples of a quarter-unit, so this is exact rounding, midpoints up in magnitude.
        """
        return tuple(
            tuple(low + high for low, high in pairwise(dialect)) for dialect in self.half_units
        )

    @cached_property
    def index_lut(self) -> Table:
        """Index (0..7) of the magnitude that cell k rounds to, [dialects, 32]."""
        return tuple(
            tuple(sum(k >= t for t in thresholds) for k in range(CELLS))
            for thresholds in self.thresholds
        )

    @cached_property
    def rounded_half_units(self) -> Table:
        """Half-unit that cell k rounds to, [dialects, 32]."""
        return tuple(
            tuple(dialect[index] for index in indices)
            for dialect, indices in zip(self.half_units, self.index_lut, strict=True)
        )

    @cached_property
    def error_lut(self) -> Table:
        """Squared error at the centre of cell k, in (1/8)^2 units, [dialects, 32]; at most 121.

        ``E[id][k] = (2k + 1 - 4 h_id(k))**2``; 0 where a block of this dialect has no element,
        that is where ``min(15, (k + 1) >> 1)`` exceeds its M. (SemanticDialect: that a LUT holds
        the errors; the layout: ours.)
        """
        return tuple(
            tuple(
                (2 * k + 1 - 4 * h) ** 2 if _needed_range(k) <= dialect[-1] else 0
                for k, h in enumerate(rounded)
            )
            for dialect, rounded in zip(self.half_units, self.rounded_half_units, strict=True)
        )

    @cached_property
    def packed_error_lut(self) -> Table:
        """Error LUT of the four variants of one M in one 32-bit word, [8 (M = 15..8), 32].

        Byte v of word ``[15 - M][k]`` is ``error_lut[4 * (15 - M) + v][k]`` (ours).

        Raises:
            ValueError: if the book has not four variants per M.
        """
        if self.variants != 4:
            raise ValueError(
                f"packed_error_lut: book {self.name!r} has {self.variants} variants per range; "
                "the table is defined for four, as in 'semantic_32'"
            )
        return tuple(
            tuple(
                sum(self.error_lut[first + v][k] << (8 * v) for v in range(4)) for k in range(CELLS)
            )
            for first in range(0, len(self), 4)
        )

    @cached_property
    def beneficial_cells(self) -> Table:
        """1 where a dialect beats its pair partner strictly at the cell's centre, [dialects, 32].

        Defined for books of pairs (DialectFP4): the two-stage rule counts a block's elements in
        these cells (BlockDialect; those of dialects 14 and 15: ours).

        Raises:
            ValueError: if the book does not consist of pairs.
        """
        if self.variants != 2:
            raise ValueError(
                f"beneficial_cells: book {self.name!r} has {self.variants} variants per range; "
                "the two-stage rule is defined for pairs, as in 'dialect_fp4'"
            )
        return tuple(
            tuple(int(own < other) for own, other in zip(error, self.error_lut[i ^ 1], strict=True))
            for i, error in enumerate(self.error_lut)
        )

    @cached_property
    def signed_half_units(self) -> Table:
        """Half-unit of each 4-bit code (bit 3 = sign), [dialects, 16]; code 8 reads as 0."""
        return tuple(dialect + tuple(-h for h in dialect) for dialect in self.half_units)

    @cached_property
    def e4m3_lut(self) -> tuple[Table, ...]:
        """E4M3 byte of ``code * 2**(4 - delta)``, [14 (delta), dialects, 16 (code)].

        Code 8 (never written) reads as -0. Exact for every entry (ours).
        """
        return tuple(
            tuple(
                tuple(sign | _e4m3_byte(h, 4 - delta) for sign in (0x00, 0x80) for h in dialect)
                for dialect in self.half_units
            )
            for delta in range(E4M3_WINDOW + 1)
        )


def _needed_range(cell: int) -> int:
    """The range M that an element in this cell needs, before it is raised to at least 8."""
    return min(LARGEST_HALF_UNIT, (cell + 1) >> 1)


def _e4m3_byte(half_unit: int, exponent: int) -> int:
    """E4M3 byte of ``half_unit * 2**exponent``, which must be representable."""
    if half_unit == 0:
        return 0
    power = half_unit.bit_length() - 1 + exponent  # value = 1.xxx * 2**power
    if power >= -6:
        fraction = (half_unit << 3 >> (half_unit.bit_length() - 1)) & 7
        return (power + 7) << 3 | fraction
    subnormal = exponent + 9  # multiples of 2**-9
    return half_unit << subnormal


DIALECT_FP4: Final = Formatbook(
    name="dialect_fp4",
    version=1,
    half_units=_DIALECT_FP4_HALF_UNITS,
    id_bits=4,
    online_rule="two_stage",
    rules=("mse", "two_stage"),
)
"""BlockDialect's 16 dialects: eight pairs, ids ``2 (15 - M)`` and ``2 (15 - M) + 1``."""

SEMANTIC_32: Final = Formatbook(
    name="semantic_32",
    version=1,
    half_units=_SEMANTIC_32_HALF_UNITS,
    id_bits=5,
    online_rule="lut",
    rules=("mse", "lut"),
)
"""The 32-dialect book: four variants per M, ids ``4 (15 - M) + v`` (contents ours)."""

BOOKS: Final = {book.name: book for book in (DIALECT_FP4, SEMANTIC_32)}


def book_by_name(name: str) -> Formatbook:
    """Return the book called `name`.

    Raises:
        ValueError: if there is no such book.
    """
    try:
        return BOOKS[name]
    except KeyError:
        allowed = ", ".join(map(repr, BOOKS))
        raise ValueError(f"book: {name!r} is not known; allowed are {allowed}") from None


def rotation_by_name(name: str) -> Rotation:
    """Return `name`, which a file or an op has given, as a rotation.

    Raises:
        ValueError: if there is no such rotation.
    """
    for rotation in ROTATIONS:
        if rotation == name:
            return rotation
    allowed = " and ".join(map(repr, ROTATIONS))
    raise ValueError(f"rotation: {name!r}; allowed are {allowed}")
