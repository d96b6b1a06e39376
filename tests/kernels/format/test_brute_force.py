"""The brute force against numbers worked out by hand, and its fast twin against itself."""

from fractions import Fraction

import numpy as np

from tests.support import brute_force as brute


def one_block(*values: float) -> np.ndarray:
    return np.array([[*values, *[0.0] * (16 - len(values))]], np.float32)


def test_a_block_worked_out_by_hand():
    # e = floor(log2 7.5) - 2 = 0; M = (30 + 1) >> 1 = 15; 5.5 and 7.5 are levels of dialect 0
    packed = brute.quantize(one_block(7.5, -5.5, 1.0, -0.25, 0.2), block_size=16)
    assert packed.meta.tolist() == [[0]]
    assert packed.row_exponent.tolist() == [0]
    # codes: 7, -6 = 14, 2, -0.25 -> -0.5 = 9 (midpoint up), 0
    assert packed.codes[0, :3].tolist() == [7 | 14 << 4, 2 | 9 << 4, 0]
    assert packed.values()[0, :5].tolist() == [7.5, -5.5, 1.0, -0.5, 0.0]


def test_deltas_are_relative_to_the_rows_largest_exponent():
    x = np.zeros((1, 48), np.float32)
    x[0, 0], x[0, 16], x[0, 32] = 4.0, 0.5, 2.0**-20
    packed = brute.quantize(x, brute.FP4, 16)
    assert packed.row_exponent.tolist() == [0]
    assert packed.deltas.tolist() == [[0, 3, 0]]  # the last block is all cells 0: a zero block
    assert packed.meta[0, 1] >> 4 == 3
    narrow = brute.quantize(x, brute.FP4, 16, window=2)
    assert narrow.deltas.tolist() == [[0, 2, 0]]
    assert narrow.values()[0, 16] == 0.5


def test_the_lists_of_fp8_and_fp4_numbers():
    assert len(brute.E4M3) == 127
    assert brute.E4M3[1] == Fraction(1, 512)
    assert brute.E4M3[8] == Fraction(1, 64)
    assert brute.E4M3[-1] == 448
    # ties: 2.5 between 2 and 3 goes to 2 (even mantissa), 3.5 to 4, 5 to 4, 0.25 to 0
    for value, rounded in ((2.5, 2.0), (3.5, 4.0), (5.0, 4.0), (0.25, 0.0), (100.0, 6.0)):
        assert brute.round_signed(brute.E2M1, brute.E2M1_WHOLE, value) == rounded
        assert brute.round_signed(brute.E2M1, brute.E2M1_WHOLE, -value) == -rounded


def test_bf16_rounding_by_hand():
    x = np.array([1.0, 1.00390625, 1.01171875, np.nan, -2.0], np.float32)
    assert brute.to_bf16(x).tolist() == [0x3F80, 0x3F80, 0x3F82, 0x7FC0, 0xC000]


def test_nearest_indices_in_float64_are_those_of_the_integers():
    rng = np.random.default_rng(5)
    values = np.abs(rng.standard_normal(300).astype(np.float32)) * 3
    values[:60] = np.arange(60) / 8  # midpoints and levels
    for grid in brute.SEM.grids[::5]:
        fast = brute.nearest_indices(grid, values.astype(np.float64))
        slow = [brute.nearest_index(grid, brute.whole(v), 0) for v in values]
        assert fast.tolist() == slow
