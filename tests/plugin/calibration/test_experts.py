"""Calibrated experts: their bytes from the model's own routing, rare ones, memory, killed runs."""

import json
from collections import defaultdict

import pytest
import torch
import transformers

from dialect_kernels import quantize
from dialect_kernels.calibrated import quantize_calibrated
from dialect_kernels.rotation import rotate_activation
from dialect_plugin.calibration import calibrator as calibrator_module
from dialect_plugin.calibration.calibrator import Calibrator
from dialect_plugin.calibration.experts import expert_inputs, in_groups
from dialect_plugin.calibration.options import CalibrationOptions
from dialect_plugin.calibration.text import read_text
from dialect_plugin.checkpoint.convert import convert, render
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import open_checkpoint, open_packed
from dialect_plugin.experts import expert_of
from dialect_plugin.scheme import LayerFormat
from tests.support.calibration_cases import varied_text
from tests.support.conversions import hashes, options_of
from tests.support.mixtures import MIXTURES, biases_of, maker, silu, weight_of

RECORD = "blockdialect_calibration.json"
ROTATED = {"book": "semantic_32", "rotation": "hadamard_32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return varied_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Architecture, and how its config differs -> a tiny checkpoint; each is made once."""
    return maker(tmp_path_factory.mktemp("models"))


def options(text, **differing):
    settings = {"samples": 8, "sequence_length": 64} | differing
    return CalibrationOptions(calibrate=str(text), **settings)


def calibrated(source, destination, text, scheme=ROTATED, progress=None, **differing):
    run = Calibrator(options(text, **differing))
    return convert(source, destination, options_of(**scheme), calibration=run, progress=progress)


SPARSE = {"num_experts": 16, "num_hidden_layers": 1}


def routed_tokens(source, text, **differing):
    """Experts' module -> what it is called with, over the whole text: tokens, and their experts."""
    architecture = open_checkpoint(source).architecture
    model = getattr(transformers, architecture).from_pretrained(source, dtype=torch.float32)
    calls = defaultdict(list)
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda module, given, named, name=name: calls[name].append(
                    (*given, *named.values())[:2]
                ),
                with_kwargs=True,
            )
    with torch.no_grad():
        for window in read_text(source, options(text, **differing), 320).windows:
            model(window[None])
    return {name: tuple(map(torch.cat, zip(*parts, strict=True))) for name, parts in calls.items()}


def inputs_of(checkpoint, between, prefix, number, x):
    """Matrix of an expert -> its input, from the expert's tokens."""
    gate, up = biases_of(checkpoint, prefix, number)
    layer = f"{prefix}.{number}"
    given = [x @ weight_of(checkpoint, f"{layer}.up_proj").T + up]
    found = {f"{layer}.up_proj": x}
    if f"{layer}.gate_proj" in checkpoint.weights:
        given.insert(0, x @ weight_of(checkpoint, f"{layer}.gate_proj").T + gate)
        found[f"{layer}.gate_proj"] = x
    return found | {f"{layer}.down_proj": between(*given)}


def assert_calibrated(packed, weight, x, rotation):
    """Whether a weight has the bytes of the rule, but for elements at a midpoint."""
    x = rotate_activation(x, rotation)
    a = (x.T @ x / len(x)).contiguous()
    expected = quantize_calibrated(weight, a, packed.book, 32, rotation=rotation).packed
    nearest = quantize(weight, packed.book, 32, rotation=rotation)
    assert torch.equal(packed.row_exponent, expected.row_exponent)
    # the sums of the moments differ in their last bits
    assert float((packed.codes != expected.codes).float().mean()) < 0.01
    assert float((packed.codes != nearest.codes).float().mean()) > 0.1


def tokens_of_experts(source, text, **differing):
    """Experts' module in the checkpoint -> number of the expert -> its tokens."""
    found = {}
    routed = routed_tokens(source, text, **differing)
    prefixes = {e.prefix for layer in open_checkpoint(source).weights if (e := expert_of(layer))}
    for prefix, (x, chosen) in zip(sorted(prefixes), routed.values(), strict=True):
        x = x.reshape(-1, x.shape[-1])
        found[prefix] = [x[(chosen == e).any(-1)] for e in range(int(chosen.max()) + 1)]
    return found


@pytest.mark.parametrize("architecture", sorted(MIXTURES))
def test_the_bytes_are_those_of_the_rule(architecture, model_of, text, tmp_path):
    between, differing = MIXTURES[architecture]
    source = model_of(architecture, **differing)
    rotation = "none" if architecture == "MixtralForCausalLM" else "hadamard_32"
    calibrated(source, tmp_path / "packed", text, ROTATED | {"rotation": rotation}, samples=20)
    packed, checkpoint = open_packed(tmp_path / "packed"), open_checkpoint(source)
    compared = 0
    for prefix, experts in tokens_of_experts(source, text, samples=20).items():
        for number, x in enumerate(experts):
            inputs = inputs_of(checkpoint, between, prefix, number, x)
            for layer, tokens in inputs.items():
                assert 4 * len(tokens) >= tokens.shape[1]
                assert_calibrated(packed[layer], weight_of(checkpoint, layer), tokens, rotation)
                compared += 1
    assert compared == sum(".experts." in layer for layer in packed.layers)
    assert json.loads((tmp_path / "packed" / RECORD).read_text())["rounded_to_nearest"] == []


