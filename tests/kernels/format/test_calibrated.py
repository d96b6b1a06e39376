"""Rule gptq against a slow reading of its definition, and what it promises."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, quantize, torch_backend
from dialect_kernels.calibrated import (
    quantize_calibrated,
    quantize_factored,
    quantize_factored_alike,
)
from dialect_kernels.rotation import rotate_activation, rotate_weight
from dialect_kernels.second_moments import SecondMoments, UpperFactor
from tests.support.calibration_cases import correlated, moments, slow_factor, weight

BOOKS = (DIALECT_FP4, SEMANTIC_32)


class Slow:
    """The definition, element by element in float64."""

    def __init__(self, w, a, book, block_size, window=None, damping=0.01):
        self.w = w.double().numpy().copy()
        self.book, self.block_size = book, block_size
        self.window = book.largest_stored_delta if window is None else window
        self.factor = slow_factor(a, damping)
        self.codes = np.zeros(self.w.shape, dtype=np.uint8)
        self.meta = np.zeros((len(w), self.w.shape[1] // block_size), dtype=np.uint8)
        self.rows = np.zeros(len(w), dtype=np.int8)
        self.saturated = self.zero_blocks = 0
        for row in range(len(w)):
            self._round_row(row)

    @staticmethod
    def _exponent(values):
        largest = np.abs(values).max()
        return max(-120, math.frexp(largest)[1] - 3) if largest else -120

    def _rounded(self, value, dialect, exponent):
        """The code of a value, and the value it stands for."""
        half_units = self.book.half_units[dialect]
        quarters = abs(value) / 2.0 ** (exponent - 2)
        index = sum(quarters >= low + high for low, high in pairwise(half_units))
        sign = value < 0 and index > 0
        return index | sign << 3, (-1) ** sign * half_units[index] * 2.0 ** (exponent - 1)

    def _cost(self, values, dialect, exponent):
        """What rule mse minimizes: the sum of h (h - 4 m)."""
        cost = 0.0
        for value in values:
            h = abs(self._rounded(value, dialect, exponent)[1]) / 2.0 ** (exponent - 1)
            cost += h * (h - abs(value) / 2.0 ** (exponent - 2))
        return cost

    def _round_row(self, row):
        w, size = self.w[row], self.block_size
        starts = range(0, len(w), size)
        top = max(self._exponent(w[start : start + size]) for start in starts)
        self.rows[row] = top
        for block, start in enumerate(starts):
            own = self._exponent(w[start : start + size])
            self.saturated += own > top
            delta = min(max(top - own, 0), self.window)
            exponent = top - delta
            values = w[start : start + size].copy()
            zero = np.abs(values).max() < 2.0 ** (exponent - 2)
            self.zero_blocks += bool(zero and np.abs(values).max())
            costs = [self._cost(values, d, exponent) for d in range(len(self.book))]
            dialect = int(np.argmin(costs))
            if not zero:
                self.meta[row, block] = delta << self.book.id_bits | dialect
            for column in range(start, start + size):
                code, rounded = (0, 0.0) if zero else self._rounded(w[column], dialect, exponent)
                self.codes[row, column] = code
                error = (w[column] - rounded) / self.factor[column, column]
                w[column + 1 :] -= error * self.factor[column, column + 1 :]


def assert_same(packed, slow):
    codes = packed.codes.numpy()
    unpacked = np.stack([codes & 15, codes >> 4], axis=-1).reshape(slow.codes.shape)
    assert np.array_equal(packed.row_exponent.numpy(), slow.rows)
    assert np.array_equal(packed.meta.numpy(), slow.meta)
    assert np.array_equal(unpacked, slow.codes)


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
@pytest.mark.parametrize(("block_size", "columns"), [(16, 112), (32, 320), (64, 192)])
def test_the_bytes_are_those_of_the_definition(book, block_size, columns):
    w, a = weight(3, columns, 0), moments(correlated(4 * columns, columns, 0))
    found = quantize_calibrated(w, a, book, block_size)
    assert found.damping == 0.01
    assert_same(found.packed, Slow(w, a, book, block_size))
    nearest = quantize(w, book, block_size)
    assert torch.equal(found.packed.row_exponent, nearest.row_exponent)
    assert not torch.equal(found.packed.codes, nearest.codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights(dtype):
    w, a = weight(4, 96, 1).to(dtype), moments(correlated(400, 96, 1))
    found = quantize_calibrated(w, a, SEMANTIC_32, 32, damping=0.1)
    assert_same(found.packed, Slow(w.float(), a, SEMANTIC_32, 32, damping=0.1))


def test_a_rotated_weight():
    w, x = weight(4, 128, 2), correlated(500, 128, 2)
    a = moments(rotate_activation(x))
    found = quantize_calibrated(w, a, SEMANTIC_32, 32, rotation="hadamard_32")
    assert found.packed.rotation == "hadamard_32"
    assert_same(found.packed, Slow(rotate_weight(w), a, SEMANTIC_32, 32))


def test_blocks_that_outgrow_the_row_saturate():
    """Inputs of the second block repeat the first's, 1000 times smaller: it must make up much."""
    x = correlated(600, 32, 3)
    x = torch.cat([x, x * 1e-3 + 1e-5 * correlated(600, 32, 4)], dim=1)
    w, a = weight(6, 64, 3), moments(x)
    for book in BOOKS:
        slow = Slow(w, a, book, 32, damping=1e-4)
        assert slow.saturated
        assert_same(quantize_calibrated(w, a, book, 32, damping=1e-4).packed, slow)


