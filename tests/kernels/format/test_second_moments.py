"""Second moments in panels, and their factor, against whole matrices in float64."""

import numpy as np
import pytest
import torch

from dialect_kernels import second_moments
from dialect_kernels.rotation import rotate_activation
from dialect_kernels.second_moments import SecondMoments
from tests.support.calibration_cases import correlated, moments, slow_factor


@pytest.fixture(autouse=True, params=[16, 48, 512])
def _panels(request, monkeypatch):
    monkeypatch.setattr(second_moments, "_PANEL", request.param)


def collected(x, parts=3):
    found = SecondMoments(x.shape[1])
    for part in x.chunk(parts):
        found.add(part)
    return found


@pytest.mark.parametrize("columns", [16, 80, 144])
def test_the_mean_and_the_factor(columns):
    x = correlated(4 * columns, columns, 0)
    found = collected(x)
    assert found.tokens == len(x)
    torch.testing.assert_close(found.mean(), moments(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.mean(), found.mean().T)
    expected = slow_factor(found.mean(), 0.01)
    factor = found.factor(0.01)
    whole = np.zeros((columns, columns))
    for first in range(0, columns, 16):
        rows = factor.rows(first, first + 16)
        assert rows.dtype == torch.float32
        assert rows.shape == (16, columns - first)
        whole[first : first + 16, first:] = rows
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert np.array_equal(whole, np.triu(whole))


def test_of_a_mean_that_is_known():
    a = moments(correlated(500, 80, 1))
    before = a.clone()
    found = SecondMoments.of(a)
    torch.testing.assert_close(found.mean(), (a + a.T) / 2)
    assert found.factor(0.01) is not None
    assert torch.equal(a, before)


def test_inputs_that_are_always_zero():
    x = correlated(500, 80, 2)
    x[:, [0, 17, 79]] = 0
    found = collected(x)
    rows = found.factor(0.01).rows(0, 16)
    assert (rows[0, 1:] == 0).all()
    np.testing.assert_allclose(rows, slow_factor(moments(x), 0.01)[:16], rtol=1e-4, atol=1e-5)
    assert not rows[1:, [17, 79]].any()
    unit = SecondMoments(80).factor(0.01).rows(0, 16)
    assert torch.equal(unit, torch.eye(80)[:16])


@pytest.mark.parametrize("place", [0, 40, 78])
def test_a_failed_factorization_leaves_the_moments_as_they_were(place):
    a = moments(correlated(500, 80, 3))
    a[60] = a[:, 60] = 0
    a[place, place + 1] = a[place + 1, place] = 5 * a.diagonal()[place : place + 2].amax()
    found = SecondMoments.of(a)
    assert found.factor(0.01) is None
    torch.testing.assert_close(found.mean(), a, rtol=1e-6, atol=1e-9)
    assert (found.mean()[60] == 0).all()
    assert found.factor(1e6) is not None


@pytest.mark.parametrize("rotation", ["none", "hadamard_32"])
def test_scaled_and_rotated_afterwards(rotation, monkeypatch):
    if second_moments._PANEL % 32:
        monkeypatch.setattr(second_moments, "_PANEL", 32)
    x, scale = correlated(300, 96, 5), torch.exp2(torch.arange(96) % 5 - 2.0)
    found = collected(x)
    exact = x.double().square().mean(dim=0)
    torch.testing.assert_close(found.diagonal(), exact, rtol=1e-5, atol=0)
    found.transform(scale, rotation)
    expected = moments(rotate_activation(x * scale, rotation))
    torch.testing.assert_close(found.mean(), expected, rtol=1e-4, atol=1e-4)


def test_numbers_that_are_not_finite():
    x = correlated(20, 80, 4)
    assert collected(x).isfinite()
    x[3, 70] = float("nan")
    assert not collected(x).isfinite()
    assert SecondMoments(0).mean().shape == (0, 0)


def test_moments_come_back_from_one_tensor():
    found = collected(correlated(200, 80, 3))
    again = SecondMoments.from_flat(80, found.flat(), found.tokens)
    assert (len(again), again.tokens) == (80, 200)
    assert torch.equal(again.mean(), found.mean())
    assert again.flat().nbytes == SecondMoments.nbytes_of(80)
    with pytest.raises(ValueError, match=r"flat: torch\.float32 \[16\]; the moments of 80 columns"):
        SecondMoments.from_flat(80, torch.zeros(16), 1)


def test_a_layer_needs_a_token_for_four_columns():
    assert not collected(correlated(19, 80, 4)).enough
    assert collected(correlated(20, 80, 4)).enough


def test_the_least_damping_that_is_enough():
    """Fewer tokens than columns: without damping the moments are singular."""
    found = collected(correlated(60, 80, 5))
    factor, damping = found.damped_factor(0.01)
    assert damping == 0.01
    assert factor.device.type == "cpu"
    assert not found._panels  # used up
    broken = SecondMoments.of(-torch.eye(80) * 2)
    assert broken.damped_factor(0.01) is None
