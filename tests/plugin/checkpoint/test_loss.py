"""The loss of a weight: float32 row sums, whatever the slices, and their sum in float64."""

import math

import pytest
import torch

from dialect_kernels import SEMANTIC_32, quantize
from dialect_plugin.checkpoint import loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("slice_elements", [1, 200, 1 << 16])
def test_signal_and_noise_by_their_definition(dtype, slice_elements, monkeypatch):
    monkeypatch.setattr(loss, "_SLICE_ELEMENTS", slice_elements)
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept, values = weight.clone(), quantize(weight, SEMANTIC_32).dequantize()
    found = loss.signal_and_noise(weight, lambda start, stop: values[start:stop].clone())
    assert torch.equal(weight, kept)
    exact = weight.to(torch.float32)
    sums = [exact.square().sum(dim=1), (values - exact).square().sum(dim=1)]
    assert found == tuple(row.double().cumsum(dim=0)[-1].item() for row in sums)
    assert found[0] == pytest.approx(weight.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_nothing_to_measure(shape):
    empty = torch.empty(shape)
    assert loss.signal_and_noise(empty, lambda start, stop: empty[start:stop].clone()) == (0, 0)


def test_sqnr():
    assert loss.sqnr(100.0, 1.0) == 20
    assert loss.sqnr(100.0, 0.0) == math.inf
    assert loss.sqnr(0.0, 0.0) == math.inf
