"""What the row window costs, measured against a window without end (section 2).

Blocks are independent but for the window, so quantizing every block as a row of its own is
quantizing without one.
"""

import math

import numpy as np
import pytest
import torch

from dialect_kernels import DIALECT_FP4, quantize
from dialect_kernels.formatbook import Formatbook
from dialect_kernels.reference import blocks_below_window, round_activation
from tests.support import brute_force as brute
from tests.support.format_checks import BOOKS, as_float32, data

KINDS = ("gaussian", "outlier_channels", "one_channel", "lognormal_channels", "student_t2")
by_book = pytest.mark.parametrize("book", BOOKS.values(), ids=lambda book: book.name)
by_seed = pytest.mark.parametrize("seed", [0, 1])


def decibels(x: torch.Tensor, rounded: torch.Tensor) -> float:
    error = (x.double() - rounded.double()).square().sum()
    return 10 * math.log10(float(x.double().square().sum() / error))


def window_cost(x: torch.Tensor, book: Formatbook, block_size: int, window: int) -> float:
    """Loss of SQNR in dB."""
    free = quantize(x.view(-1, block_size), book, block_size).dequantize().view(x.shape)
    kept = quantize(x, book, block_size, window=window).dequantize()
    return decibels(x, free) - decibels(x, kept)


@by_seed
@pytest.mark.parametrize("kind", KINDS)
def test_window_13_costs_nothing(kind, seed):
    x = data(kind, 64, 4096, seed)
    for block_size in (16, 32, 64):
        assert abs(window_cost(x, DIALECT_FP4, block_size, 13)) < 0.0005


@by_book
@by_seed
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "one_channel"])
def test_window_7_costs_at_most_a_hundredth_of_a_decibel(kind, seed, book):
    assert window_cost(data(kind, 128, 1024, seed), book, 32, 7) <= 0.01


@by_book
@by_seed
@pytest.mark.parametrize(
    ("columns", "least", "most"), [(1024, 0.15, 0.25), (2048, 0.25, 0.5), (4096, 0.6, 1.0)]
)
def test_window_7_costs_less_than_one_of_thirty_decibels_beside_a_channel_times_2000(
    columns, least, most, seed, book
):
    x = data("one_channel", 64, columns, seed)
    assert 28 <= decibels(x, quantize(x, book, window=7).dequantize()) <= 33
    assert least <= window_cost(x, book, 32, 7) <= most  # what is lost is the other channels


@by_book
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_rounded_with_window_13_whatever_the_book_stores(kind, book):
    x = data(kind, 16, 2048, seed=2)
    free = quantize(x.view(-1, 32), book, 32, book.online_rule).dequantize().view(x.shape)
    rounded = round_activation(x, book, 32)
    assert abs(decibels(x, free) - decibels(x, rounded)) < 0.0005


@pytest.mark.parametrize("window", [0, 3, 7, 13])
@pytest.mark.parametrize("block_size", [16, 64])
def test_blocks_below_the_window_are_counted_per_row(block_size, window):
    x = data("wide", 6, 256, seed=3)
    x *= torch.exp2(-torch.arange(256) / 8)
    x[1, 64:128] = 0  # zero blocks are not below anything
    x[2] = 0
    expected = []
    for row in as_float32(x):
        blocks = [[abs(brute.whole(v)) for v in block] for block in row.reshape(-1, block_size)]
        own = [brute.block_exponent(block) for block in blocks]
        below = [max(own) - e > window and any(block) for e, block in zip(own, blocks, strict=True)]
        expected.append(sum(below))
    counts = blocks_below_window(x, block_size, window)
    assert counts.tolist() == expected
    assert np.ptp(expected) > 0
