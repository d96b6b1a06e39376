"""The report on outputs: table, JSON and page."""

import json
import re

import pytest
from typer.testing import CliRunner

from dialect_plugin.analysis.output_error import LayerOutput, OutputLoss
from dialect_plugin.analysis.output_report import OutputReport, render
from dialect_plugin.analysis.report_page import output_page
from dialect_plugin.cli import app

NAMES = ["BlockDialect-16", "BlockDialect-32", "BlockDialect-64", "MXFP4-32", "NVFP4-16"]
SMALL = ["--samples", "4", "--sequence-length", "64"]


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(
        app, ["report", *map(str, arguments), "--calibrate", "default", *SMALL]
    )


@pytest.fixture(scope="module")
def tiny(tiny_model):
    done = run(tiny_model(), "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_the_json_holds_everything(tiny):
    assert (tiny["text"], tiny["book"], tiny["rotation"]) == (
        "default", "semantic_32", "hadamard_32"
    )  # fmt: skip
    assert tiny["formats"] == NAMES
    assert len(tiny["layers"]) == 14
    for layer in tiny["layers"]:
        assert list(layer["losses"]) == NAMES
        for loss in layer["losses"].values():
            assert set(loss["nats"]) == {"W4A4", "W4A8", "W4A16"}
            assert 0 < loss["nats"]["W4A16"] < loss["nats"]["W4A8"] < loss["nats"]["W4A4"]
            assert loss["sqnr_db"]["W4A16"] > loss["sqnr_db"]["W4A8"] > loss["sqnr_db"]["W4A4"]
    for name in NAMES:
        nats = sum(layer["losses"][name]["nats"]["W4A8"] for layer in tiny["layers"])
        assert tiny["totals"][name]["nats"]["W4A8"] == pytest.approx(nats)


def test_book_and_rotation_are_options(tiny_model, tiny):
    done = run(tiny_model(), "--json", "--rotation", "none", "--book", "dialect_fp4")
    found = json.loads(done.stdout)
    assert (found["book"], found["rotation"]) == ("dialect_fp4", "none")
    assert found["layers"][0]["losses"] != tiny["layers"][0]["losses"]


def hostile():
    loss = OutputLoss(4.25, *({"none": n, "fp8": 2 * n, "dialect": 3 * n} for n in (0.01, 0.002)))
    losses = dict.fromkeys(NAMES, loss)
    first = LayerOutput("model.layers.0.<script>", 4, 64, 2, 1.0, losses)
    last = LayerOutput("model.layers.1.o_proj", 4, 16, 4, 1.0, {NAMES[0]: loss})
    return OutputReport(
        "<img src=x>", "<b>", tuple(NAMES), (first, last), "semantic_32", "hadamard_32"
    )


def test_the_table_has_losses_shares_and_dashes():
    lines = [line.split() for line in render(hostile()).splitlines()]
    found = {line[0]: line[1:] for line in lines if line}
    assert found["0.<script>"] == [
        "50.0", "2.000", "4.000", "6.000", "6.000", "6.000", "6.000", "6.000", "15.2"
    ]  # fmt: skip
    assert found["1.o_proj"] == ["50.0", "–", "–", "–", "6.000", "–", "–", "–", "–"]
    assert "measured on at most 2 rows of a layer" in render(hostile())


def test_the_page_is_escaped_and_stands_alone():
    page = output_page(hostile())
    assert "<script" not in page
    assert "<img" not in page
    assert "model.layers.0.&lt;script&gt;" in page
    assert "(2 rows)" in page
    assert not re.search(r"url\((?!#)|@import|<link|<iframe", page)


def test_the_command_writes_the_page(tiny_model, tmp_path):
    done = run(tiny_model(), "--html", tmp_path / "page.html", "--max-rows", 16)
    assert done.exit_code == 0, done.stderr
    assert "estimated loss in thousandths of a nat per token" in done.stdout
    assert "model.layers.1.mlp.down_proj" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_options_of_the_text_need_it(tiny_model):
    refused = CliRunner().invoke(app, ["report", str(tiny_model()), "--damping", "0.1"])
    assert refused.exit_code == 1
    assert "--damping: 0.1 has no effect without --calibrate" in refused.stderr
