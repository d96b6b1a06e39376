"""Activations rounded in flight: dialects with the online rule, and FP8 per token."""

import numpy as np
import pytest
import torch

from dialect_kernels import DIALECT_FP4
from dialect_kernels.baselines import quantize_fp8
from dialect_kernels.reference import round_activation
from tests.support import brute_force as brute
from tests.support.format_checks import BLOCK_SIZES, BOOKS, as_float32, data

by_book = pytest.mark.parametrize("book", brute.BOOKS, ids=lambda book: book.name)


@by_book
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", ["gaussian", "one_channel", "wide", "grid"])
def test_same_values_as_the_brute_force(kind, block_size, book):
    x = data(kind, 4, 160, seed=block_size)
    rounded = round_activation(x, BOOKS[book], block_size)
    assert rounded.dtype == torch.float32
    assert np.array_equal(
        rounded.numpy().astype(np.float64), brute.round_activation(as_float32(x), book, block_size)
    )


@by_book
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 2, 40), (1, 2, 1, 40)])
def test_any_number_of_dimensions_and_sixteen_bits(shape, dtype, book):
    tokens = data("student_t2", 4, 40, seed=1)[: int(np.prod(shape[:-1]))].to(dtype)
    rounded = round_activation(tokens.reshape(shape), BOOKS[book], 16)
    expected = brute.round_activation(as_float32(tokens), book, 16)
    assert rounded.shape == shape
    assert np.array_equal(rounded.reshape(-1, 40).numpy().astype(np.float64), expected)


@by_book
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 64)])
def test_empty(shape, book):
    assert round_activation(torch.zeros(shape), BOOKS[book]).shape == shape


@by_book
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_with_nan_or_inf_is_all_nan_and_the_others_are_untouched(value, book):
    x = data("gaussian", 4, 96, seed=2)
    clean = round_activation(x, BOOKS[book])
    x[1, 0] = x[3, 95] = value
    rounded = round_activation(x, BOOKS[book])
    assert rounded[[1, 3]].isnan().all()
    assert torch.equal(rounded[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("function", [round_activation, quantize_fp8])
def test_float64_is_refused(function):
    with pytest.raises(ValueError, match=r"x: .*float64"):
        function(torch.zeros(1, 32, dtype=torch.float64))


def test_block_size_is_checked():
    with pytest.raises(ValueError, match="block_size: 8"):
        round_activation(torch.zeros(1, 32), DIALECT_FP4, 8)


@pytest.mark.parametrize("kind", ["gaussian", "one_channel", "wide"])
def test_fp8_rows_are_the_nearest_e4m3_numbers(kind):
    x = data(kind, 4, 48, seed=3)
    q, scale = quantize_fp8(x)
    assert q.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    for t, row in enumerate(as_float32(x)):
        values, row_scale = brute.fp8_row(row)
        assert float(scale[t]) == row_scale
        assert np.array_equal(q[t].to(torch.float64).numpy(), values)


def test_fp8_ties_go_to_the_even_number():
    # amax 448 makes the scale 1; 17 lies between 16 (mantissa 000) and 18, 19 between 18 and 20
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, -(2.0**-10)]])
    q, scale = quantize_fp8(x)
    assert scale.tolist() == [1.0]
    assert q.to(torch.float32).tolist() == [[448, 16, 20, -16, 0, 2 * 2.0**-9, 0]]


def test_fp8_rows_of_zeros_and_of_nothing_have_scale_1():
    q, scale = quantize_fp8(torch.zeros(2, 8))
    assert scale.tolist() == [1.0, 1.0]
    assert not q.to(torch.float32).any()
    assert quantize_fp8(torch.zeros(2, 0))[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("largest", [2.0**-149, 2.0**-142, 2.0**-140, 2.0**-126])
def test_fp8_of_the_smallest_rows_stays_finite(largest):
    q, scale = quantize_fp8(torch.tensor([[largest, -largest, 0.0]]))
    assert q.to(torch.float32).isfinite().all()
    assert scale.isfinite().all()
    assert (scale > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_fp8_rows_with_nan_or_inf_are_nan(value):
    x = torch.ones(3, 8)
    x[1, 5] = value
    q, scale = quantize_fp8(x)
    assert scale[1].isnan()
    assert q[1].to(torch.float32).isnan().all()
    assert (q[[0, 2]].to(torch.float32) * scale[[0, 2], None] == 1).all()