def test_blocks_that_are_too_small_stay_zero_and_their_errors_go_on():
    w, a = weight(6, 128, 5), moments(correlated(600, 128, 5))
    w[:, 32:64] *= 0.05
    w[1, 64:96] = 0
    slow = Slow(w, a, SEMANTIC_32, 32, window=0)
    assert slow.zero_blocks
    assert_same(quantize_calibrated(w, a, SEMANTIC_32, 32, window=0).packed, slow)


def test_inputs_that_are_always_zero():
    """Their columns are rounded to nearest: no error enters or leaves them."""
    x = correlated(500, 96, 6)
    x[:, [3, 40, 41, 95]] = 0
    w, a = weight(4, 96, 6), moments(x)
    assert_same(quantize_calibrated(w, a, DIALECT_FP4, 32).packed, Slow(w, a, DIALECT_FP4, 32))
    moved = w.clone()
    moved[:, 3] *= 0.5  # its error goes nowhere
    first, second = (quantize_calibrated(v, a, DIALECT_FP4, 32).packed for v in (w, moved))
    assert torch.equal(first.codes[:, 2:], second.codes[:, 2:])


def test_without_any_input_the_weight_is_rounded_to_nearest():
    w = weight(4, 64, 7)
    found = quantize_calibrated(w, torch.zeros(64, 64), DIALECT_FP4, 32)
    assert torch.equal(found.packed.codes, quantize(w, DIALECT_FP4, 32).codes)
    assert torch.equal(found.packed.meta, quantize(w, DIALECT_FP4, 32).meta)


def test_moments_that_are_not_positive_definite():
    w, a = weight(4, 64, 8), torch.eye(64)
    a[0, 1] = a[1, 0] = 1.5
    assert quantize_calibrated(w, a, DIALECT_FP4, 32).damping == pytest.approx(1)
    a[0, 1] = a[1, 0] = 5
    found = quantize_calibrated(w, a, SEMANTIC_32, 32, rotation="hadamard_32")
    nearest = quantize(w, SEMANTIC_32, 32, rotation="hadamard_32")
    assert found.damping is None
    assert torch.equal(found.packed.codes, nearest.codes)
    assert torch.equal(found.packed.meta, nearest.meta)
    assert found.packed.rotation == "hadamard_32"


def test_a_weight_on_the_grid_is_kept():
    w = quantize(weight(8, 128, 9), SEMANTIC_32, 32).dequantize()
    found = quantize_calibrated(w, moments(correlated(600, 128, 9)), SEMANTIC_32, 32)
    assert torch.equal(found.packed.dequantize(), w)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rotation", ["none", "hadamard_32"])
