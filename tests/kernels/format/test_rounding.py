"""Rounding onto every dialect: all 16-bit patterns, all midpoints and their neighbours.

A book whose dialects are all the same one leaves the selection no choice, so `quantize` shows the
rounding onto that dialect alone. Window 0 puts every block of a row at the row's exponent, so a
leading block with the wanted maximum places all the others on the grid.
"""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from dialect_kernels import DIALECT_FP4, reference
from tests.support import brute_force as brute

DIALECTS = sorted(set(brute.SEM.grids) | set(brute.FP4.grids), reverse=True)
BLOCK = 64


def book_of_one(grid: tuple[int, ...]):
    return dataclasses.replace(DIALECT_FP4, name=f"only {grid}", half_units=(grid,) * 16)


def round_at(x: torch.Tensor, exponents: torch.Tensor, grid: tuple[int, ...]) -> np.ndarray:
    """Codes of x [N, K] (K whole blocks) with every row's grid at its exponent, uint8 [N, K]."""
    leading = torch.zeros(x.shape[0], BLOCK, dtype=x.dtype)
    leading[:, 0] = torch.from_numpy(np.ldexp(1.0, exponents.numpy() + 2)).to(x.dtype)
    p = reference.quantize(
        torch.cat([leading, x], dim=1), book_of_one(grid), BLOCK, "mse", window=0
    )
    assert torch.equal(p.row_exponent, exponents.to(torch.int8))
    codes = torch.stack([p.codes & 15, p.codes >> 4], dim=-1).flatten(1)
    return codes[:, BLOCK:].numpy()


def expected_codes(x: torch.Tensor, exponents: torch.Tensor, grid: tuple[int, ...]) -> np.ndarray:
    values = x.to(torch.float64).numpy()
    scaled = np.ldexp(np.abs(values), -exponents.numpy()[:, None].astype(np.int64))
    index = brute.nearest_indices(grid, scaled)
    return index | (((values < 0) & (index > 0)).astype(np.uint8) << 3)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a 16-bit format, one row per exponent and sign-mantissa column."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    mantissa = {torch.float16: 10, torch.bfloat16: 7}[dtype]
    exponents = 2 ** (15 - mantissa)
    by_exponent = bits.view(dtype).view(2, exponents, 2**mantissa).transpose(0, 1).flatten(1)
    return by_exponent[:-1]  # the last exponent is Inf and NaN


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("below", range(6))
def test_every_bit_pattern_on_every_dialect(dtype, below):
    """`below`: binades between a pattern's own exponent and its block's; at 5 all rounds to 0."""
    x = all_patterns(dtype)
    assert x.isfinite().all()
    assert x.numel() == 2**16 - 2 ** (16 - (5 if dtype == torch.float16 else 8))
    own = torch.frexp(x.abs().amax(dim=1).to(torch.float32)).exponent.to(torch.int64) - 3
    top = int(np.frexp(torch.finfo(dtype).max)[1]) - 3
    exponents = (own + below).clamp(min=-120, max=top)
    for grid in DIALECTS:
        codes = round_at(x, exponents, grid)
        expected = expected_codes(x, exponents, grid)
        wrong = np.argwhere(codes != expected)
        assert not len(wrong), (grid, x[tuple(wrong[0])], exponents[wrong[0][0]])


def neighbours(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The values and the next representable number on either side of each, as dtype [n, 3]."""
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    assert torch.equal(x.to(torch.float64), torch.tensor(values, dtype=torch.float64))
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    bits = x.view(integer)
    return torch.stack([(bits + step).view(dtype) for step in (-1, 0, 1)], dim=1)


WHOLE_RANGE = (-120, -10, 0, 13, 125)


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        *((dtype, e) for dtype in (torch.float32, torch.bfloat16) for e in WHOLE_RANGE),
        *((torch.float16, e) for e in (-10, 0, 13)),
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", [1, -1])
def test_midpoints_and_their_neighbours(dtype, exponent, sign):
    for grid in DIALECTS:
        midpoints = [(low + high) / 4 for low, high in pairwise(grid)]
        at = neighbours(np.ldexp(np.array(midpoints), exponent), dtype)  # [7, 3]
        x = torch.zeros(1, BLOCK, dtype=dtype)
        x[0, : at.numel()] = sign * at.flatten()
        codes = round_at(x, torch.tensor([exponent]), grid)
        got = (codes[0, : at.numel()] & 7).reshape(7, 3)
        want = [[i, i + 1, i + 1] for i in range(7)]  # below, at (up), above
        assert got.tolist() == want, grid
        negative = (codes[0, : at.numel()] >> 3).reshape(7, 3)
        assert negative.tolist() == [[int(sign < 0 and i > 0) for i in row] for row in want]


@pytest.mark.parametrize("exponent", [-120, 0, 125])
def test_levels_are_kept_and_everything_above_the_largest_saturates(exponent):
    for grid in DIALECTS:
        levels = np.array(grid) / 2
        above = np.array([grid[-1] / 2 + 0.25, 7.75, 8 - 2**-21])
        x = torch.tensor(np.ldexp(np.concatenate([levels, above]), exponent)).to(torch.float32)
        row = torch.zeros(1, BLOCK)
        row[0, : len(x)] = x
        codes = round_at(row, torch.tensor([exponent]), grid)
        assert codes[0, : len(x)].tolist() == [*range(8), 7, 7, 7]


def test_a_book_of_one_dialect_is_what_the_real_book_does_with_that_dialect():
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_t(3, (40, 64)).astype(np.float32))
    p = reference.quantize(x, DIALECT_FP4, BLOCK, "two_stage")
    for row, dialect in enumerate(p.meta[:, 0].tolist()):
        alone = reference.quantize(
            x[row : row + 1], book_of_one(brute.FP4.grids[dialect & 15]), BLOCK, "mse"
        )
        assert torch.equal(alone.codes[0], p.codes[row])
