"""Weights of a pipeline's transformers that are calibrated on its own generations."""

import functools
import json

import pytest
import torch
from diffusers import WanPipeline
from torch import nn

import diffusers_hook
from dialect_kernels import quantize
from dialect_kernels.calibrated import quantize_calibrated
from dialect_kernels.formatbook import SEMANTIC_32
from dialect_kernels.ops import dequantize
from dialect_kernels.rotation import rotate_activation
from diffusers_hook import Calibration, ConfigError
from diffusers_hook.layers.dialect import DialectLinear
from tests.video.support.tiny_encoders import encoder
from tests.video.support.tiny_pipelines import latte
from tests.video.support.tiny_video import generate, run, wan, wan_pipeline

CALL = {
    "height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2,
    "max_sequence_length": 16, "guidance_scale": 3.0,
}  # fmt: skip
PROMPTS = ("a red fox", "a blue ball in snow")
CALIBRATION = Calibration(PROMPTS, seeds=(0, 1), call=CALL)


def layers_of(model):
    return {n: part for n, part in model.named_modules() if isinstance(part, DialectLinear)}


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def inputs_by_hand(pipe):
    """Every input of every linear layer, in the calls that a calibration makes."""
    found = {}

    def keep(name):
        return lambda module, args: found.setdefault(name, []).append(args[0].flatten(0, -2))

    handles = [
        part.register_forward_pre_hook(keep(name))
        for name, part in pipe.transformer.named_modules()
        if isinstance(part, nn.Linear)
    ]
    for prompt in PROMPTS:
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            pipe(prompt, generator=generator, output_type="latent", **CALL)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.fixture(scope="module")
def inputs():
    return inputs_by_hand(wan_pipeline())


@pytest.mark.parametrize("rotation", ["none", "hadamard_32"])
def test_weights_are_those_of_rule_gptq_on_all_inputs(inputs, rotation):
    """Against moments of all inputs together, added up in float64."""
    pipe, plain = wan_pipeline(), wan()
    pipe.enable_semantic_dialect(calibrate=CALIBRATION, rotation=rotation, progress=False)
    for name, layer in layers_of(pipe.transformer).items():
        x, weight = inputs[name], plain.get_submodule(name).weight.detach()
        A = (x.double().T @ x.double() / len(x)).float()
        A = rotate_activation(rotate_activation(A, rotation).T.contiguous(), rotation)
        wanted = quantize_calibrated(weight, A, SEMANTIC_32, 32, rotation=rotation).packed
        nearest = quantize(weight, SEMANTIC_32, 32, "mse", rotation=rotation)
        assert layer.packed.rotation == rotation
        # moments that were added up in another order may move a number to its neighbour
        assert (layer.weight_packed != wanted.codes).float().mean() < 0.02, name
        assert (layer.weight_packed != nearest.codes).float().mean() > 0.02, name
        exact = x @ weight.T
        lost = (x @ layer.decode(torch.float32).T - exact).norm()
        rounded = rotate_activation(dequantize(nearest, torch.float32), rotation)
        assert lost < (x @ rounded.T - exact).norm(), name


def test_memory_that_is_too_little_for_all_layers_changes_no_bit(monkeypatch):
    whole, parts = wan_pipeline(), wan_pipeline()
    whole.enable_semantic_dialect(calibrate=CALIBRATION, progress=False)
    calls, call = [], WanPipeline.__call__

    @functools.wraps(call)
    def counted(*args, **options):
        calls.append(1)
        return call(*args, **options)

    monkeypatch.setattr(WanPipeline, "__call__", counted)
    little = Calibration(PROMPTS, seeds=(0, 1), call=CALL, memory=5 * 64 * 64 * 4)
    parts.enable_semantic_dialect(calibrate=little, progress=False)
    # two blocks: five inputs of 64 columns and one of 32, and one of 128
    assert len(calls) > 2 * 4
    assert_same(tensors(whole.transformer), tensors(parts.transformer))


