"""Calibrated conversions: their bytes, killed ones, and what is refused."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dialect_kernels import quantize
from dialect_kernels.calibrated import quantize_calibrated
from dialect_kernels.rotation import rotate_activation
from dialect_plugin.calibration.calibrator import Calibrator
from dialect_plugin.calibration.options import CalibrationOptions
from dialect_plugin.calibration.text import read_text
from dialect_plugin.checkpoint.convert import convert, render
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import CheckpointError, open_checkpoint, open_packed
from tests.support.calibration_cases import varied_text
from tests.support.conversions import edit_config, hashes, options_of

RECORD = "blockdialect_calibration.json"
ROTATED = {"book": "semantic_32", "rotation": "hadamard_32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return varied_text(tmp_path_factory.mktemp("text") / "text.txt")


def calibrator(text, **options):
    settings = {"samples": 8, "sequence_length": 64} | options
    return Calibrator(CalibrationOptions(calibrate=str(text), **settings))


def calibrated(source, destination, text, scheme=None, progress=None, overwrite=False, **options):
    return convert(
        source,
        destination,
        options_of(**(ROTATED if scheme is None else scheme)),
        calibration=calibrator(text, **options),
        progress=progress,
        overwrite=overwrite,
    )


def inputs_of(source, text, layers):
    """The inputs of layers in the whole model, float32 [tokens, K]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found = {layer: [] for layer in layers}
    for layer in layers:
        model.get_submodule(layer).register_forward_pre_hook(
            lambda module, given, layer=layer: found[layer].append(given[0][0])
        )
    settings = CalibrationOptions(calibrate=str(text), samples=8, sequence_length=64)
    with torch.no_grad():
        for window in read_text(source, settings, 320).windows:
            model(window[None])
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@pytest.mark.parametrize("rotation", ["none", "hadamard_32"])
def test_the_bytes_are_those_of_the_rule(tiny_model, text, tmp_path, rotation):
    source = tiny_model()
    scheme = {"book": "semantic_32", "rotation": rotation}
    result = calibrated(source, tmp_path / "packed", text, scheme)
    packed = open_packed(tmp_path / "packed")
    weights = load_file(source / "model.safetensors")
    assert len(packed) == 14
    unlike = 0
    for layer, x in inputs_of(source, text, packed.layers).items():
        x = rotate_activation(x, rotation)
        a = (x.T @ x / len(x)).contiguous()
        found, weight = packed[layer], weights[f"{layer}.weight"]
        expected = quantize_calibrated(weight, a, found.book, 32, rotation=rotation).packed
        nearest = quantize(weight, found.book, 32, rotation=rotation)
        assert torch.equal(found.row_exponent, expected.row_exponent)
        # the sums of the moments differ in their last bits: a few elements at a midpoint may too
        assert float((found.codes != expected.codes).float().mean()) < 0.01
        assert float((found.codes != nearest.codes).float().mean()) > 0.1
        unlike += not torch.equal(found.codes, expected.codes)
    assert unlike < 7
    assert "calibrated on 8 windows of 64 tokens" in render(result)


def test_layers_with_one_input_share_their_moments(tiny_model, text, tmp_path):
    blocks = []
    run = calibrator(text)
    forward = run._forward

    def noting(*given):
        inputs, rescaled = forward(*given)
        blocks.append(list(inputs))
        return inputs, rescaled

    run._forward = noting
    convert(tiny_model(), tmp_path / "packed", options_of(**ROTATED), calibration=run)
    for number, inputs in enumerate(blocks):
        front = f"model.layers.{number}."
        groups = [[name.removeprefix(front).split(".")[1] for name in i.layers] for i in inputs]
        assert groups == [
            ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]
        ]  # fmt: skip
        assert {i.tokens for i in inputs} == {8 * 64}
    assert len(blocks) == 2


