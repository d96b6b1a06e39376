"""Conversion: what is written, what is refused, and that nothing is written when it is."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dialect_kernels import SEMANTIC_32, quantize
from dialect_plugin.checkpoint.convert import convert, render
from dialect_plugin.checkpoint.options import ConvertOptions
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import JOURNAL, CheckpointError, open_packed
from dialect_plugin.scheme import Scheme
from tests.support.conversions import edit_config, hashes, options_of, refused
from tests.support.tiny_models import CONFIGS

QUANTIZED_IN_TWO_LAYERS = {
    "Phi3ForCausalLM": 8,
    "OPTForCausalLM": 12,
    "MixtralForCausalLM": 8,
}


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_every_architecture_of_the_table(architecture, tiny_model, tmp_path):
    source = tiny_model(architecture)
    result = convert(source, tmp_path / "packed", ConvertOptions(experts=False))
    weights = load_file(source / "model.safetensors")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    layers = {layer.name for layer in result.layers}
    assert len(layers) == QUANTIZED_IN_TWO_LAYERS.get(architecture, 14)
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            expected = quantize(weight, SEMANTIC_32)
            assert torch.equal(stored[f"{layer}.weight_packed"], expected.codes)
            assert torch.equal(stored[f"{layer}.weight_meta"], expected.meta)
            assert torch.equal(stored[f"{layer}.weight_row_exponent"], expected.row_exponent)
            assert name not in stored
        else:
            assert torch.equal(stored[name], weight)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "blockdialect"
    assert (tmp_path / "packed" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    card = (tmp_path / "packed" / "README.md").read_text()
    assert architecture in card
    assert "vllm serve" in card
    assert set(open_packed(tmp_path / "packed").layers) == layers


def test_shards_overrides_and_ignored_layers(tiny_model, tmp_path):
    source = tiny_model(shard="200KB")
    options = options_of(
        ignore=["model.layers.0.self_attn.o_proj"],
        overrides={"re:.*down_proj": {"block_size": 16}},
        block_size=64,
        lm_head=True,
    )
    convert(source, tmp_path / "packed", options)
    packed = open_packed(tmp_path / "packed")
    assert len(packed.checkpoint.shards) > 3
    assert {p.name for p in source.glob("*.safetensors")} == set(packed.checkpoint.shards)
    assert "model.layers.0.self_attn.o_proj" not in packed.layers
    assert packed.read("model.layers.1.mlp.down_proj").block_size == 16
    assert packed.read("model.layers.1.mlp.up_proj").block_size == 64
    assert "lm_head" in packed.layers
    scheme = packed.scheme
    assert "model.layers.0.self_attn.o_proj" in scheme.ignore
    assert set(scheme.overrides) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}


def test_bytes_do_not_depend_on_threads(tiny_model, tmp_path):
    for workers in (1, 2, 5):
        convert(tiny_model(shard="200KB"), tmp_path / str(workers), workers=workers)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2") == hashes(tmp_path / "5")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(source, tmp_path, dtype):
    weights = {k: v.to(dtype) for k, v in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors")
    convert(source, tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(
        stored[f"{name}.weight_packed"], quantize(weights[f"{name}.weight"], SEMANTIC_32).codes
    )
    assert stored["model.embed_tokens.weight"].dtype == dtype


def test_a_layer_is_converted_piece_by_piece(tiny_model, tmp_path, monkeypatch):
    whole = convert(tiny_model(), tmp_path / "whole")
    monkeypatch.setattr("dialect_plugin.checkpoint.convert._CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr("dialect_plugin.checkpoint.convert._COPY_BYTES", 1000)
    for workers in (2, 90):  # 7 or 3 rows at a time, and single rows
        pieces = convert(tiny_model(), tmp_path / f"{workers}", workers=workers)
        assert hashes(tmp_path / "whole") == hashes(tmp_path / f"{workers}")
        assert pieces.layers == whole.layers  # their losses are exact sums


def test_rows_below_the_window_are_reported(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name][2, :32] *= 2.0**-30  # becomes zeros
    weights[name][9, :32] *= 2.0**-10  # is rounded at the window's edge
    weights[name][11, :32] *= 2.0**-5  # inside the window
    weights[name][13, :32] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    result = convert(source, tmp_path / "packed")
    below = {x.name: x.rows_below_window for x in result.layers if x.rows_below_window}
    assert below == {name.removesuffix(".weight"): 2}
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "model.layers.0.mlp.down_proj (2 rows)" in card


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(source, tmp_path, value):
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 17] = value
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    refused(source, tmp_path / "packed", r"model.layers.1.mlp.down_proj.weight.*at \[3, 17\]")
    ignored = Scheme(ignore=["model.layers.1.mlp.down_proj"])
    assert convert(source, tmp_path / "packed", ignored).layers


def test_weights_that_change_while_they_are_converted(source, tmp_path):
    """NaN that appears after the check is not packed: the conversion stops, unfinished."""
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 17] = float("nan")
    changed = tmp_path / "changed.safetensors"
    save_file(weights, changed, {"format": "pt"})

    class ChangeAfterTheCheck(Silent):
        def begin(self, what, tensors, nbytes):
            if what == "quantizing":
                changed.replace(source / "model.safetensors")

    destination = tmp_path / "packed"
    with pytest.raises(CheckpointError, match=r"down_proj.weight changed while it was converted"):
        convert(source, destination, progress=ChangeAfterTheCheck())
    assert not (destination / "config.json").exists()
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        open_packed(destination)


def test_a_scheme_is_short_for_options_with_it(tiny_model, tmp_path):
    scheme = Scheme(block_size=16, activation_format="none")
    convert(tiny_model(), tmp_path / "short", scheme)
    convert(tiny_model(), tmp_path / "long", options_of(block_size=16, activation_format="none"))
    assert hashes(tmp_path / "short") == hashes(tmp_path / "long")
    assert open_packed(tmp_path / "short").scheme.block_size == 16


def test_pickled_weights_are_refused_with_the_remedy(source, tmp_path):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, tmp_path / "packed", "pytorch_model.bin.*save_pretrained")


def test_python_files_are_never_copied(source, tmp_path):
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "LICENSE.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    edit_config(source, auto_map={"AutoModel": "modeling.Model"})
    convert(source, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("*.py"))
    assert not list((tmp_path / "packed").glob("*.index.json"))
    assert "auto_map" not in json.loads((tmp_path / "packed" / "config.json").read_text())


def test_a_destination_in_use_is_refused_unless_overwritten(source, tmp_path):
    destination = tmp_path / "packed"
    destination.mkdir()
    (destination / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(source, destination)
    assert [p.name for p in destination.iterdir()] == ["mine.txt"]
    convert(source, destination, overwrite=True)
    assert not (destination / "mine.txt").exists()
    (destination / "photos").mkdir()
    with pytest.raises(CheckpointError, match="holds the directory photos"):
        convert(source, destination, overwrite=True)
    assert (destination / "config.json").exists()
    for inside in (source, source / "sub", tmp_path):
        with pytest.raises(CheckpointError, match="overlaps"):
            convert(source, inside)


def test_another_unfinished_conversion_is_not_continued(tiny_model, tmp_path):
    source, destination = tiny_model(), tmp_path / "packed"
    convert(source, destination)
    before = hashes(destination)
    (destination / JOURNAL).write_text(json.dumps({"fingerprint": "other", "shards": {}}))
    with pytest.raises(CheckpointError, match="unfinished conversion; run the same"):
        open_packed(destination)
    with pytest.raises(CheckpointError, match="unfinished conversion of another source"):
        convert(source, destination)
    (destination / JOURNAL).unlink()
    assert hashes(destination) == before


def test_a_finished_conversion_run_again_is_well(source, tmp_path):
    """It says so and writes nothing; with other options or another source it is refused."""
    destination = tmp_path / "packed"
    convert(source, destination, options_of(block_size=16))
    before = {path: path.stat().st_mtime_ns for path in destination.iterdir()}
    again = convert(source, destination, options_of(block_size=16))
    assert again.finished_before
    assert "finished; nothing to do" in render(again)
    assert {path: path.stat().st_mtime_ns for path in destination.iterdir()} == before
    for options in ({"block_size": 32}, {"block_size": 16, "ignore": ["re:.*layers.0.mlp"]}):
        with pytest.raises(CheckpointError, match="not empty"):
            convert(source, destination, options_of(**options))
    weights = load_file(source / "model.safetensors")
    times = (source / "model.safetensors").stat()
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        changed = {**weights, name: -weights[name]}
        save_file(changed, source / "model.safetensors", {"format": "pt"})
        os.utime(source / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(CheckpointError, match="not empty"):
            convert(source, destination, options_of(block_size=16))


def test_a_weight_without_columns_stays(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    weights[f"{name}.weight"] = torch.zeros(128, 0, dtype=torch.bfloat16)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    result = convert(source, tmp_path / "packed")
    assert result.choice.indivisible == (name,)
    stored = open_packed(tmp_path / "packed").checkpoint.tensors
    assert stored[f"{name}.weight"].shape == (128, 0)


def test_rows_below_the_exponent_window_are_one_line(source, tmp_path):
    done = convert(source, tmp_path / "packed")
    assert "exponent window" not in render(done)
    layers = [
        replace(layer, rows_below_window=rows)
        for layer, rows in zip(done.layers, (2, 0, 3, *[0] * 11), strict=True)
    ]
    assert (
        "5 rows of 2 layers have blocks below the exponent window; "
        f"{layers[2].name} has 3 of them\n"
    ) in render(replace(done, layers=tuple(layers)))