def test_recorded_moments_serve_other_options(tmp_path):
    pipe = wan_pipeline()
    before = tensors(pipe.transformer)
    diffusers_hook.record(pipe, tmp_path / "moments", CALIBRATION)
    assert_same(tensors(pipe.transformer), before)
    shared = json.loads((tmp_path / "moments" / "moments.json").read_text())["inputs"]
    q = next(entry for entry in shared if "transformer.blocks.0.attn1.to_q" in entry["layers"])
    assert len(q["layers"]) == 3
    for options in ({}, {"rotation": "hadamard_32", "block_size": 16}):
        live, recorded = wan_pipeline(), wan_pipeline()
        live.enable_semantic_dialect(calibrate=CALIBRATION, progress=False, **options)
        recorded.enable_semantic_dialect(calibrate=tmp_path / "moments", progress=False, **options)
        assert_same(tensors(live.transformer), tensors(recorded.transformer))
    with pytest.raises(ConfigError, match="is not empty; give another one"):
        diffusers_hook.record(pipe, tmp_path / "moments", CALIBRATION)


def test_a_calibrated_pipeline_is_saved_and_restored_like_another(tmp_path):
    pipe = wan_pipeline()
    before = generate(pipe)
    pipe.enable_semantic_dialect(calibrate=CALIBRATION, progress=False)
    video = generate(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded), video)
    with pytest.raises(ConfigError, match="calibrate: transformer is in 4 bit already; load the"):
        loaded.enable_semantic_dialect(calibrate=CALIBRATION)
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), before)


def test_both_transformers_and_no_encoder_are_calibrated():
    pipe, plain = wan_pipeline(two=True), encoder("UMT5")
    pipe.text_encoder = encoder("UMT5")
    parts = ("transformer", "transformer_2", "text_encoder")
    pipe.enable_semantic_dialect(components=parts, calibrate=CALIBRATION, progress=False)
    diffusers_hook.enable(plain, progress=False)
    assert_same(tensors(plain), tensors(pipe.text_encoder))
    # both had the same weights, and each its own steps
    first, second = layers_of(pipe.transformer), layers_of(pipe.transformer_2)
    assert any(not torch.equal(first[n].weight_packed, second[n].weight_packed) for n in first)


def test_a_pipeline_without_prompts_is_run_by_a_function():
    pipe, latents = latte()
    nearest, _ = latte()
    pipe.enable_semantic_dialect(calibrate=lambda: latents(), progress=False)
    nearest.enable_semantic_dialect(progress=False)
    found, plain = layers_of(pipe.transformer), layers_of(nearest.transformer)
    changed = [n for n in found if not torch.equal(found[n].weight_packed, plain[n].weight_packed)]
    assert len(changed) == len(found)
    assert latents().isfinite().all()


def test_layers_that_see_too_little_are_rounded_to_nearest(caplog):
    model, nearest = wan(), wan()
    calls = iter([1])

    def once():
        for _ in calls:
            run(model, frames=1, size=2)  # one token

    diffusers_hook.enable(model, calibrate=once, progress=False)
    diffusers_hook.enable(nearest, progress=False)
    assert_same(tensors(model), tensors(nearest))
    assert "calibrate: 20 of 20 layers saw too few tokens and are rounded to nearest" in caplog.text


@pytest.mark.parametrize(
    ("calibrate", "sentence"),
    [
        ([], r"calibrate: \[\] cannot be used: it must be a list of prompts"),
        ([1], r"calibrate: \[1\] cannot be used"),
        (7, "calibrate: 7 cannot be used"),
        ("a red fox", "calibrate: 'a red fox' is not a folder of recorded second moments"),
    ],
)
def test_what_cannot_calibrate_is_refused(calibrate, sentence):
    pipe = wan_pipeline()
    with pytest.raises(ConfigError, match=sentence):
        pipe.enable_semantic_dialect(calibrate=calibrate, progress=False)
    assert not layers_of(pipe.transformer)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seeds": ()}, r"seeds: \(\) cannot be used: it must be whole numbers"),
        ({"damping": 0.0}, "damping: 0.0; it must be above 0 and at most 1"),
        ({"memory": 0}, "memory: 0; it must be a number of bytes from 1 on"),
    ],
)
def test_values_of_a_calibration_are_checked(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Calibration(PROMPTS, **options)


def test_models_that_take_no_prompts_are_refused():
    with pytest.raises(ConfigError, match="WanTransformer3DModel takes no prompt and generator; g"):
        diffusers_hook.enable(wan(), calibrate=PROMPTS, progress=False)


def test_inputs_that_are_not_finite_are_named():
    pipe = wan_pipeline()
    pipe.transformer.condition_embedder.text_embedder.linear_2.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"transformer\.blocks\..*: its input holds NaN or Inf"):
        pipe.enable_semantic_dialect(calibrate=CALIBRATION, progress=False)
    assert not layers_of(pipe.transformer)
    assert not any(part._forward_pre_hooks for part in pipe.transformer.modules())


