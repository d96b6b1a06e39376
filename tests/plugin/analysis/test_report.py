"""The comparison of formats: figures against float64, escaping, sampling, and the command."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dialect_kernels import SEMANTIC_32, quantize
from dialect_kernels.baselines import quantize_mxfp4, quantize_nvfp4
from dialect_plugin.analysis.report import SAMPLED_ROWS, FormatLoss, LayerReport, Report
from dialect_plugin.analysis.report_page import report_page
from dialect_plugin.cli import app

LAYER = "model.layers.1.mlp.down_proj"
NAMES = ["BlockDialect-16", "BlockDialect-32", "BlockDialect-64", "MXFP4-32", "NVFP4-16"]


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def measured(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    return data | {"layers": {layer["name"]: layer for layer in data["layers"]}}


@pytest.fixture(scope="module")
def tiny_report(tiny_model):
    return measured(tiny_model())


def test_sqnr_is_what_float64_gives(tiny_model, tiny_report):
    weight = load_file(tiny_model() / "model.safetensors")[f"{LAYER}.weight"]
    rounded = {
        f"BlockDialect-{b}": quantize(weight, SEMANTIC_32, b).dequantize() for b in (16, 32, 64)
    }
    rounded |= {"MXFP4-32": quantize_mxfp4(weight, 32), "NVFP4-16": quantize_nvfp4(weight)}
    assert tiny_report["formats"] == list(rounded) == NAMES
    signal = weight.double().square().sum()
    for name, values in rounded.items():
        noise = (weight.double() - values.double()).square().sum()
        loss = tiny_report["layers"][LAYER]["losses"][name]
        assert loss["noise"] == pytest.approx(noise.item(), rel=1e-5)
        assert loss["sqnr_db"] == pytest.approx(10 * (signal / noise).log10().item(), abs=1e-4)


def test_bits_and_dialects_are_those_of_the_packed_tensor(tiny_model, tiny_report):
    weight = load_file(tiny_model() / "model.safetensors")[f"{LAYER}.weight"]
    rows, columns = weight.shape
    for block_size in (16, 32, 64):
        loss = tiny_report["layers"][LAYER]["losses"][f"BlockDialect-{block_size}"]
        assert loss["bits_per_weight"] == 4 + 8 / block_size + 8 / columns
        meta = quantize(weight, SEMANTIC_32, block_size).meta.flatten().tolist()
        assert loss["dialects"] == [sum(m & 31 == i for m in meta) for i in range(32)]
        assert sum(loss["dialects"]) == rows * columns // block_size
    assert tiny_report["layers"][LAYER]["losses"]["MXFP4-32"]["dialects"] is None


def test_totals_are_over_all_layers(tiny_report):
    layers = tiny_report["layers"].values()
    for name in NAMES:
        total = tiny_report["totals"][name]
        noise = sum(layer["losses"][name]["noise"] for layer in layers)
        signal = sum(layer["signal"] for layer in layers)
        assert total["noise"] == pytest.approx(noise, rel=1e-12)
        expected = 10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)).item()
        assert total["sqnr_db"] == pytest.approx(expected, abs=1e-9)
    assert sum(tiny_report["totals"]["BlockDialect-32"]["dialects"]) == sum(
        layer["rows"] * layer["columns"] // 32 for layer in layers
    )


def test_the_layers_are_those_a_conversion_would_quantize(tiny_model, tiny_report):
    assert len(tiny_report["layers"]) == 14
    few = ("--max-rows", 4)
    chosen = measured(tiny_model(), "--ignore", "re:.*mlp", "--lm-head", *few)["layers"]
    assert "lm_head" in chosen
    assert not [name for name in chosen if "mlp" in name]
    refused = run(tiny_model(), "--ignore", "re:.*mpl")
    assert refused.exit_code == 1
    assert "matches no layer" in refused.stderr


def test_blocks_that_do_not_divide_the_columns_are_left_out(tiny_model, tmp_path):
    source = Path(shutil.copytree(tiny_model(), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"][:, :48].contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    losses = measured(source, "--targets", LAYER)["layers"][LAYER]["losses"]
    assert set(losses) == {"BlockDialect-16", "NVFP4-16"}
    shown = run(source, "--targets", LAYER).stdout
    assert "–" in shown


def test_sampled_rows_are_evenly_spread_and_always_the_same(tiny_model):
    first, second = (measured(tiny_model(), "--targets", LAYER, "--max-rows", 50) for _ in range(2))
    assert first == second
    weight = load_file(tiny_model() / "model.safetensors")[f"{LAYER}.weight"]
    layer = first["layers"][LAYER]
    assert (layer["rows"], layer["measured_rows"]) == (128, 50)
    rows = [i * 128 // 50 for i in range(50)]
    sample = weight[rows].double()
    assert layer["signal"] == pytest.approx(128 / 50 * sample.square().sum().item(), rel=1e-5)
    error = sample - quantize(weight[rows], SEMANTIC_32, 32).dequantize().double()
    noise = layer["losses"]["BlockDialect-32"]["noise"]
    assert noise == pytest.approx(128 / 50 * error.square().sum().item(), rel=1e-5)


def test_a_weight_of_zeros_has_no_noise_and_valid_json(tiny_model, tmp_path):
    source = Path(shutil.copytree(tiny_model(), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors[f"{LAYER}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    loss = measured(source, "--targets", LAYER)["layers"][LAYER]["losses"]["BlockDialect-32"]
    assert (loss["noise"], loss["sqnr_db"]) == (0.0, None)
    page = tmp_path / "zero.html"
    assert run(source, "--targets", LAYER, "--html", page).exit_code == 0


def test_nan_is_refused_with_its_place(tiny_model, tmp_path):
    source = Path(shutil.copytree(tiny_model(), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors[f"{LAYER}.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused = run(source, "--html", tmp_path / "page.html")
    assert refused.exit_code == 1
    assert f"{LAYER}.weight: nan at [3, 5]" in refused.stderr
    assert not (tmp_path / "page.html").exists()


def test_nan_among_sampled_rows_is_refused_with_its_place_in_the_whole(tiny_model, tmp_path):
    source = Path(shutil.copytree(tiny_model(), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors[f"{LAYER}.weight"][25 * 128 // 50, 5] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused = run(source, "--targets", LAYER, "--max-rows", 50)
    assert refused.exit_code == 1
    assert f"{LAYER}.weight: inf at [64, 5]" in refused.stderr


def test_rows_are_sampled_by_default_and_the_output_says_so(tiny_model):
    source = tiny_model(intermediate_size=512)
    targets = ("--targets", r"re:.*mlp\.(gate|up)_proj")
    name = "model.layers.0.mlp.up_proj"
    by_default = measured(source, *targets)
    assert by_default == measured(source, *targets, "--max-rows", SAMPLED_ROWS)
    assert by_default["layers"][name]["measured_rows"] == SAMPLED_ROWS == 256
    whole = measured(source, *targets, "--all-rows")["layers"][name]
    assert whole["measured_rows"] == whole["rows"] == 512
    for entry, loss in by_default["layers"][name]["losses"].items():
        assert loss["sqnr_db"] == pytest.approx(whole["losses"][entry]["sqnr_db"], abs=0.2)
    assert "measured on at most 256 rows of a layer" in run(source, *targets).stdout
    assert "measured on all rows" in run(source, *targets, "--all-rows").stdout


def test_the_figures_do_not_depend_on_the_number_of_threads(tiny_model, monkeypatch):
    whole = measured(tiny_model())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert measured(tiny_model()) == whole


@pytest.mark.parametrize(
    ("where", "sentence"),
    [(".", "is a directory; give the name of a file"), ("no/page.html", "lies in a directory")],
)
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_measured(
    tiny_model, tmp_path, where, sentence
):
    refused = run(tiny_model(), "--html", tmp_path / where)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("blockdialect: --html: ")
    assert sentence in refused.stderr
    assert "measuring" not in refused.stderr


class Page(HTMLParser):
    """What a browser would load or run, and the text it would show."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.loaded = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in {"src", "href", "xlink:href", "data", "action"} or name.startswith("on"):
                self.loaded.append((tag, name, value))

    def handle_data(self, data):
        self.text.append(data)


