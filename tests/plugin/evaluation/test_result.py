"""Means, standard errors and paired ratios; the table and its JSON."""

import json
import math

import pytest
import torch

from dialect_plugin.evaluation.plot import check_plot, plot
from dialect_plugin.evaluation.result import Evaluation, Position, Row, render

WORST = Position(0, 7, 3.25, "of a\nspider", " eight", " eight", " six")


def row(name, activations, divergence, ours=False, worst=()):
    nll = tuple(1.0 + value for value in divergence)
    agreement = tuple(1 - value for value in divergence)
    return Row(name, activations, ours, 4.25, nll, tuple(divergence), agreement, worst)


def evaluation(**changes):
    rows = (
        row("packed", "W4A4", [0.2, 0.4, 0.3], ours=True, worst=(WORST,)),
        row("packed", "W4A8", [0.1, 0.1, 0.1], ours=True),
        row("nvfp4-16", "W4A4", [0.4, 0.6, 0.8]),
    )
    settings = {
        "source": "m", "dtype": "bfloat16", "text": "t.txt", "tokens_sha256": "0", "windows": 3,
        "sequence_length": 512, "scope": "linear", "layers": 14, "reference": (1.0, 1.0, 1.0),
        "rows": rows, "ratio_to": "nvfp4-16",
    }  # fmt: skip
    return Evaluation(**(settings | changes))


def test_means_and_standard_errors_are_over_windows():
    one = row("x", "W4A4", [0.2, 0.4, 0.3])
    assert one.mean_divergence == pytest.approx(0.3)
    assert one.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert one.perplexity == pytest.approx(math.exp(1.3))
    assert one.same_top == pytest.approx(0.7)
    assert row("x", "W4A4", [0.2]).standard_error is None


def test_a_ratio_is_that_of_paired_windows():
    hard = torch.tensor([0.1, 0.5, 2.0, 0.3, 1.0])  # what makes a window hard for both
    first, second = row("a", "W4A4", (0.5 * hard).tolist()), row("b", "W4A4", hard.tolist())
    ratio, error = first.ratio(second)
    assert ratio == pytest.approx(0.5)
    assert error == pytest.approx(0, abs=1e-7)
    assert second.ratio(row("c", "W4A4", [0.3] * 5))[1] > 0.5
    assert row("d", "W4A4", [0.2]).ratio(row("e", "W4A4", [0.4])) == (0.5, None)


def test_the_error_of_a_ratio_is_the_spread_of_repeated_experiments():
    generator = torch.Generator().manual_seed(0)
    windows = torch.rand(400, 16, 2, generator=generator, dtype=torch.float64) + 0.5
    found = [
        row("a", "W4A4", one[:, 0].tolist()).ratio(row("b", "W4A4", one[:, 1].tolist()))
        for one in windows
    ]
    ratios, errors = torch.tensor(found, dtype=torch.float64).T
    assert float(errors.mean()) == pytest.approx(float(ratios.std()), rel=0.1)


def lines(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_table():
    found = lines(render(evaluation()))
    assert found[0] == ("m on t.txt: 1,533 tokens in 3 windows of 512; 14 linear layers emulated")
    assert "bfloat16 2.718" in found
    assert "packed W4A4 4.250 3.669 0.3000 ± 0.0577 70.0% 0.500 ± 0.106" in found
    assert "packed W4A8 4.250 3.004 0.1000 ± 0.0000 90.0%" in found  # no such peer in W4A8
    assert "nvfp4-16 W4A4 4.250 4.953 0.6000 ± 0.1155 40.0% 1.000 ± 0.000" in found
    assert "where packed W4A4 differs most, and what each holds most probable" in found
    assert r"'of a\nspider' ' eight' ' eight' ' six' 3.25" in found
    assert "KL to" not in render(evaluation(ratio_to=None))


def test_json_has_every_window_and_every_figure():
    found = json.loads(json.dumps(evaluation().to_json(), allow_nan=False))
    first, second, _ = found["rows"]
    assert first["divergence"] == [0.2, 0.4, 0.3]
    assert first["ratio"] == pytest.approx(0.5)
    assert first["worst"][0]["token"] == " eight"
    assert second["ratio"] is None
    assert found["perplexity"] == pytest.approx(math.e)


def test_a_divergence_of_zero_divides_nothing():
    same = row("nvfp4-16", "W4A4", [0.0, 0.0])
    found = evaluation(rows=(row("packed", "W4A4", [0.1, 0.1]), same))
    assert found.base_of(found.rows[0]) is None


def test_the_plot_has_a_panel_for_each_kind_of_activations(tmp_path):
    path = tmp_path / "kl.svg"
    check_plot(path)
    plot(evaluation(), path)
    drawn = path.read_text()
    assert "W4A4" in drawn
    assert "W4A8" in drawn
    with pytest.raises(ValueError, match=r"--plot: .*kl.txt; its name must end in"):
        check_plot(tmp_path / "kl.txt")
