"""Bytes at published shapes: the sums of the benchmark, by hand, and the goals they must meet."""

import pytest

from benchmarks import bench_video_speed as speed

LARGEST = {"Wan 2.1 1.3B": 0.30, "Wan 2.1 14B": 0.30, "Open-Sora 2.0": 0.40}


@pytest.fixture(scope="module")
def counted():
    return {name: speed.count_bytes(shape) for name, shape in speed.shapes().items()}


def test_goals(counted):
    for name, largest in LARGEST.items():
        size = counted[name]
        assert size["after"] <= largest * size["before"]
        assert size["layers_after"] <= 0.28 * size["layers_before"]


def test_wan_by_hand(counted):
    """1.3B: 30 blocks of two attentions (4 x 1536 x 1536) and a feed-forward layer (2 x 8960)."""
    width, hidden = 1536, 8960
    weights = 30 * (8 * width * width + 2 * width * hidden)
    rows = 30 * (8 * width + hidden + width)
    size = counted["Wan 2.1 1.3B"]
    assert size["quantized_weights"] == weights
    assert size["layers_before"] == 2 * weights
    assert size["layers_after"] == weights // 2 + weights // 32 + rows
    assert size["before"] - size["after"] == size["layers_before"] - size["layers_after"]
    assert size["fp8_layers"] == 0


def test_open_soras_modulation_is_fp8(counted):
    """19 double blocks with two modulations each, 38 single blocks, the final layer."""
    assert counted["Open-Sora 2.0"]["fp8_layers"] == 19 * 2 + 38 + 1
