"""Rule gptq in MXFP4 and NVFP4 against a slow reading in float64."""

import math

import numpy as np
import pytest
import torch

from dialect_kernels.baselines import quantize_mxfp4, quantize_nvfp4
from dialect_kernels.calibrated import quantize_calibrated_baseline
from dialect_kernels.rotation import rotate_activation, rotate_weight
from tests.support.brute_force import E4M3, E4M3_WHOLE, round_signed
from tests.support.calibration_cases import correlated, moments, slow_factor, weight

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
PLAIN = {"mxfp4": quantize_mxfp4, "nvfp4": quantize_nvfp4}
CASES = [("mxfp4", 32), ("mxfp4", 16), ("nvfp4", 16)]


def scale_of(values, tensor_scale):
    """The scale of a block whose numbers are `values`; MXFP4's without a scale of the tensor."""
    largest = np.abs(values).max()
    if tensor_scale is None:
        return 2.0 ** max(-127, math.frexp(largest)[1] - 3)
    wanted = np.float32(np.float32(largest) / np.float32(6)) / tensor_scale
    return np.float64(np.float32(round_signed(E4M3, E4M3_WHOLE, min(wanted, 448))) * tensor_scale)


def slow(w, a, format_name, block_size, damping=0.01):
    """The definition, element by element in float64."""
    w, factor = w.double().numpy().copy(), slow_factor(a, damping)
    amax = np.float32(np.abs(w).max())
    tensor_scale = None if format_name == "mxfp4" else amax / np.float32(448 * 6)
    out = np.zeros(w.shape, dtype=np.float32)
    for row in range(len(w)):
        for start in range(0, w.shape[1], block_size):
            scale = scale_of(w[row, start : start + block_size], tensor_scale)
            for column in range(start, start + block_size):
                value, rounded = w[row, column], 0.0
                if scale:
                    nearest = E2M1[np.abs(E2M1 * scale - abs(value)).argmin()]
                    rounded = np.copysign(nearest, value) * scale
                out[row, column] = rounded
                error = (value - rounded) / factor[column, column]
                w[row, column + 1 :] -= error * factor[column, column + 1 :]
    return out


@pytest.mark.parametrize(("format_name", "block_size"), CASES)
@pytest.mark.parametrize("rotation", ["none", "hadamard_32"])
def test_the_values_are_those_of_the_definition(format_name, block_size, rotation):
    w, x = weight(3, 320, 0), rotate_activation(correlated(1300, 320, 0), rotation)
    a = moments(x)
    found = quantize_calibrated_baseline(w, a, format_name, block_size, rotation=rotation)
    assert found.damping == 0.01
    exact = rotate_weight(w, rotation)
    assert np.array_equal(found.values.numpy(), slow(exact, a, format_name, block_size))
    assert not torch.equal(found.values, PLAIN[format_name](exact, block_size))


@pytest.mark.parametrize("format_name", ["mxfp4", "nvfp4"])
def test_sixteen_bit_weights_and_the_usual_block(format_name):
    w, a = weight(4, 96, 1).bfloat16(), moments(correlated(400, 96, 1))
    found = quantize_calibrated_baseline(w, a, format_name, damping=0.1)
    block_size = {"mxfp4": 32, "nvfp4": 16}[format_name]
    assert np.array_equal(found.values.numpy(), slow(w, a, format_name, block_size, 0.1))


def test_blocks_that_nvfp4_loses_and_blocks_that_outgrow_the_tensor():
    """The first block becomes 0; the last makes up for one with inputs 1000 times as large."""
    x = correlated(600, 16, 3)
    x = torch.cat([correlated(600, 16, 5), x, x * 1e-3 + 1e-5 * correlated(600, 16, 4)], dim=1)
    w, a = weight(6, 48, 3), moments(x)
    w[:, :16] *= 1e-6
    w[:, 32:] *= 0.5
    expected = slow(w, a, "nvfp4", 16, 1e-4)
    found = quantize_calibrated_baseline(w, a, "nvfp4", damping=1e-4).values.numpy()
    assert np.array_equal(found, expected)
    largest = np.abs(expected).reshape(6, 3, 16).max(axis=(0, 2))
    cap = float(w.abs().max())
    assert largest[0] == 0
    assert largest[2] == pytest.approx(cap, rel=1e-6)
    assert float(w[:, 32:].abs().max()) < 0.9 * cap


@pytest.mark.parametrize(("format_name", "block_size"), CASES)
def test_the_output_is_kept_better_than_by_nearest_rounding(format_name, block_size):
    w, x = weight(32, 256, 4), correlated(1024, 256, 4)
    found = quantize_calibrated_baseline(w, moments(x), format_name, block_size).values
    exact = x.double() @ w.double().T
    losses = [
        float((x.double() @ values.double().T - exact).square().sum())
        for values in (found, PLAIN[format_name](w, block_size))
    ]
    assert losses[0] < 0.7 * losses[1]


@pytest.mark.parametrize("format_name", ["mxfp4", "nvfp4"])
def test_moments_that_are_not_positive_definite_and_empty_weights(format_name):
    w, a = weight(4, 64, 8), torch.eye(64)
    a[0, 1] = a[1, 0] = 5
    found = quantize_calibrated_baseline(w, a, format_name, rotation="hadamard_32")
    assert found.damping is None
    assert torch.equal(found.values, PLAIN[format_name](rotate_weight(w)))
    empty = quantize_calibrated_baseline(torch.empty(0, 32), torch.eye(32), format_name)
    assert empty.values.shape == (0, 32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format_name": "fp4"}, "format_name: 'fp4'; allowed are 'mxfp4' and 'nvfp4'"),
        ({"w": torch.full((2, 32), math.inf)}, "layer: inf at \\[0, 0\\]"),
        ({"w": torch.full((2, 32), 3e38), "rotation": "hadamard_32"}, "layer: row 0 overflows"),
        ({"A": torch.eye(16)}, "A: torch.float32 \\[16, 16\\] on cpu; it must be"),
        ({"block_size": 48}, "block_size: 48; allowed are 16, 32 and 64"),
        ({"damping": 0.0}, "damping: 0.0; it must be above 0 and at most 1"),
    ],
)
def test_what_is_refused(changes, sentence):
    arguments = {"w": torch.ones(2, 32), "A": torch.eye(32), "format_name": "mxfp4"} | changes
    with pytest.raises(ValueError, match=sentence):
        quantize_calibrated_baseline(**arguments, name="layer")
