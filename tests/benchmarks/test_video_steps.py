"""The benchmark of protected steps: its table, and that its videos are others."""

from benchmarks.video import bench_video_quality as quality
from benchmarks.video import bench_video_steps as steps


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
