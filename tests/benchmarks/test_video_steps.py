"""The benchmark of protected steps: what it compares, and that its videos are others."""

import pytest

from benchmarks.lib.harness import RESULTS, read_result
from benchmarks.video import bench_video_quality as quality
from benchmarks.video import bench_video_steps as steps


@pytest.fixture(scope="module")
def figures():
    return read_result(RESULTS / "video_steps.json").figures


def test_gains_are_those_of_the_committed_videos(figures):
    formats = figures["formats"]
    assert ["16 bit", *formats] == list(steps.formats())
    for row in formats.values():
        assert len(row["psnr"]) == steps.PROMPTS * len(steps.SEEDS) == 32
        for key, control in (("over_alone", steps.ALONE), ("over_salient", steps.SALIENT)):
            if key in row:
                again = quality.gain(row["psnr"], formats[control]["psnr"])
                assert row[key] == pytest.approx(again)


def test_the_control_has_as_many_rows_in_other_steps(figures):
    auto, another = (figures["formats"][name] for name in ("auto, decomposed", steps.ANOTHER))
    assert another["additional_rows"] == auto["additional_rows"]
    assert {len(protected) for protected in (*auto["protected"], *another["protected"])} == {1}
    for ours, theirs in zip(auto["protected"], another["protected"], strict=True):
        assert ours != theirs


def test_the_videos_are_none_of_those_that_the_rule_was_found_on():
    assert not set(steps.SEEDS) & {*quality.SEEDS, 10, 11, 12}
    assert steps._SCENES not in (16, 17)


def test_the_table_names_costs_and_gains():
    gain = {"mean": 1.5, "low": 1.0, "high": 2.0}
    plain = {"psnr": [27.0, 28.0], "protected": [[], []], "additional_rows": [0.0, 0.0],
             "calls_in_fp8": [0.0, 0.0], "layers": [60, 60]}  # fmt: skip
    ours = plain | {"psnr": [29.0, 29.0], "protected": [[14], [14]], "over_alone": gain,
                    "additional_rows": [0.0625, 0.0625], "layers": [40, 40]}  # fmt: skip
    table = steps.tables({"formats": {steps.ALONE: plain, "ours": ours}})["gains"]
    assert table[1] == [steps.ALONE, "–", "–", "27.50 dB", "–", "–"]
    assert table[2] == [
        "ours", "14", "6.2% more rows, 20 of 60 layers in 16 bit", "29.00 dB",
        "+1.50 dB (+1.00 … +2.00)", "–",
    ]  # fmt: skip
