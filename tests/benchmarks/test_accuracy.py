"""The accuracy benchmark: its text, its rows, and the tables of what was measured."""

import pytest

from benchmarks.language import bench_accuracy
from benchmarks.language.bench_accuracy import CALIBRATED, FORMATS, GOALS, OURS, UNCALIBRATED
from dialect_plugin.evaluation.options import FormatName
from dialect_plugin.scheme import Scheme


def test_every_row_has_a_name_that_is_known():
    assert [str(FormatName.parse(name)) for name in FORMATS] == list(FORMATS)
    for name, scheme in OURS.items():
        base, *additions = name.split("+")
        assert FormatName.parse(base).block_size == scheme["block_size"]
        assert ("rotation" in additions) == (scheme["rotation"] != "none")
        Scheme(book="semantic_32", **scheme)
    assert {CALIBRATED, UNCALIBRATED, *(other for _, other, _ in GOALS)} <= {*OURS, *FORMATS}


def test_the_text_is_pythons_manual_and_disjoint_from_the_calibration_text(tmp_path):
    from importlib.resources import files

    text = bench_accuracy.write_text(tmp_path).read_text()
    assert len(text) > 300_000
    passages = files("dialect_plugin.calibration").joinpath("default.jsonl").read_text()
    words = text.split()
    runs = {" ".join(words[i : i + 12]) for i in range(len(words))}
    others = passages.split()
    assert not any(" ".join(others[i : i + 12]) in runs for i in range(len(others)))


def row(name, activations, divergence, ours=False):
    return {
        "name": name, "activations": activations, "ours": ours, "bits": 4.25,
        "nll": [1.0, 1.0], "divergence": divergence, "agreement": [0.75, 0.5],
    }  # fmt: skip


def test_tables_and_goals():
    rows = [
        row(name, kind, [0.1, 0.3] if name == CALIBRATED else [0.4, 0.8], name in OURS)
        for name in (CALIBRATED, *(name for name in FORMATS if name != "fp8"))
        for kind in ("W4A4", "W4A8", "W4A16")
    ]
    rows.append(row("fp8", "W8A8", [0.01, 0.02]))
    plan = row("plan, FP8 in 15 %", "mixed", [0.1, 0.2], ours=True)
    figures = {
        "title": "M",
        "gguf": "Q4",
        "found": {"perplexity": 9.5, "rows": rows},
        "planned": {"rows": [plan]},
        "windows": 2,
        "window": 512,
    }
    shown = bench_accuracy.tables(figures)
    assert shown["model"][1] == ["M", "Q4 in a GGUF file", "1,022", "9.500"]
    first = shown["w4a4"][1]
    assert first[0] == f"**{CALIBRATED}**"
    assert first[3:5] == ["0.2000 ± 0.1000", "62.5%"]
    assert first[5].startswith("0.333 ± ")
    names = [line[0] for line in shown["w4a8"]]
    assert "fp8" in names
    assert "fp8" not in [line[0] for line in shown["w4a16"]]
    goals = shown["goals"][1:]
    assert len(goals) == len(GOALS) + 1
    assert goals[-1][:2] == ["plan, FP8 in 15 % mixed", f"{CALIBRATED} W4A4"]
    assert goals[-1][2:] == ["≤ 0.75", "0.750 ± 0.167"]
    assert [x[0] for x in shown["w4a4"] if "plan" in x[0]] == ["**plan, FP8 in 15 %**"]
    assert goals[0][:3] == [f"{CALIBRATED} W4A4", f"{UNCALIBRATED} W4A4", "≤ 0.35"]


def test_an_unknown_model_is_refused():
    with pytest.raises(SystemExit, match="--models: 'llama'; it must be some of smollm2"):
        bench_accuracy.parts("llama")


def test_each_model_has_a_file_of_its_own():
    assert bench_accuracy.parts("shipped,gemma3-270m") == {
        "shipped": "shipped",
        "gemma3-270m": "gemma3",
    }