def test_the_same_bytes_again_and_other_bytes_for_other_text(tiny_model, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    for name, given in (("first", text), ("second", text), ("other", other)):
        calibrated(tiny_model(shard="200KB"), tmp_path / name, given)
    first, second, third = (hashes(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert any(first[name] != third[name] for name in first if name.endswith(".safetensors"))


class KilledError(Exception):
    pass


class KilledAfter(Silent):
    """Ends the run in a pass, after some tensors."""

    def __init__(self, what, steps):
        self.what, self.steps, self.here = what, steps, ""

    def begin(self, what, tensors, nbytes):
        self.here = what

    def advance(self, nbytes):
        if self.here == self.what:
            self.steps -= 1
            if not self.steps:
                raise KilledError


@pytest.mark.parametrize(
    ("what", "steps"),
    [("calibrating", 1), ("calibrating", 8), ("quantizing", 1), ("quantizing", 9)],
)
def test_a_killed_run_continues_with_the_same_bytes(tiny_model, text, tmp_path, what, steps):
    source = tiny_model(shard="200KB")
    calibrated(source, tmp_path / "whole", text)
    with pytest.raises(KilledError):
        calibrated(source, tmp_path / "packed", text, progress=KilledAfter(what, steps))
    assert not (tmp_path / "packed" / "config.json").exists()
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        open_packed(tmp_path / "packed")
    calls = []

    class Counting(Calibrator):
        def _quantized(self, *given):
            calls.append(1)
            return super()._quantized(*given)

    again = Counting(CalibrationOptions(calibrate=str(text), samples=8, sequence_length=64))
    convert(source, tmp_path / "packed", options_of(**ROTATED), calibration=again)
    assert hashes(tmp_path / "packed") == hashes(tmp_path / "whole")
    assert len(calls) == {("calibrating", 1): 4, ("calibrating", 8): 0}.get((what, steps), 0)


def test_a_block_file_that_was_cut_off_is_made_again(tiny_model, text, tmp_path):
    calibrated(tiny_model(), tmp_path / "whole", text)
    with pytest.raises(KilledError):
        calibrated(tiny_model(), tmp_path / "packed", text, progress=KilledAfter("quantizing", 1))
    files = sorted((tmp_path / "packed").glob(".blockdialect-block-*"))
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-1])
    calibrated(tiny_model(), tmp_path / "packed", text)
    assert hashes(tmp_path / "packed") == hashes(tmp_path / "whole")


def test_another_calibration_does_not_continue_it(tiny_model, text, tmp_path):
    with pytest.raises(KilledError):
        calibrated(tiny_model(), tmp_path / "packed", text, progress=KilledAfter("calibrating", 8))
    for options in ({"samples": 7}, {"damping": 0.1}, {"sequence_length": 32}):
        with pytest.raises(CheckpointError, match="unfinished conversion of another source or"):
            calibrated(tiny_model(), tmp_path / "packed", text, **options)
    with pytest.raises(CheckpointError, match="unfinished conversion of another source or"):
        convert(tiny_model(), tmp_path / "packed", options_of(**ROTATED))
    calibrated(tiny_model(), tmp_path / "packed", text, overwrite=True, samples=7)
    calibrated(tiny_model(), tmp_path / "seven", text, samples=7)
    assert hashes(tmp_path / "packed") == hashes(tmp_path / "seven")


def test_a_finished_one_run_again_is_well(tiny_model, text, tmp_path):
    calibrated(tiny_model(), tmp_path / "packed", text)
    before = hashes(tmp_path / "packed")
    assert calibrated(tiny_model(), tmp_path / "packed", text).finished_before
    for again in (
        lambda: calibrated(tiny_model(), tmp_path / "packed", text, samples=7),
        lambda: convert(tiny_model(), tmp_path / "packed", options_of(**ROTATED)),
    ):
        with pytest.raises(CheckpointError, match="is not empty"):
            again()
    assert hashes(tmp_path / "packed") == before


def test_the_record_says_what_was_done(tiny_model, text, tmp_path):
    source = tiny_model()
    scheme = ROTATED | {"lm_head": True}
    result = calibrated(source, tmp_path / "packed", text, scheme)
    record = json.loads((tmp_path / "packed" / RECORD).read_text())
    assert {key: record[key] for key in ("rule", "samples", "sequence_length", "damping")} == {
        "rule": "gptq", "samples": 8, "sequence_length": 64, "damping": 0.01
    }  # fmt: skip
    assert record["rounded_to_nearest"] == ["lm_head"]
    packed = open_packed(tmp_path / "packed")
    weight = load_file(source / "model.safetensors")["lm_head.weight"]
    nearest = quantize(weight, packed["lm_head"].book, 32, rotation="hadamard_32")
    assert torch.equal(packed["lm_head"].codes, nearest.codes)
    assert "rounded without calibration: lm_head" in render(result)
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "calibrated on 8 windows of 64 tokens" in card
    assert not list((tmp_path / "packed").glob(".*"))


def test_layers_that_see_too_few_tokens_are_rounded_to_nearest(tiny_model, text, tmp_path):
    """63 tokens are fewer than a quarter of 256 columns, and more than one of 128."""
    source = tiny_model()
    calibrated(source, tmp_path / "packed", text, samples=1, sequence_length=63)
    record = json.loads((tmp_path / "packed" / RECORD).read_text())
    names = [f"model.layers.{number}.mlp.down_proj" for number in range(2)]
    assert record["rounded_to_nearest"] == names
    packed = open_packed(tmp_path / "packed")
    weight = load_file(source / "model.safetensors")[f"{names[0]}.weight"]
    nearest = quantize(weight, packed[names[0]].book, 32, rotation="hadamard_32")
    assert torch.equal(packed[names[0]].codes, nearest.codes)


@pytest.mark.parametrize(
    "architecture", ["Gemma3ForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM"]
)
def test_other_architectures(architecture, tiny_model, text, tmp_path):
    """A mixture of experts; fused matrices; layers with biases."""
    calibrated(tiny_model(architecture), tmp_path / "packed", text, {"book": "semantic_32"})
    record = json.loads((tmp_path / "packed" / RECORD).read_text())
    packed, checkpoint = open_packed(tmp_path / "packed"), open_checkpoint(tiny_model(architecture))
    assert record["rounded_to_nearest"] == []
    for layer in packed.layers:
        (weight,) = checkpoint.read_rows(layer, 1 << 20)
        nearest = quantize(weight, packed[layer].book, 32)
        assert float((packed[layer].codes != nearest.codes).float().mean()) > 0.05, layer


def test_overrides_and_ignored_layers(tiny_model, text, tmp_path):
    scheme = ROTATED | {
        "ignore": ["model.layers.0.mlp.down_proj"],
        "overrides": {"re:.*o_proj": {"block_size": 16, "rotation": "none"}},
    }
    calibrated(tiny_model(), tmp_path / "packed", text, scheme)
    packed = open_packed(tmp_path / "packed")
    assert "model.layers.0.mlp.down_proj" not in packed
    found = packed["model.layers.1.self_attn.o_proj"]
    assert (found.block_size, found.rotation) == (16, "none")
    assert packed["model.layers.1.mlp.up_proj"].rotation == "hadamard_32"


def refused(source, destination, text, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        calibrated(source, destination, text, **options)
    assert "\n" not in str(caught.value)


def test_bad_input_leaves_no_trace(source, text, tmp_path):
    packed = tmp_path / "packed"
    refused(source, packed, tmp_path / "absent", "absent is not a file")
    refused(source, packed, text, "--sequence-length: 300; the model takes at most 256",
            sequence_length=300)  # fmt: skip
    refused(source, packed, text, "--device: 'sofa'; this machine", device="sofa")
    if not torch.cuda.is_available():
        refused(source, packed, text, "--device: 'cuda'; this machine", device="cuda")
    edit_config(source, vocab_size=320, architectures=["NewForCausalLM"])
    refused(source, packed, text, "NewForCausalLM", scheme={"targets": ["re:.*mlp.*"]})
    assert not packed.exists()


def test_activations_that_are_not_finite_name_the_layer(source, text, tmp_path):
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"][3] = float("inf")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    match = re.escape("model.layers.1.mlp.") + ".*input holds NaN or Inf on the calibration text"
    refused(source, tmp_path / "packed", text, match)
    assert not (tmp_path / "packed" / "config.json").exists()
    weights["model.layers.1.post_attention_layernorm.weight"][3] = 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    refused(source, tmp_path / "packed", text, "unfinished conversion of another source")