def test_the_output_is_kept_better_than_by_nearest_rounding(seed, rotation):
    for book, block_size in ((DIALECT_FP4, 32), (SEMANTIC_32, 16), (SEMANTIC_32, 64)):
        w, x = weight(32, 256, seed), correlated(1024, 256, seed, shared=0.3 + 0.3 * seed)
        x = rotate_activation(x, rotation)
        calibrated = quantize_calibrated(w, moments(x), book, block_size, rotation=rotation).packed
        nearest = quantize(w, book, block_size, rotation=rotation)
        exact = x.double() @ rotate_weight(w, rotation).double().T
        losses = [
            float((x.double() @ packed.dequantize().double().T - exact).square().sum())
            for packed in (calibrated, nearest)
        ]
        assert losses[0] < losses[1]


def test_the_same_bytes_again():
    w, a = weight(16, 320, 11), moments(correlated(1000, 320, 11))
    first, second = (quantize_calibrated(w, a, SEMANTIC_32, 32).packed for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.meta, second.meta)
    assert torch.equal(w, weight(16, 320, 11))  # arguments are not written to
    assert torch.equal(a, moments(correlated(1000, 320, 11)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"w": torch.full((2, 32), math.nan)}, "layer: nan at \\[0, 0\\]"),
        ({"A": torch.full((32, 32), math.inf)}, "A of layer: inf at \\[0, 0\\]"),
        ({"A": torch.eye(32).double()}, "A: torch.float64 .*it must be torch.float32 \\[32, 32\\]"),
        ({"A": torch.eye(16)}, "A: torch.float32 \\[16, 16\\] on cpu; it must be"),
        ({"w": torch.ones(2, 40), "A": torch.eye(40)}, "layer: has 40 columns; they must be a m"),
        ({"damping": 0.0}, "damping: 0.0; it must be above 0 and at most 1"),
        ({"damping": 1.5}, "damping: 1.5; it must be above 0 and at most 1"),
        ({"damping": math.nan}, "damping: nan; it must be above 0 and at most 1"),
        ({"block_size": 48}, "block_size: 48; allowed are 16, 32 and 64"),
        ({"window": 14}, "window: 14"),
        ({"rotation": "hadamard"}, "rotation: 'hadamard'"),
        (
            {"w": torch.ones(2, 48), "A": torch.eye(48), "block_size": 16,
             "rotation": "hadamard_32"},
            "layer: has 48 columns; rotation 'hadamard_32' needs a multiple of 32",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(changes, sentence):
    arguments = {"w": torch.ones(2, 32), "A": torch.eye(32)} | changes
    with pytest.raises(ValueError, match=sentence):
        quantize_calibrated(**arguments, name="layer")


def test_weights_without_rows():
    found = quantize_calibrated(torch.empty(0, 32), torch.eye(32))
    assert found.packed.shape == (0, 32)


def test_a_wide_matrix_in_panels_and_a_tall_one_in_groups_of_rows(monkeypatch):
    w, a = weight(7, 576, 12), moments(correlated(1500, 576, 12))
    whole = quantize_calibrated(w, a, SEMANTIC_32, 32).packed
    monkeypatch.setattr("dialect_kernels.second_moments._PANEL", 256)
    monkeypatch.setattr("dialect_kernels.calibrated._ROWS", 3)
    pieces = quantize_calibrated(w, a, SEMANTIC_32, 32).packed
    assert pieces.shape == w.shape
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.meta, pieces.meta)
    assert torch.equal(whole.row_exponent, pieces.row_exponent)


def test_one_factor_for_several_weights():
    a = moments(correlated(500, 96, 13))
    factor = SecondMoments.of(a).factor(0.01)
    for seed, rotation in ((1, "none"), (2, "hadamard_32")):
        w = weight(5, 96, seed)
        found = quantize_factored(w, factor, SEMANTIC_32, 16, rotation)
        expected = quantize_calibrated(w, a, SEMANTIC_32, 16, rotation=rotation).packed
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.meta, expected.meta)
        assert found.rotation == rotation
    with pytest.raises(ValueError, match="layer: inf at"):
        quantize_factored(w / 0, factor, name="layer")


