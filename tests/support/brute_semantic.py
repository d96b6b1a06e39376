"""Sections 5 and 6 of docs/reference/format.md by brute force: residuals and shared variants.

As in `brute_force`, whatever decides a bit is a Python integer or one float32 operation of the
page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tests.support import brute_force as brute


@dataclass(frozen=True)
class Token:
    """A rounded row: element k is `halves[k] * 2**(row_exponent - deltas[k // B] - 1)`."""

    halves: list[int]
    deltas: list[int]
    row_exponent: int

    def values(self) -> list[Fraction]:
        size = len(self.halves) // max(1, len(self.deltas))
        return [
            half * Fraction(2) ** (self.row_exponent - self.deltas[k // size] - 1)
            for k, half in enumerate(self.halves)
        ]


@dataclass(frozen=True)
class Block:
    """A block of a token on its effective exponent; magnitudes in 2**-149."""

    signed: list[int]
    delta: int
    exponent: int

    @property
    def magnitudes(self) -> list[int]:
        return [abs(s) for s in self.signed]

    @property
    def cells(self) -> list[int]:
        return [brute.cell(m, self.exponent) for m in self.magnitudes]


def cut(row: np.ndarray, size: int) -> tuple[list[Block], int]:
    """(blocks, row exponent) of a finite float32 row: sections 1 and 2, window 13."""
    signed = [brute.whole(v) for v in row]
    signed += [0] * (-len(signed) % size)
    parts = [signed[i : i + size] for i in range(0, len(signed), size)]
    own = [brute.block_exponent([abs(s) for s in part]) for part in parts]
    top = max(own, default=-120)
    deltas = [min(top - e, 13) for e in own]
    return [Block(p, d, top - d) for p, d in zip(parts, deltas, strict=True)], top


def variant_cost(block: Block, variant: int) -> int:
    """The summed LUT error of dialect(M, variant), section 4."""
    grid = brute.SEM.grids[4 * (15 - brute.block_maximum(block.cells)) + variant]
    return sum(brute.centre_error(grid, k) for k in block.cells)


def shared_variants(tokens: list[np.ndarray], size: int) -> list[int]:
    """v*(b) of a group of finite tokens, for every block of channels; ties to the smallest."""
    blocks = [cut(row, size)[0] for row in tokens]
    shared = []
    for at_b in zip(*blocks, strict=True):
        sums = [sum(variant_cost(block, v) for block in at_b) for v in range(4)]
        shared.append(sums.index(min(sums)))
    return shared


def round_token(
    row: np.ndarray, book: brute.Book, size: int, variants: list[int] | None = None
) -> Token:
    """One finite row by the online rule, or with the variants that its group shares."""
    blocks, top = cut(row, size)
    halves: list[int] = []
    deltas = []
    for b, block in enumerate(blocks):
        if not any(block.cells):
            halves += [0] * size
            deltas.append(0)
            continue
        if variants is None:
            rule = brute.SELECT[brute.ONLINE_RULE[book.name]]
            dialect = rule(book, block.magnitudes, block.exponent)
        else:
            dialect = 4 * (15 - brute.block_maximum(block.cells)) + variants[b]
        grid = book.grids[dialect]
        for number in block.signed:
            half = grid[brute.nearest_index(grid, abs(number), block.exponent)]
            halves.append(-half if number < 0 else half)
        deltas.append(block.delta)
    return Token(halves, deltas, top)


def round_sample(
    x: np.ndarray, book: brute.Book, size: int, group: Sequence[int] | None
) -> list[Token | None]:
    """The tokens of one sample; None for one with NaN or Inf, which no group counts."""
    finite = [bool(np.isfinite(row).all()) for row in x]
    of_group: dict[int, list[int]] = {}
    for t, number in enumerate(group if group is not None else []):
        if number >= 0 and finite[t]:
            of_group.setdefault(int(number), []).append(t)
    variants: dict[int, list[int]] = {}
    for members in of_group.values():
        shared = shared_variants([x[t] for t in members], size)
        variants.update(dict.fromkeys(members, shared))
    return [
        round_token(row, book, size, variants.get(t)) if finite[t] else None
        for t, row in enumerate(x)
    ]


def residual(row: np.ndarray, token: Token) -> np.ndarray:
    """What rounding left over, float32 [K]; exact, as the page says."""
    exact = [Fraction(float(v)) - q for v, q in zip(row, token.values(), strict=False)]
    out = np.array([float(r) for r in exact], np.float32)
    assert [Fraction(float(v)) for v in out] == exact
    return out


def product(token: Token, weight: brute.Packed) -> np.ndarray:
    """float32 [N], accumulation `exact`."""
    scale = 2.0 ** (token.row_exponent - 5)
    below = [d - 4 for d in token.deltas]
    return brute.row_products(token.halves, below, scale, weight)


def linear(
    x: np.ndarray,
    weight: brute.Packed,
    bias: np.ndarray | None = None,
    salient: Sequence[int] = (),
    group: Sequence[int] | None = None,
) -> np.ndarray:
    """Sections 5 and 6 for one sample: float32 [T, N] before the one output rounding."""
    book, size = weight.book, weight.block_size
    out = np.full((len(x), weight.shape[0]), np.nan, np.float32)
    for t, token in enumerate(round_sample(x, book, size, group)):
        if token is None:
            continue
        y = product(token, weight)
        if t in salient:
            y = y + product(round_token(residual(x[t], token), book, size), weight)
        out[t] = y + bias if bias is not None else y
    assert out.dtype == np.float32
    return out
