"""MXFP4 and NVFP4 of section 7 against an enumeration of their numbers."""

import numpy as np
import pytest
import torch

from dialect_kernels.baselines import quantize_mxfp4, quantize_nvfp4
from tests.support import brute_force as brute
from tests.support.format_checks import as_float32, data

KINDS = ("gaussian", "one_channel", "lognormal_channels", "student_t2", "wide", "grid")
TINY = 2.0**-149


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [64, 70])
def test_mxfp4(columns, kind, block_size):
    x = data(kind, 4, columns, seed=block_size)
    got = quantize_mxfp4(x, block_size)
    assert got.dtype == torch.float32
    assert np.array_equal(
        got.numpy().astype(np.float64), brute.quantize_mxfp4(as_float32(x), block_size)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [64, 70])
def test_nvfp4(columns, kind):
    x = data(kind, 4, columns, seed=7)
    got = quantize_nvfp4(x)
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), brute.quantize_nvfp4(as_float32(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_inputs(dtype):
    x = data("student_t2", 3, 64, seed=1).to(dtype)
    assert np.array_equal(quantize_mxfp4(x).numpy(), brute.quantize_mxfp4(as_float32(x)))
    assert np.array_equal(quantize_nvfp4(x).numpy(), brute.quantize_nvfp4(as_float32(x)))


def test_mxfp4_ties_saturation_and_subnormals():
    block = [4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, 7.99, -0.25, -2.5, -5.0]
    x = torch.tensor([block])
    wanted = [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 0.0, -2.0, -4.0]
    assert quantize_mxfp4(x).tolist() == [wanted]
    # E8M0 ends at 2**-127: half a step of the E2M1 grid there is 2**-129
    small = torch.tensor([[2.0**-129, 3 * 2.0**-129, 2.0**-128, TINY]])
    assert quantize_mxfp4(small).tolist() == [[0.0, 2.0**-127, 2.0**-128, 0.0]]
    big = torch.full((1, 32), torch.finfo(torch.float32).max)
    assert quantize_mxfp4(big).tolist() == [[6 * 2.0**125] * 32]


def test_every_e2m1_neighbourhood():
    """Levels, midpoints and the float32 numbers around them, in both formats."""
    x = torch.zeros(1, 64)
    points = [h / 4 for h in range(25)]
    around = torch.tensor(points)[1:, None].expand(-1, 1)
    below = torch.nextafter(around, torch.zeros_like(around))
    above = torch.nextafter(around, torch.full_like(around, 8.0))
    for chunk in torch.cat([below, around, above]).flatten().split(15):
        for sign in (1, -1):
            x = torch.zeros(1, 16)
            x[0, 0], x[0, 1 : 1 + len(chunk)] = 6.0, sign * chunk.clamp(max=6)
            assert np.array_equal(
                quantize_mxfp4(x, 16).numpy(), brute.quantize_mxfp4(x.numpy(), 16)
            )
            assert np.array_equal(quantize_nvfp4(x).numpy(), brute.quantize_nvfp4(x.numpy()))


def test_nvfp4_scales():
    # tensor scale (448 * 6) / (448 * 6) = 1; block scales 448, 1, and 2**-10 / 6 rounds to 0
    x = torch.zeros(3, 16)
    x[0, 0], x[1, :2], x[2, 0] = 448.0 * 6, torch.tensor([6.0, 2.5]), 2.0**-10
    assert quantize_nvfp4(x)[0, 0] == 448 * 6
    assert quantize_nvfp4(x)[1, :2].tolist() == [6.0, 2.0]
    assert not quantize_nvfp4(x)[2].any()


@pytest.mark.parametrize("function", [quantize_mxfp4, quantize_nvfp4])
def test_zeros_empties_and_refusals(function):
    assert not function(torch.zeros(2, 32)).any()
    for shape in ((0, 32), (2, 0)):
        assert function(torch.zeros(shape)).shape == shape
    assert function(torch.full((1, 16), TINY)).isfinite().all()
    for value in (float("nan"), float("inf")):
        x = torch.ones(2, 32)
        x[1, 3] = value
        with pytest.raises(ValueError, match=r"x: (nan|inf) at \[1, 3\]"):
            function(x)
    with pytest.raises(ValueError, match=r"x: .*float64"):
        function(torch.ones(2, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="2-D"):
        function(torch.ones(32))


def test_rows_of_a_tensor_with_the_scale_of_the_whole():
    x = data("lognormal_channels", 9, 64, seed=2)
    x[8] *= 64
    whole = quantize_nvfp4(x)
    part = quantize_nvfp4(x[2:5], largest=x.abs().amax())
    assert torch.equal(part, whole[2:5])
    assert not torch.equal(part, quantize_nvfp4(x[2:5]))


@pytest.mark.parametrize("function", [quantize_mxfp4, quantize_nvfp4])
def test_many_rows_are_rounded_as_each_alone(function):
    """More than one chunk; the first row holds the largest magnitude, so that all share a scale."""
    x = data("student_t2", 300, 512, seed=3)
    x[0, 0] = 2 * x.abs().amax()
    whole = function(x)
    for row in (0, 127, 128, 299):
        pair = torch.stack([x[0], x[row]])
        assert torch.equal(function(pair)[1], whole[row])


def test_zeros_keep_their_sign():
    x = torch.full((1, 32), -0.0)
    x[0, :16] = torch.tensor([6.0, -0.1] * 8)
    for function in (quantize_mxfp4, quantize_nvfp4):
        assert function(x)[0, 1].signbit()
        assert function(x)[0, 16:].eq(0).all()
