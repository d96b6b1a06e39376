"""Means of keys and values for a 4-bit KV cache: measured, stored, shown, and left out."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dialect_plugin.calibration.calibrator import Calibrator
from dialect_plugin.calibration.options import CalibrationOptions
from dialect_plugin.calibration.text import read_text
from dialect_plugin.checkpoint.convert import convert, render
from dialect_plugin.checkpoint.inspection import inspect_checkpoint
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import CheckpointError, open_packed
from dialect_plugin.cli import app
from tests.support.calibration_cases import varied_text
from tests.support.conversions import hashes, options_of

FILE = "kv_cache_means.safetensors"
CACHE = {"kv_cache": "dialect"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    text = varied_text(tmp_path_factory.mktemp("text") / "text.txt")
    return {"calibrate": str(text), "samples": 4, "sequence_length": 64}


def calibrated(source, destination, settings, progress=None, balance=False, **scheme):
    calibration = Calibrator(CalibrationOptions(**settings, balance=balance))
    options = options_of(**CACHE | scheme)
    return convert(source, destination, options, progress=progress, calibration=calibration)


def in_the_model(source, settings):
    """What the outputs of the projections say, with transformers' own rotary embedding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    keys, values = {}, {}
    with torch.no_grad():
        for window in read_text(source, CalibrationOptions(**settings), 320).windows:
            cache = model(window[None], use_cache=True).past_key_values
            for number, layer in enumerate(cache.layers):
                name = f"model.layers.{number}.self_attn"
                keys.setdefault(name, []).append(layer.keys[0])
                values.setdefault(name, []).append(layer.values[0])
    return {
        f"{name}.{leaf}": torch.cat(parts, dim=1).double().mean(dim=1)
        for leaf, table in (("k_mean", keys), ("v_mean", values))
        for name, parts in table.items()
    }


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM"]
)
def test_they_are_those_of_what_a_cache_holds(architecture, tiny_model, settings, tmp_path):
    """Rotary embeddings, norms of keys, biases; fused projections."""
    source = tiny_model(architecture)
    result = calibrated(source, tmp_path / "packed", settings)
    assert "means of keys and values of 2 attention modules" in render(result)
    found = load_file(tmp_path / "packed" / FILE)
    wanted = in_the_model(source, settings)
    if architecture == "OPTForCausalLM":
        wanted = {name.replace("model.", "model.decoder."): mean for name, mean in wanted.items()}
    assert found.keys() == wanted.keys()
    for name, mean in found.items():
        assert mean.dtype == torch.bfloat16
        scale = float(wanted[name].abs().max())
        assert float((mean.double() - wanted[name]).abs().max()) < 0.005 * scale, name