@pytest.mark.parametrize("damage", ["list", "version", "file", "columns", "other"])
def test_damaged_records_are_refused(damage, tmp_path):
    diffusers_hook.record(wan_pipeline(), tmp_path, Calibration(PROMPTS[:1], call=CALL))
    path = tmp_path / "moments.json"
    found = json.loads(path.read_text())
    if damage == "list":
        path.unlink()
    elif damage == "version":
        path.write_text(json.dumps({**found, "format_version": 2}))
    elif damage == "file":
        file = tmp_path / found["inputs"][3]["file"]
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "columns":
        found["inputs"][0]["columns"] = 32
        path.write_text(json.dumps(found))
    else:
        found["inputs"] = [{**entry, "layers": ["unet.q"]} for entry in found["inputs"]]
        path.write_text(json.dumps(found))
    pipe = wan_pipeline()
    with pytest.raises(ConfigError, match="calibrate: "):
        pipe.enable_semantic_dialect(calibrate=tmp_path, progress=False)
    assert not layers_of(pipe.transformer)


def test_a_report_measures_and_changes_nothing(inputs, tmp_path):
    pipe = wan_pipeline()
    before = tensors(pipe.transformer)
    losses = diffusers_hook.report(pipe, CALIBRATION, tokens=10**6)
    assert_same(tensors(pipe.transformer), before)
    assert not any(part._forward_pre_hooks for part in pipe.transformer.modules())
    found = losses.to_dict()
    assert len(found) == 20
    for name, layer in found.items():
        x = inputs[name.removeprefix("transformer.")]
        weight = pipe.transformer.get_submodule(name.removeprefix("transformer.")).weight.detach()
        exact = (x @ weight.T).double()
        rounded = dequantize(quantize(weight, SEMANTIC_32, 32, "mse"), torch.float32)
        wanted = (((x @ rounded.T).double() - exact).norm() / exact.norm()) ** 2
        assert layer["tokens"] == len(x)
        assert layer["loss"]["none"] == pytest.approx(float(wanted), rel=0.02), name
        assert layer["loss"]["dialect"] > layer["loss"]["none"]
        assert layer["loss"]["dialect"] > layer["loss"]["fp8"]
    table = str(losses)
    assert "W4A16" in table
    assert "transformer.blocks.1.ffn.net.2" in table
    losses.save(tmp_path / "losses.json")
    assert json.loads((tmp_path / "losses.json").read_text()) == found


def test_a_report_can_measure_calibrated_weights():
    pipe = wan_pipeline()
    run = CALIBRATION
    plain = diffusers_hook.report(pipe, run, formats=["none"]).to_dict()
    calibrated = diffusers_hook.report(pipe, run, formats=["none"], calibrate=run).to_dict()
    for name in plain:
        assert calibrated[name]["loss"]["none"] < plain[name]["loss"]["none"], name
    with pytest.raises(ConfigError, match=r"formats: \['int4'\] cannot be used"):
        diffusers_hook.report(pipe, run, formats=["int4"])
    pipe.enable_semantic_dialect(progress=False)
    with pytest.raises(RuntimeError, match="transformer: is in 4 bit already; measure it before"):
        diffusers_hook.report(pipe, run)
