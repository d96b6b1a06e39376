"""Powers of two between channels: the same 16-bit model, and less lost by rounding it."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dialect_kernels.rotation import rotate_activation
from dialect_plugin.calibration.calibrator import Calibrator
from dialect_plugin.calibration.options import CalibrationOptions
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import open_packed
from dialect_plugin.evaluation.evaluator import evaluate
from dialect_plugin.evaluation.options import EvaluationOptions
from tests.support.conversions import hashes, options_of

SCHEME = {"book": "semantic_32", "rotation": "hadamard_32"}
TOKENS = torch.arange(3, 3 + 60).view(1, 60) * 11 % 300


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"def f{n}(x): return {n * n} - x  # {n % 7}\n" for n in range(400)))
    return file


def uneven(path):
    """Give the channels of a checkpoint very different sizes, without changing its function much.

    Every norm and every row of up is scaled, and what is behind it is scaled back.
    """
    weights = load_file(path / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name in [n for n in weights if n.endswith(("layernorm.weight", "up_proj.weight"))]:
        factor = torch.exp2(torch.randint(-4, 5, (len(weights[name]),), generator=draw).float())
        front = name.removesuffix(".weight").rpartition(".")[0].removesuffix(".mlp")
        parts = {
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
            "up_proj": ("mlp.down_proj",),
        }[name.split(".")[-2]]
        shape = (-1, 1) if weights[name].dim() == 2 else (-1,)
        weights[name] = (weights[name] * factor.view(shape)).to(weights[name].dtype)
        for part in parts:
            weight = weights[f"{front}.{part}.weight"]
            weights[f"{front}.{part}.weight"] = (weight / factor).to(weight.dtype)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def calibrated(source, destination, text, progress=None, **options):
    settings = {"samples": 8, "sequence_length": 64} | options
    calibration = Calibrator(CalibrationOptions(calibrate=str(text), **settings))
    return convert(
        source, destination, options_of(**SCHEME), calibration=calibration, progress=progress
    )


def logits(source, packed=None):
    """Of the source, or of a packed checkpoint whose layers are decoded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if packed is not None:
        checkpoint, state = open_packed(packed), model.state_dict()
        stored = load_file(packed / "model.safetensors")
        state |= {name: stored[name].float() for name in state.keys() & stored.keys()}
        for layer in checkpoint.layers:
            weight = checkpoint[layer]
            state[f"{layer}.weight"] = rotate_activation(weight.dequantize(), weight.rotation)
        model.load_state_dict(state)
    with torch.no_grad():
        return model(TOKENS).logits


def test_less_is_lost_where_channels_are_uneven(source, text, tmp_path):
    uneven(source)
    exact = logits(source)
    results = {}
    for balance in (False, True):
        packed = tmp_path / str(balance)
        result = calibrated(source, packed, text, balance=balance)
        results[balance] = float((logits(source, packed) - exact).square().mean())
        assert all(layer.noise < 0.02 * layer.signal for layer in result.layers)
    assert results[True] < 0.5 * results[False]
    before, after = (load_file(p / "model.safetensors") for p in (source, tmp_path / "True"))
    for name in (n for n in before if n in after):
        if name.endswith("layernorm.weight"):
            exponents = torch.log2(after[name].float() / before[name].float())
            assert torch.equal(exponents, exponents.round())
            assert float(exponents.std()) > 1
        else:
            assert torch.equal(before[name], after[name])
    same = load_file(tmp_path / "False" / "model.safetensors")
    assert all(torch.equal(same[name], before[name]) for name in before.keys() & same.keys())


def test_norms_that_add_one_stay(tiny_model, text, tmp_path):
    """A power of two in the weight of Gemma's norms is none in their output."""
    source = tiny_model("Gemma2ForCausalLM")
    calibrated(source, tmp_path / "packed", text, balance=True)
    before, after = (load_file(p / "model.safetensors") for p in (source, tmp_path / "packed"))
    common = before.keys() & after.keys()
    assert any("layernorm" in name for name in common)
    assert all(torch.equal(before[name], after[name]) for name in common)


class KilledError(Exception):
    pass


class KilledAfter(Silent):
    """Ends the run in a pass, after some tensors."""

    def __init__(self, what, steps):
        self.what, self.steps, self.here = what, steps, ""

    def begin(self, what, tensors, nbytes):
        self.here = what

    def advance(self, nbytes):
        self.steps -= self.here == self.what
        if not self.steps:
            raise KilledError


@pytest.mark.parametrize(("what", "steps"), [("calibrating", 8), ("quantizing", 9)])
def test_a_killed_run_continues_with_the_same_bytes(tiny_model, text, tmp_path, what, steps):
    source, packed = tiny_model(shard="200KB"), tmp_path / "packed"
    calibrated(source, tmp_path / "whole", text, balance=True)
    with pytest.raises(KilledError):
        calibrated(source, packed, text, KilledAfter(what, steps), balance=True)
    if what == "quantizing":  # a block that was cut off is made again, finished shards or not
        files = sorted(packed.glob(".blockdialect-block-*"))
        files[0].write_bytes(files[0].read_bytes()[:-1])
    calibrated(source, packed, text, balance=True)
    assert hashes(packed) == hashes(tmp_path / "whole")


def test_an_evaluation_takes_the_norms_of_the_packed_checkpoint(source, text, tmp_path):
    uneven(source)
    for balance in (False, True):
        calibrated(source, tmp_path / str(balance), text, balance=balance)
    settings = EvaluationOptions(
        text=str(text), windows=2, sequence_length=64, activations=("w4a16",)
    )
    found = evaluate([tmp_path / "False", tmp_path / "True"], source, settings)
    divergences = [sum(row.divergence) for row in found.rows]
    assert divergences[1] < divergences[0]
