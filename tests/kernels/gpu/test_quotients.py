"""Quotients of per-token FP8 without a division: the bytes are proven over all 16-bit numbers.

The kernel computes them with fused multiply-adds, which neither Triton's interpreter nor NumPy has:
here a sum of float80 numbers, in which products are exact, is rounded once.
"""

import numpy as np
import pytest

f32 = np.float32
BINADES = 21
"""Below 2**-10 times the largest magnitude of E4M3, quotients are 0; it is 2**9."""


def fma(a, b, c):
    """RN(a * b + c): the product has 48 bits, and the sum cancels or keeps 64."""
    return (np.longdouble(1) * a * b + c).astype(f32)


def e4m3(x):
    """The value of the nearest E4M3 number, ties to even."""
    magnitude = np.minimum(x, f32(448))
    exponent = np.maximum(magnitude.view(np.int32) & 0x7F800000, 121 << 23)
    place = (exponent + (20 << 23)).view(f32)
    return (magnitude + place) - place


def rows(bits):
    """The largest magnitude in [1, 2) of a row, and all other magnitudes that matter in it."""
    mantissas = np.arange(1 << (bits - 1), 1 << bits).astype(f32) / f32(1 << (bits - 1))
    below = mantissas[None, :] * np.exp2(-np.arange(BINADES)).astype(f32)[:, None]
    for largest in mantissas:
        yield largest, below[below <= largest]


@pytest.mark.parametrize(
    "bits", [pytest.param(8, id="bfloat16"), pytest.param(11, id="float16", marks=pytest.mark.slow)]
)
def test_one_correction_gives_the_quotient(bits):
    differing = 0
    for largest, x in rows(bits):
        scale = f32(largest) / f32(448)
        inverse = f32(1) / scale
        want = x / scale
        product = x * inverse
        got = fma(fma(-product, scale, x), inverse, product)
        assert np.array_equal(got, want)
        differing += np.count_nonzero(e4m3(product) != e4m3(want))
    assert differing, "a product alone would not do"


def test_scales_of_small_rows_leave_no_term_subnormal():
    """The smallest term of a correction, in a row that is not divided."""
    from dialect_kernels.gpu.quantize_fp8 import _SMALL_BITS

    largest = np.array([_SMALL_BITS.value], np.int32).view(f32)[0]
    assert largest == 2.0**-50
    smallest = largest * 2.0**-BINADES
    assert smallest * 2.0**-47 > np.finfo(f32).smallest_subnormal, "the remainder's last bit"
    biggest = np.finfo(f32).max / f32(448)
    assert f32(1) / biggest > np.finfo(f32).tiny