def factor_of(seed, columns):
    return SecondMoments.of(moments(correlated(3 * columns, columns, seed))).factor(0.01)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


@pytest.mark.parametrize(
    ("back_end", "rows", "columns", "block_size"),
    [
        ("usual", 1, 32, 32),
        ("usual", 40, 96, 16),
        ("usual", 64, 320, 64),
        ("usual", 33, 544, 32),
        ("torch", 40, 96, 16),
        ("torch", 9, 320, 64),
    ],
)
def test_weights_together_have_the_bytes_of_one_after_the_other(
    back_end, rows, columns, block_size, monkeypatch
):
    """Each has its own factor, or two the same; in groups and at once; in groups of rows too."""
    if back_end == "torch":
        monkeypatch.setattr("dialect_kernels.ops._running", lambda device: torch_backend)
    rotation = "none" if columns == 96 else "hadamard_32"
    factors = [factor_of(seed, columns) for seed in range(4)]
    factors.append(factors[0])
    weights = [weight(rows, columns, seed) * 2.0 ** (3 * seed) for seed in range(5)]
    settings = {"book": SEMANTIC_32, "block_size": block_size, "rotation": rotation}
    expected = [quantize_factored(*each, **settings) for each in zip(weights, factors, strict=True)]
    assert not same(expected[0], quantize_factored(weights[0], factors[1], **settings))
    for together, most_rows in ((1, 2048), (2 * rows * columns, 2048), (1 << 30, 2048), (1, 7)):
        monkeypatch.setattr("dialect_kernels.calibrated._TOGETHER_ON_CPU", together)
        monkeypatch.setattr("dialect_kernels.calibrated._ROWS", most_rows)
        found = quantize_factored_alike(weights, factors, **settings)
        assert all(map(same, found, expected))
        assert all(packed.shape == (rows, columns) for packed in found)


def test_a_weight_whose_errors_overflow_spoils_no_other():
    factors = [factor_of(seed, 96) for seed in range(3)]
    factors[1] = UpperFactor([torch.full((96, 96), 3.0).triu(1) + torch.eye(96) * 1e-38])
    weights = [weight(5, 96, seed) for seed in range(3)]
    first, overflown, last = quantize_factored_alike(weights, factors, SEMANTIC_32)
    assert overflown is None
    assert quantize_factored(weights[1], factors[1], SEMANTIC_32) is None
    assert same(first, quantize_factored(weights[0], factors[0], SEMANTIC_32))
    assert same(last, quantize_factored(weights[2], factors[2], SEMANTIC_32))


def test_weights_together_that_are_not_alike_are_refused():
    factors = [factor_of(0, 32)] * 2
    with pytest.raises(ValueError, match="weights: 2 shapes and 2 factors for 2 weights"):
        quantize_factored_alike([weight(4, 32, 0), weight(5, 32, 0)], factors)
    with pytest.raises(ValueError, match="weights: 1 shapes and 1 factors for 2 weights"):
        quantize_factored_alike([weight(4, 32, 0)] * 2, factors[:1])
    bad = [weight(4, 32, 0), torch.full((4, 32), math.inf)]
    with pytest.raises(ValueError, match="second: inf at"):
        quantize_factored_alike(bad, factors, names=["first", "second"])
    assert quantize_factored_alike([], []) == []
    (empty,) = quantize_factored_alike([torch.empty(0, 32)], factors[:1])
    assert empty.shape == (0, 32)


class Counting(TorchDispatchMode):
    """Counts the operations that compute something: on a GPU, about one launch each."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_more_weights_take_hardly_more_operations(monkeypatch):
    """They bound a GPU where matrices are small; only products, one a block and weight, add up."""
    monkeypatch.setattr("dialect_kernels.ops._running", lambda device: torch_backend)
    factors = [factor_of(0, 32)] * 8
    weights = [weight(4, 32, seed) for seed in range(8)]
    counts = []
    for number in (1, 8):
        with Counting() as counting:
            quantize_factored_alike(weights[:number], factors[:number], SEMANTIC_32)
        counts.append(counting.count)
    assert 300 < counts[0] < counts[1] < 1.5 * counts[0]