def test_nothing_else_changes(tiny_model, settings, tmp_path):
    """Without the option there are none, and the packed layers are the same bytes."""
    source = tiny_model(shard="200KB")
    calibrated(source, tmp_path / "with", settings)
    calibrated(source, tmp_path / "without", settings, kv_cache="none")
    convert(source, tmp_path / "nearest", options_of(**CACHE))
    assert not (tmp_path / "without" / FILE).exists()
    assert not (tmp_path / "nearest" / FILE).exists()
    first, second = hashes(tmp_path / "with"), hashes(tmp_path / "without")
    shards = [name for name in second if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert {name: first[name] for name in shards} == {name: second[name] for name in shards}
    index = json.loads((tmp_path / "with" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["model.layers.1.self_attn.v_mean"] == FILE
    again = calibrated(source, tmp_path / "with", settings)
    assert again.finished_before


def test_blocks_without_packed_layers_have_means_too(tiny_model, settings, tmp_path):
    calibrated(tiny_model(), tmp_path / "packed", settings, ignore=["re:.*layers.1.*"])
    assert len(load_file(tmp_path / "packed" / FILE)) == 4


class KilledError(Exception):
    pass


class KilledAtTheSecondBlock(Silent):
    def __init__(self):
        self.steps = 9

    def advance(self, nbytes):
        self.steps -= self.here == "calibrating"
        if not self.steps:
            raise KilledError

    def begin(self, what, tensors, nbytes):
        self.here = what


@pytest.mark.parametrize("balance", [False, True])
def test_a_killed_run_continues_with_the_same_bytes(tiny_model, settings, tmp_path, balance):
    source = tiny_model(num_key_value_heads=2)
    calibrated(source, tmp_path / "whole", settings, balance=balance)
    with pytest.raises(KilledError):
        calibrated(source, tmp_path / "packed", settings, KilledAtTheSecondBlock(), balance)
    # as if it had been killed between the layers of the second block and their means
    files = sorted((tmp_path / "packed").glob(".blockdialect-block-00001-*"))
    assert len(files) == 2
    files[1].unlink()
    calibrated(source, tmp_path / "packed", settings, balance=balance)
    assert hashes(tmp_path / "packed") == hashes(tmp_path / "whole")


def test_balanced_channels_are_those_of_the_means(tiny_model, settings, tmp_path):
    """Balancing multiplies channels of values by powers of two where heads are not shared."""
    source = tiny_model(num_key_value_heads=2)
    for balance in (False, True):
        calibrated(source, tmp_path / str(balance), settings, balance=balance)
    plain, balanced = (load_file(tmp_path / name / FILE) for name in ("False", "True"))
    name = "model.layers.0.self_attn.v_mean"
    ratio = balanced[name].double() / plain[name].double()
    assert bool((torch.log2(ratio) == torch.log2(ratio).round()).all())
    assert bool((ratio != 1).any())


def test_a_cache_that_cannot_hold_them_has_none(tiny_model, settings, tmp_path):
    source = tiny_model(head_dim=48)
    result = calibrated(source, tmp_path / "packed", settings)
    assert not (tmp_path / "packed" / FILE).exists()
    assert "they have no means" in render(result)


def test_they_are_shown_checked_and_not_exported(tiny_model, settings, tmp_path):
    packed = tmp_path / "packed"
    run = CliRunner(env={"COLUMNS": "160"}).invoke
    small = ["--calibrate", settings["calibrate"], "--samples", "4", "--sequence-length", "64"]
    source = str(tiny_model())
    chosen = ["--kv-cache", "dialect", "--rotation", "none"]
    done = run(app, ["quantize", source, str(packed), *small, *chosen])
    assert done.exit_code == 0, done.output
    assert open_packed(packed).scheme.kv_cache == "dialect"
    shown = run(app, ["inspect", str(packed)])
    assert "KV cache in 4 bits, means of 2 attention modules" in shown.stdout
    done = run(app, ["export", str(packed), str(tmp_path / "fp8")])
    assert done.exit_code == 0, done.output
    assert [file.name for file in (tmp_path / "fp8").glob("*.safetensors")] == ["model.safetensors"]
    assert not any("_mean" in name for name in load_file(tmp_path / "fp8" / "model.safetensors"))

    means = load_file(packed / FILE)
    for broken, sentence in (
        ({name: mean.float() for name, mean in means.items()}, r"is torch.float32 \[1, 64\]; it"),
        ({name: mean / 0 for name, mean in means.items()}, "must be finite"),
        ({name: mean for name, mean in means.items() if "k_m" in name}, "has not one mean for"),
    ):
        save_file(broken, packed / FILE, {"format": "pt"})
        with pytest.raises(CheckpointError, match=sentence):
            inspect_checkpoint(packed, Silent())


def test_transformers_loads_the_rest_without_a_word(tiny_model, settings, tmp_path, caplog):
    source = tiny_model(shard="200KB")
    calibrated(source, tmp_path / "packed", settings, rotation="none")
    _, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, output_loading_info=True
    )
    assert not told["unexpected_keys"]