def hostile_report():
    name = "model.layers.0.<script>alert(\"1\")</script>.$x^{$ & 'q'"
    losses = {entry: FormatLoss(4.25, 1.0, 20.0, (1,) * 16) for entry in NAMES}
    layer = LayerReport(name, 2, 64, 1, 100.0, losses)
    source = "<img src=x onerror=alert(1)>"
    return Report(source, tuple(NAMES), (layer,)), name


def test_names_are_escaped_and_the_page_stands_alone():
    report, name = hostile_report()
    page = Page(report_page(report))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert name in page.text
    assert any("<img src=x onerror=alert(1)>" in text for text in page.text)
    assert page.tags.count("svg") == 2
    # the only references are those inside the plots, to their own parts
    assert {tag for tag, _, _ in page.loaded} == {"use"}
    assert all(value.startswith("#") for _, _, value in page.loaded)
    assert not re.search(r"url\((?!#)|@import|<link|<iframe", report_page(report))


def test_the_page_shows_the_figures_and_the_sample():
    report, _ = hostile_report()
    cells = [text.strip() for text in Page(report_page(report)).text]
    assert cells.count("20.00") == 2 * len(NAMES)
    assert "(1 rows)" in cells


def test_the_command_writes_the_same_page_twice(tiny_model, tmp_path):
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    for page in pages:
        done = run(tiny_model(), "--html", page, "--max-rows", 8)
        assert done.exit_code == 0, done.stderr
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert LAYER in pages[0].read_text(encoding="utf-8")
