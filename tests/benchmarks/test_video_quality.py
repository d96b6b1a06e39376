"""The quality benchmark of the video model: what it decides, and that the default follows it."""

import pytest

from benchmarks.lib.harness import RESULTS, read_result
from benchmarks.video import bench_video_quality as quality
from diffusers_hook import SemanticDialectConfig


@pytest.fixture(scope="module")
def figures():
    return read_result(RESULTS / "video_quality.json").figures


def test_the_shipped_default_is_what_was_found_to_help(figures):
    config = SemanticDialectConfig()
    assert figures["include_in_default"] == {
        "dialects": config.activation_format == "dialect",
        "book": config.book == "semantic_32",
        "decomposition": config.decomposes,
        "attention": config.selection == "top",
        "seda": config.groups,
    }


def test_gains_are_those_of_the_committed_videos(figures):
    formats = figures["formats"]
    for mechanism, (name, control) in quality.CONTROLS.items():
        found = figures["gains"][mechanism]
        assert (found["with"], found["control"]) == (name, control)
        again = quality.gain(formats[name]["psnr"], formats[control]["psnr"])
        assert {key: found[key] for key in again} == pytest.approx(again)
        assert found["low"] < found["mean"] < found["high"]
    for mechanism, included in figures["include_in_default"].items():
        assert included == (figures["gains"][mechanism]["low"] > 0)


def test_every_format_was_measured_on_every_video(figures):
    assert list(figures["formats"]) == list(quality.formats())
    for name, row in figures["formats"].items():
        assert row["videos"] == quality.PROMPTS * len(quality.SEEDS) == 48
        if name != "16 bit":
            assert {len(row[metric]) for metric in ("psnr", "ssim", "change")} == {48}
            assert len(row["sqnr"]) == 16  # a prompt's mean over seeds and noise levels


def test_the_interval_is_students():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.3027."""
    found = quality.gain([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found["mean"] == pytest.approx(2.0)
    assert found["high"] - found["mean"] == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert found["mean"] - found["low"] == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_the_scenes_are_different_ones():
    prompts = [scene.prompt for scene in quality._scenes()]
    assert len(prompts) == quality.PROMPTS
    assert len(set(prompts)) > 0.8 * len(prompts)
