"""Errors of outputs and estimated losses, against the whole model in transformers."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dialect_kernels.baselines import quantize_mxfp4
from dialect_kernels.calibrated import quantize_calibrated, quantize_calibrated_baseline
from dialect_kernels.formatbook import DIALECT_FP4, SEMANTIC_32
from dialect_kernels.reference import round_activation
from dialect_kernels.rotation import rotate_activation, rotate_weight
from dialect_plugin.analysis.output_error import measure_outputs
from dialect_plugin.analysis.output_formats import dialect_formats, output_formats
from dialect_plugin.analysis.precision import plan_precision
from dialect_plugin.calibration.options import CalibrationOptions
from dialect_plugin.calibration.text import read_text
from dialect_plugin.checkpoint.layer_choice import choose_layers
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import CheckpointError, open_checkpoint
from tests.support.calibration_cases import varied_text
from tests.support.conversions import options_of
from tests.support.output_losses import lost_outputs

BOOKS = {"none": DIALECT_FP4, "hadamard_32": SEMANTIC_32}
DOWN, QUERY = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return varied_text(tmp_path_factory.mktemp("text") / "text.txt")


def options(text, **given):
    settings = {"samples": 8, "sequence_length": 64} | given
    return CalibrationOptions(calibrate=str(text), **settings)


def measured(source, text, rotation, max_rows=None, peers=False, **given):
    checkpoint = open_checkpoint(source)
    book = BOOKS[rotation]
    forms = choose_layers(checkpoint, options_of(book=book.name, rotation=rotation)).formats
    formats = output_formats(book, peers=peers)
    found = measure_outputs(checkpoint, forms, formats, options(text, **given), Silent(), max_rows)
    return {layer.name: layer for layer in found}


def test_one_pass_measures_other_books_and_rotations(tiny_model, text):
    """The figures are those of a run whose layers have that book and rotation."""
    source = tiny_model()
    checkpoint = open_checkpoint(source)
    book, other = BOOKS["hadamard_32"], BOOKS["none"]
    settings = options_of(book=book.name, rotation="hadamard_32")
    forms = choose_layers(checkpoint, settings).formats
    formats = (*output_formats(book), *dialect_formats(other, "none", ", other"))
    found = measure_outputs(checkpoint, forms, formats, options(text), Silent())
    own, alone = measured(source, text, "hadamard_32"), measured(source, text, "none")
    for layer in found:
        for size in (16, 32, 64):
            name = f"BlockDialect-{size}"
            losses = layer.losses[name], layer.losses[f"{name}, other"]
            assert losses == (own[layer.name].losses[name], alone[layer.name].losses[name])
            assert losses[0] != losses[1]
        assert layer.signal == own[layer.name].signal


class Whole:
    """The whole model on every fourth window, and the inputs of layers on the others."""

    def __init__(self, source, text, layers):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        self.windows = read_text(source, options(text), 320).windows
        self.measured = [0, 4]
        self.calls = {name: [] for name in layers}
        for name in layers:
            self.model.get_submodule(name).register_forward_hook(self._keep(name))
        with torch.no_grad():
            for index in range(8):
                if index not in self.measured:
                    self.model(self.windows[index][None])
        self.calibrating = {n: torch.cat([x for x, _ in c]) for n, c in self.calls.items()}
        for calls in self.calls.values():
            calls.clear()
        draw = torch.Generator().manual_seed(0)
        for index in self.measured:
            logits = self.model(self.windows[index][None]).logits[0]
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=draw)
            logits.log_softmax(-1).gather(1, drawn).sum().backward()

    def _keep(self, name):
        def keep(module, given, output):
            if output.requires_grad:
                output.retain_grad()
            self.calls[name].append((given[0][0].detach(), output))

        return keep

    def tokens(self, name):
        """Inputs and gradients at the outputs of the measured windows, float64."""
        inputs = torch.cat([x for x, _ in self.calls[name]]).double()
        return inputs, torch.cat([y.grad[0] for _, y in self.calls[name]]).double()

    def moments(self, name, rotation):
        x = rotate_activation(self.calibrating[name], rotation)
        return (x.T @ x / len(x)).contiguous()


@pytest.mark.parametrize("rotation", ["none", "hadamard_32"])
def test_errors_and_losses_are_those_of_the_whole_model(tiny_model, text, rotation):
    source, book = tiny_model(), BOOKS[rotation]
    whole = Whole(source, text, [DOWN, QUERY])
    found = measured(source, text, rotation)
    assert len(found) == 14
    weights = load_file(source / "model.safetensors")
    for name in (DOWN, QUERY):
        weight = weights[f"{name}.weight"]
        x, gradient = whole.tokens(name)
        x = rotate_activation(x.float(), rotation)
        exact = rotate_weight(weight, rotation).double()
        y = x.double() @ exact.T
        layer = found[name]
        assert layer.signal == pytest.approx(float(y.square().sum()) / len(x), rel=1e-4)
        for block_size in (16, 64):
            packed = quantize_calibrated(
                weight, whole.moments(name, rotation), book, block_size, rotation=rotation
            ).packed
            loss = layer.losses[f"BlockDialect-{block_size}"]
            assert loss.bits_per_weight == packed.bits_per_element
            for activations in ("none", "fp8", "dialect"):
                noise, nats = lost_outputs(exact, packed, x, gradient, activations)
                # a few codes at a midpoint differ, because the sums of the moments do
                assert loss.noise[activations] == pytest.approx(noise / len(x), rel=0.02)
                assert loss.nats[activations] == pytest.approx(nats / len(x), rel=0.02)
            assert loss.nats["none"] < loss.nats["fp8"] < loss.nats["dialect"]


def test_other_formats_get_the_same_care(tiny_model, text):
    source = tiny_model()
    whole = Whole(source, text, [QUERY])
    loss = measured(source, text, "hadamard_32", peers=True)[QUERY].losses["MXFP4-32"]
    weight = load_file(source / "model.safetensors")[f"{QUERY}.weight"]
    moments = whole.moments(QUERY, "hadamard_32")
    values = quantize_calibrated_baseline(weight, moments, "mxfp4", rotation="hadamard_32").values
    x = rotate_activation(whole.tokens(QUERY)[0].float())
    y = x @ rotate_weight(weight).T
    noise = (quantize_mxfp4(x) @ values.T - y).square().sum() / len(x)
    assert loss.noise["dialect"] == pytest.approx(float(noise), rel=0.02)
    assert loss.bits_per_weight == 4.25


def test_the_losses_of_all_layers_estimate_that_of_the_model(tiny_model, text):
    """The sum is the model's KL divergence but for what a second order and independence leave out.

    Every layer is rounded to nearest, so that the weights' errors are those of many tokens.
    """
    source = tiny_model()
    found = measured(source, text, "none")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    whole = Whole(source, text, list(found))
    windows = whole.windows[whole.measured]
    with torch.no_grad():
        before = model(windows).logits.log_softmax(-1)
        for name in found:
            module = model.get_submodule(name)
            packed = quantize_calibrated(module.weight, whole.moments(name, "none"), DIALECT_FP4)
            module.weight.copy_(packed.packed.dequantize())
            module.register_forward_pre_hook(lambda module, given: round_activation(given[0]))
        after = model(windows).logits.log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    estimate = sum(layer.losses["BlockDialect-32"].nats["dialect"] for layer in found.values())
    assert estimate == pytest.approx(divergence, rel=0.3)


def test_sampled_rows_stand_for_all(tiny_model, text):
    whole, sampled = (measured(tiny_model(), text, "hadamard_32", rows) for rows in (None, 64))
    assert sampled[DOWN].measured_rows == 64
    assert whole[DOWN].measured_rows == whole[DOWN].rows == 128
    for name in (DOWN, QUERY):
        for activations in ("none", "dialect"):
            one, other = (f[name].losses["BlockDialect-32"] for f in (whole, sampled))
            assert other.noise[activations] == pytest.approx(one.noise[activations], rel=0.3)
            assert other.nats[activations] == pytest.approx(one.nats[activations], rel=0.5)


def test_a_single_window_calibrates_and_is_measured(tiny_model, text):
    found = measured(tiny_model(), text, "hadamard_32", samples=1)
    assert all(layer.losses["BlockDialect-32"].nats["none"] > 0 for layer in found.values())


@pytest.mark.parametrize("architecture", ["Gemma3ForCausalLM", "OPTForCausalLM"])
def test_other_architectures(architecture, tiny_model, text):
    """Tied embeddings and blocks that are called in another way."""
    for layer in measured(tiny_model(architecture), text, "none").values():
        nats = layer.losses["BlockDialect-32"].nats
        assert 0 < nats["none"] < nats["dialect"], layer.name


def test_a_layer_that_neither_rotation_nor_large_blocks_divide(tiny_model, text):
    found = measured(tiny_model(intermediate_size=272), text, "hadamard_32", peers=True)
    assert set(found[DOWN].losses) == {"BlockDialect-16", "NVFP4-16"}
    assert set(found[QUERY].losses) > {"BlockDialect-64", "MXFP4-32"}
    plan = plan_precision(list(found.values()), 4.5, 0.2)
    assert plan.block_sizes[DOWN] == 16
    assert DOWN not in plan.uniform.overrides()


def test_layers_outside_of_the_blocks_are_refused(tiny_model, text):
    checkpoint = open_checkpoint(tiny_model())
    forms = choose_layers(checkpoint, options_of(lm_head=True)).formats
    with pytest.raises(CheckpointError, match="lm_head: lies outside of the repeated blocks"):
        measure_outputs(checkpoint, forms, output_formats(DIALECT_FP4), options(text), Silent())