def test_rare_experts_are_rounded_to_nearest_and_listed(model_of, text, tmp_path):
    """Gate and up have twice as many columns as down, and need twice as many tokens."""
    source, few = model_of("Qwen3MoeForCausalLM", **SPARSE), {"samples": 2}
    result = calibrated(source, tmp_path / "packed", text, **few)
    packed, checkpoint = open_packed(tmp_path / "packed"), open_checkpoint(source)
    ((prefix, experts),) = tokens_of_experts(source, text, **few).items()
    rare, common = set(), set()
    for number, x in enumerate(experts):
        for layer, tokens in inputs_of(checkpoint, silu, prefix, number, x).items():
            weight = weight_of(checkpoint, layer)
            if 4 * len(tokens) >= tokens.shape[1]:
                common.add(layer)
                assert_calibrated(packed[layer], weight, tokens, "hadamard_32")
            else:
                rare.add(layer)
                nearest = quantize(weight, packed[layer].book, 32, rotation="hadamard_32")
                assert torch.equal(packed[layer].codes, nearest.codes)
    rare |= {n for n in packed.layers if ".experts." in n and n not in common}  # no token at all
    record = json.loads((tmp_path / "packed" / RECORD).read_text())
    assert record["experts"] is True
    assert set(record["rounded_to_nearest"]) == rare
    parts = {expert_of(layer).part for layer in common ^ rare}
    assert parts == {"gate_proj", "up_proj", "down_proj"}
    assert any(expert_of(n)._replace(part="gate_proj") in map(expert_of, rare) for n in common)
    line = f"{len(rare)} of 48 matrices of experts saw too few tokens and were rounded without"
    assert line in render(result)
    assert line in (tmp_path / "packed" / "README.md").read_text()


def test_experts_that_transformers_does_not_show(model_of, text, tmp_path):
    source = model_of("Llama4ForCausalLM")
    result = calibrated(source, tmp_path / "packed", text)
    packed, checkpoint = open_packed(tmp_path / "packed"), open_checkpoint(source)
    experts = [layer for layer in packed.layers if ".experts." in layer]
    record = json.loads((tmp_path / "packed" / RECORD).read_text())
    assert "experts" not in record
    assert set(record["rounded_to_nearest"]) == set(experts) != set(packed.layers)
    assert "transformers does not show what each expert of this model sees" in render(result)
    nearest = quantize(
        weight_of(checkpoint, experts[0]), packed[experts[0]].book, 32, rotation="hadamard_32"
    )
    assert torch.equal(packed[experts[0]].codes, nearest.codes)


def test_balancing_leaves_experts_alone(model_of, text, tmp_path):
    """A shared expert has the norm in front of the routed ones, and they would see a change."""
    source = model_of("Qwen2MoeForCausalLM")
    calibrated(source, tmp_path / "plain", text)
    calibrated(source, tmp_path / "balanced", text, balance=True)
    plain, balanced = (open_packed(tmp_path / name) for name in ("plain", "balanced"))
    unlike = {n for n in plain.layers if not torch.equal(plain[n].codes, balanced[n].codes)}
    assert unlike
    assert not any(".experts." in layer for layer in unlike)


class KilledError(Exception):
    pass


def in_small_parts(monkeypatch, limit):
    """Files of one input, and moments of few inputs in memory together."""
    monkeypatch.setattr(calibrator_module, "_FILE_BYTES", 1)
    monkeypatch.setattr(calibrator_module, "numbers_together", lambda device: 1)
    monkeypatch.setattr(
        calibrator_module, "in_groups", lambda inputs, _: in_groups(inputs, limit(inputs))
    )


def test_groups_of_experts_and_a_killed_run_give_the_same_bytes(
    model_of, text, tmp_path, monkeypatch
):
    source = model_of("Qwen3MoeForCausalLM")
    calibrated(source, tmp_path / "whole", text)
    in_small_parts(monkeypatch, lambda inputs: 3 * max(entry.nbytes for entry in inputs))
    calibrated(source, tmp_path / "parts", text)
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")

    class Killed(Calibrator):
        left = 5

        def _quantized(self, inputs, modules):
            if not Killed.left:
                raise KilledError
            Killed.left -= 1
            return super()._quantized(inputs, modules)

    with pytest.raises(KilledError):
        convert(
            source,
            tmp_path / "killed",
            options_of(**ROTATED),
            calibration=Killed(options(text)),
            progress=Silent(),
        )
    assert len(list((tmp_path / "killed").glob(".blockdialect-block-00000-*"))) == 5
    again = []

    class Counting(Calibrator):
        def _quantized(self, inputs, modules):
            again.extend(layer for shared in inputs for layer in shared.layers)
            return super()._quantized(inputs, modules)

    run = Counting(options(text))
    convert(source, tmp_path / "killed", options_of(**ROTATED), calibration=run)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert 0 < len(set(open_packed(tmp_path / "whole").layers) - set(again)) < 12


def test_groups_keep_the_limit_or_hold_one():
    form = LayerFormat("semantic_32", 32, "dialect", "none")
    forms = {
        f"mlp.experts.{e}.{part}": form
        for e in range(5)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    inputs = expert_inputs(forms, lambda name: 64 if "down" in name else 128)
    assert [len(entry.layers) for entry in inputs] == 5 * [2, 1]
    sizes = {entry.columns: entry.nbytes for entry in inputs}
    assert sizes[128] == 4 * 128 * 128 * 9 // 8
    pair = sizes[128] + sizes[64]
    assert [len(group) for group in in_groups(inputs, 2 * pair)] == [4, 4, 2]
    assert [len(group) for group in in_groups(inputs, 2 * pair - 1)] == [3, 3, 3, 1]
    assert [len(group) for group in in_groups(inputs, -5)] == 10 * [1]
    assert in_groups([], 100) == []
