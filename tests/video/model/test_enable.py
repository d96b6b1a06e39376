"""Enabling quantizes and hooks; disabling gives back exactly what was there."""

import copy
import gc
import io
import logging
import os
import weakref
from contextlib import contextmanager

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from safetensors.torch import load_file, save_file
from torch import nn

import dialect_kernels
import diffusers_hook
from diffusers_hook import ConfigError, LayoutError, SemanticDialectConfig
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.layers.fp8 import Fp8Linear
from diffusers_hook.model import attach, swap
from diffusers_hook.model.attach import attached
from tests.video.support.tiny_video import generate, run, wan, wan_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


def picture(module):
    """Everything a user could see of a module tree: types, attributes, tensors, hooks."""
    tree = {}
    for name, part in module.named_modules():
        attributes = {k: v for k, v in vars(part).items() if not k.startswith("_")}
        tree[name] = (type(part), sorted(attributes), len(part._forward_hooks))
    processors = {
        n: type(m.processor) for n, m in module.named_modules() if hasattr(m, "processor")
    }
    return tree, processors, dict(getattr(module, "config", {}))


def same_tensors(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_disable_restores_every_bit(dtype):
    model = wan().to(dtype)
    output, shape = run(model, dtype=dtype), picture(model)
    state = copy.deepcopy(model.state_dict())
    diffusers_hook.enable(model, progress=False, seda=True)
    quantized = run(model, dtype=dtype)
    assert quantized.isfinite().all()
    assert not torch.equal(quantized, output)
    diffusers_hook.disable(model)
    assert picture(model) == shape
    assert same_tensors(state, model.state_dict())
    assert torch.equal(run(model, dtype=dtype), output)


@pytest.mark.parametrize("two", [False, True])
def test_a_pipeline_and_back(two):
    pipe = wan_pipeline(two)
    before = generate(pipe)
    assert pipe.enable_semantic_dialect(progress=False, seda=True) is pipe
    first, second = generate(pipe), generate(pipe)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert not torch.equal(first, before)
    summary = pipe.semantic_dialect_summary()
    assert [found.name for found in summary.transformers] == (
        ["transformer", "transformer_2"] if two else ["transformer"]
    )
    assert "bits per weight" in str(summary) == repr(summary)
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), before)


def test_weights_are_those_of_the_exact_error_rule():
    model = wan()
    expected = dialect_kernels.quantize(
        model.blocks[1].ffn.net[2].weight.detach(), dialect_kernels.SEMANTIC_32, 32, "mse"
    )
    diffusers_hook.enable(model, progress=False, seda=True)
    layer = model.blocks[1].ffn.net[2]
    assert torch.equal(layer.weight_packed, expected.codes)
    assert torch.equal(layer.weight_meta, expected.meta)
    assert torch.equal(layer.weight_row_exponent, expected.row_exponent)


def test_only_the_linear_layers_of_blocks_are_quantized():
    model = wan()
    diffusers_hook.enable(model, progress=False, seda=True, modulation="16bit")
    quantized = {n for n, m in model.named_modules() if isinstance(m, DialectLinear)}
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    inside = {f"{name}.{part}" for name in ("attn1", "attn2") for part in attention}
    inside |= {"ffn.net.0.proj", "ffn.net.2"}
    assert quantized == {f"blocks.{i}.{name}" for i in range(2) for name in inside}
    assert not any(isinstance(m, Fp8Linear) for m in model.modules())


def test_ignored_layers_are_named_from_the_models_root():
    model = wan()
    with pytest.raises(ConfigError) as caught:
        diffusers_hook.enable(model, progress=False, ignore=["to_q"])
    assert str(caught.value) == (
        "ignore: 'to_q' matches no layer of WanTransformer3DModel that would be quantized; near "
        "it are blocks.0.attn1.to_q, blocks.0.attn1.to_v, blocks.0.attn1.to_k; give an exact name "
        "from the model's root or 're:' and a regular expression"
    )
    ignored = [r"re:blocks\.0\.", r"re:.*\.ffn\.", "blocks.1.attn2.to_q"]
    diffusers_hook.enable(model, progress=False, seda=True, ignore=ignored)
    quantized = {n for n, m in model.named_modules() if isinstance(m, DialectLinear)}
    assert "blocks.1.attn1.to_q" in quantized
    assert "blocks.1.attn2.to_q" not in quantized
    assert not any(name.startswith("blocks.0") or "ffn" in name for name in quantized)


def test_modulation_in_fp8_is_within_e4m3s_error():
    model = wan()
    exact = model.condition_embedder.time_proj.weight.detach().clone()
    diffusers_hook.enable(model, progress=False, seda=True)  # more than 5 % of this tiny model
    layer = model.condition_embedder.time_proj
    assert isinstance(layer, Fp8Linear)
    limit = exact.abs() * 2**-4 + exact.abs().amax(dim=1, keepdim=True) / 448 * 2**-9
    assert ((layer.weight - exact).abs() <= limit).all()


def test_enabling_twice_raises_and_disabling_when_off_warns(caplog):
    model = wan()
    with caplog.at_level(logging.WARNING):
        diffusers_hook.disable(model)
    assert "nothing to disable" in caplog.text
    diffusers_hook.enable(model, progress=False, seda=True)
    with pytest.raises(RuntimeError, match="is enabled already"):
        diffusers_hook.enable(model, progress=False, seda=True)
    diffusers_hook.disable(model)
    with pytest.raises(RuntimeError, match="is not enabled"):
        diffusers_hook.summary(model)


def spoilt_nan(model):
    model.blocks[1].ffn.net[2].weight.data[3, 5] = torch.nan


def spoilt_dtype(model):
    model.blocks[1].ffn.net[2].double()


def spoilt_processor(model):
    class Mine:
        def __call__(self, attn, hidden_states, *rest):
            return hidden_states

    model.blocks[1].attn1.processor = Mine()


def spoilt_source(model):
    """As if its class had been typed in."""

    class Typed:
        def __call__(self, attn, hidden_states, *rest):
            return hidden_states

    Typed.__call__.__code__ = Typed.__call__.__code__.replace(co_filename="<stdin>")
    model.blocks[1].attn1.processor = Typed()


def spoilt_meta(model):
    model.blocks[1].ffn.net[2].to("meta")


def spoilt_layer(model):
    model.blocks[1].ffn.net[2].__class__ = type("OtherLinear", (nn.Linear,), {})


@pytest.mark.parametrize(
    ("spoil", "options", "error", "sentence"),
    [
        (spoilt_nan, {}, ValueError, "Model.blocks.1.ffn.net.2.weight: nan at [3, 5]"),
        (spoilt_dtype, {}, ValueError, "ffn.net.2.weight: has dtype torch.float64; allowed are"),
        (spoilt_processor, {}, LayoutError, "calls neither dispatch_attention_fn nor"),
        (spoilt_processor, {}, LayoutError, "WanTransformer3DModel.blocks.1.attn1: spoilt_proc"),
        (spoilt_processor, {}, LayoutError, "; pass salient_fraction=0 and seda=False, or set "),
        (spoilt_source, {}, LayoutError, "Typed.__call__: has no source file, which is read to "),
        (spoilt_source, {}, LayoutError, "WanTransformer3DModel.blocks.1.attn1: spoilt_source"),
        (spoilt_meta, {}, ValueError, "enable SemanticDialect before offloading"),
        (spoilt_layer, {}, ValueError, "is a OtherLinear, not a plain linear layer"),
        (None, {"ignore": ["re:"]}, ValueError, "no linear layer is left to quantize"),
        (None, {"keep_original": "disk"}, ConfigError, "needs the files the weights were loaded"),
        (None, {"layout": "wann"}, LayoutError, "layout: 'wann' is not known; known are "),
        (None, {"layout": 3}, LayoutError, "layout: 3 cannot be used: it must be a "),
        (None, {"config": 3}, ConfigError, "config: 3 cannot be used: it must be a "),
        (None, {"salient": 1}, ConfigError, "did you mean 'salient_fraction'"),
        (None, {"ignore": ["proj_out"]}, ConfigError, "ignore: 'proj_out' matches no layer of "),
    ],
)  # fmt: skip
def test_what_cannot_be_enabled_is_refused_and_left_as_it_was(spoil, options, error, sentence):
    model = wan()
    if spoil is not None:
        spoil(model)
    shape, parameters = picture(model), {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(error) as caught:
        diffusers_hook.enable(model, progress=False, seda=True, **options)
    assert sentence in str(caught.value)
    assert picture(model) == shape
    assert {n: id(p) for n, p in model.named_parameters()} == parameters


def test_layers_that_the_block_size_does_not_divide_stay_in_16_bit(tmp_path, caplog):
    """Saved and loaded, and quantized while it loads, it is the same model."""
    model = wan(num_attention_heads=3)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"the columns of 18 of 20 layers \(blocks\.0\."):
        diffusers_hook.enable(model, progress=False, block_size=64, strict=True)
    diffusers_hook.enable(model, progress=False, block_size=64)
    assert caplog.messages[0] == (
        "WanTransformer3DModel: block_size 64 does not divide the columns of 18 of 20 layers "
        "(blocks.0.attn1.to_q: 96, ...), which stay in 16 bit; a smaller block_size may divide them"
    )
    quantized = {n for n, m in model.named_modules() if isinstance(m, DialectLinear)}
    assert quantized == {"blocks.0.ffn.net.2", "blocks.1.ffn.net.2"}
    expected = run(model)
    model.save_pretrained(tmp_path / "packed")
    config = SemanticDialectConfig(block_size=64)
    for loaded in (
        WanTransformer3DModel.from_pretrained(tmp_path / "packed"),
        WanTransformer3DModel.from_pretrained(tmp_path / "plain", quantization_config=config),
    ):
        assert torch.equal(run(loaded), expected)
    with pytest.raises(ValueError, match=r"of 20 of 20 layers .*; choose a smaller block_size"):
        diffusers_hook.enable(wan(num_attention_heads=3, ffn_dim=96), block_size=64)


def test_a_second_transformer_that_cannot_be_enabled_leaves_the_first_alone():
    pipe = wan_pipeline(two=True)
    spoilt_nan(pipe.transformer_2)
    shape = picture(pipe.transformer)
    with pytest.raises(ValueError, match=r"transformer_2\.blocks\.1\.ffn"):
        pipe.enable_semantic_dialect(progress=False, seda=True)
    assert picture(pipe.transformer) == shape


def test_a_layout_fits_subclasses_too():
    class Mine(WanTransformer3DModel):
        pass

    pipe = wan_pipeline()
    pipe.transformer.__class__ = Mine
    pipe.enable_semantic_dialect(progress=False, layout="wan")
    assert attached(pipe.transformer).layout.name == "wan"
    assert generate(pipe).isfinite().all()


def test_a_pipeline_without_a_video_transformer_is_refused():
    class Other:
        components = {"unet": nn.Linear(4, 4)}  # noqa: RUF012

    with pytest.raises(LayoutError, match=r"no video transformer with a known layout \(unet: Lin"):
        diffusers_hook.enable(Other())
    with pytest.raises(LayoutError, match="the layout of Linear is not known; pass one as layout="):
        diffusers_hook.enable(nn.Linear(4, 4))


@pytest.mark.parametrize("place", ["disk", "host", None])
def test_where_the_original_weights_wait(tmp_path, place):
    wan().save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path)
    before = run(model)
    diffusers_hook.enable(model, progress=False, seda=True, keep_original=place)
    found = diffusers_hook.summary(model).transformers[0]
    assert found.originals == (place or "disk")
    assert (found.host_bytes > 0) == (place == "host")
    diffusers_hook.disable(model)
    assert torch.equal(run(model), before)


def test_files_with_other_weights_are_not_the_originals(tmp_path):
    wan().save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path)
    model.blocks[0].attn1.to_q.weight.data[0, 0] += 1  # as a fused LoRA does
    before = run(model)
    diffusers_hook.enable(model, progress=False, seda=True)
    assert diffusers_hook.summary(model).transformers[0].originals == "host"
    diffusers_hook.disable(model)
    assert torch.equal(run(model), before)


def test_disable_without_originals_says_what_to_do_and_changes_nothing(tmp_path):
    model = wan()
    diffusers_hook.enable(model, progress=False, seda=True, keep_original="none")
    quantized = run(model)
    with pytest.raises(RuntimeError, match="load the pipeline again with from_pretrained"):
        diffusers_hook.disable(model)
    assert torch.equal(run(model), quantized)


def remove(file):
    file.unlink()


def damage(file):
    file.unlink()  # the model may have it mapped into memory
    file.write_bytes(b"\x10\0\0\0\0\0\0\0garbage")


def change(file):
    """One number, in a file of the same size and with the same time of change."""
    stat, tensors = file.stat(), {k: v.clone() for k, v in load_file(file).items()}
    tensors["blocks.1.ffn.net.2.weight"][3, 5] += 1
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (remove, r"cannot be read from .* any more"),
        (damage, r"cannot be read from .* any more"),
        (change, r"blocks\.1\.ffn\.net\.2\.weight in .* is not the weight it was; load the pipe"),
    ],
)
def test_disable_after_the_files_have_changed_changes_nothing(tmp_path, spoil, sentence):
    wan().save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path)
    diffusers_hook.enable(model, progress=False, seda=True)
    quantized, shape = run(model), picture(model)
    spoil(tmp_path / WEIGHTS)
    with pytest.raises(RuntimeError, match=sentence):
        diffusers_hook.disable(model)
    assert picture(model) == shape
    assert torch.equal(run(model), quantized)


def test_a_damaged_file_beside_a_model_in_memory_is_not_its_origin(tmp_path):
    wan().save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path)
    damage(tmp_path / WEIGHTS)
    diffusers_hook.enable(model, progress=False)
    assert diffusers_hook.summary(model).transformers[0].originals == "host"


def test_the_files_that_disable_reads_are_not_saved_over(tmp_path):
    from diffusers import WanPipeline

    wan_pipeline().save_pretrained(tmp_path)
    pipe = WanPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    before = generate(pipe)
    pipe.enable_semantic_dialect(progress=False)
    assert pipe.semantic_dialect_summary().transformers[0].originals == "disk"
    link = tmp_path / "link"
    link.mkdir()
    (link / WEIGHTS).symlink_to(tmp_path / "transformer" / WEIGHTS)
    for folder in (tmp_path / "transformer", link):
        with pytest.raises(RuntimeError, match="save into another one, or enable with keep_origi"):
            pipe.transformer.save_pretrained(folder)
    with pytest.raises(RuntimeError, match="holds the 16-bit weights that disable_semantic_dial"):
        pipe.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path / "elsewhere", max_shard_size="100KB")
    assert len(list((tmp_path / "elsewhere" / "transformer").glob("*.safetensors"))) > 1
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), before)
    pipe.save_pretrained(tmp_path)


def test_weights_come_back_to_the_device_and_in_the_dtype_of_now():
    model = wan()
    diffusers_hook.enable(model, progress=False)
    nn.Module.to(model, "meta", torch.bfloat16)  # all of it: model.to keeps parts in float32
    diffusers_hook.disable(model)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: torch.save(model, io.BytesIO())])
def test_an_enabled_model_is_not_copied(copied):
    """A copy would share the original's state, and neither could be disabled alone."""
    model = wan(layers=1)
    diffusers_hook.enable(model, progress=False)
    with pytest.raises(RuntimeError, match="cannot be copied or pickled while SemanticDialect is"):
        copied(model)
    diffusers_hook.disable(model)
    copied(model)


@contextmanager
def interrupted(where, call, module=swap):
    """Ctrl-C in a certain call of a function."""
    function, calls = getattr(module, where), []

    def stop(*args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, where, stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize(
    ("where", "call"),
    [("put", 1), ("put", 30), ("keep", 2), ("attach", 1), ("attach", 2), ("mark", 1), ("mark", 2)],
)
@pytest.mark.parametrize("place", ["host", "none"])
def test_an_interrupted_enable_leaves_everything_as_it_was(where, call, place):
    pipe = wan_pipeline(two=True)
    parts = (pipe.transformer, pipe.transformer_2)
    before, shapes = generate(pipe), [picture(part) for part in parts]
    weights = [{n: p.data_ptr() for n, p in part.named_parameters()} for part in parts]
    with interrupted(where, call):
        pipe.enable_semantic_dialect(progress=False, keep_original=place)
    assert [picture(part) for part in parts] == shapes
    assert [{n: p.data_ptr() for n, p in part.named_parameters()} for part in parts] == weights
    assert torch.equal(generate(pipe), before)
    pipe.enable_semantic_dialect(progress=False)
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), before)


def test_an_enable_that_is_interrupted_while_it_hooks_the_attention_leaves_no_hook():
    model = wan()
    before, shape = run(model, context="cond"), picture(model)
    with interrupted("guard", 1, attach):
        diffusers_hook.enable(model, progress=False)
    assert picture(model) == shape
    assert "forward" not in vars(model)
    assert torch.equal(run(model, context="cond"), before)


@pytest.mark.parametrize(("where", "call"), [("put", 5), ("put", 30), ("unmark", 2), ("detach", 1)])
def test_an_interrupted_disable_can_be_called_again(where, call):
    pipe = wan_pipeline(two=True)
    before = generate(pipe)
    pipe.enable_semantic_dialect(progress=False)
    quantized = generate(pipe)
    with interrupted(where, call):
        pipe.disable_semantic_dialect()
    if where == "put":
        assert torch.equal(generate(pipe), quantized)
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), before)
    assert attached(pipe.transformer) is attached(pipe.transformer_2) is None


def test_no_refusal_is_left_behind():
    model = wan()
    methods = {name: getattr(model, name) for name in ("fuse_lora", "save_pretrained")}
    diffusers_hook.enable(model, progress=False)
    diffusers_hook.disable(model)
    assert {name: getattr(model, name) for name in methods} == methods


def test_one_transformer_under_two_names_is_one():
    pipe = wan_pipeline(two=True)
    pipe.transformer_2 = pipe.transformer
    before = generate(pipe)
    pipe.enable_semantic_dialect(progress=False)
    assert [found.name for found in pipe.semantic_dialect_summary().transformers] == ["transformer"]
    assert generate(pipe).isfinite().all()
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), before)


def count_tensors():
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def test_enabling_and_disabling_a_hundred_times_leaks_nothing():
    from diffusers_hook.tokens import block_state

    model = wan(layers=1)
    before = run(model)
    diffusers_hook.enable(model, progress=False, seda=True)
    diffusers_hook.disable(model)
    gc.collect()
    states = len(block_state._states)
    tensors = count_tensors()
    for _ in range(100):
        diffusers_hook.enable(model, progress=False, seda=True)
        diffusers_hook.disable(model)
    gc.collect()
    assert len(block_state._states) == states
    assert count_tensors() <= tensors
    assert torch.equal(run(model), before)


def test_an_enabled_model_can_be_freed():
    model = wan(layers=1)
    diffusers_hook.enable(model, progress=False, seda=True)
    run(model, context="cond")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_config_object_and_options_together():
    model = wan(layers=1)
    config = SemanticDialectConfig(block_size=16, seda=True, selection="bottom")
    diffusers_hook.enable(model, config, progress=False, salient_fraction=0.5, selection="random")
    layer = model.blocks[0].attn1.to_q
    assert layer.block_size == 16
    run(model)
    found = diffusers_hook.summary(model).transformers[0]
    assert found.groups > 0
    assert 0.3 < found.salient_share < 0.5
    assert attached(model).config.selection == "random"


def test_the_summary_shows_what_is_on(caplog):
    model = wan()
    whole = sum(parameter.numel() for parameter in model.parameters())
    diffusers_hook.enable(model, progress=False, salient_fraction=0)
    shown = str(diffusers_hook.summary(model))
    for word in ("decomposed", "salient", "group", "blocks that are read"):
        assert word not in shown
    [found] = diffusers_hook.summary(model).transformers
    layers = [m for m in model.modules() if isinstance(m, DialectLinear)]
    assert found.share == sum(m.in_features * m.out_features for m in layers) / whole
    assert f"{found.share:.1%}" in shown
    diffusers_hook.disable(model)
    diffusers_hook.enable(model, progress=False)
    shown = str(diffusers_hook.summary(model))
    assert "salient-token refreshes" in shown
    assert "group" not in shown
    assert not caplog.records


def test_a_model_that_is_little_in_4_bit_is_named(caplog):
    model = wan()
    names = [f"re:blocks.{number}\\." for number in range(1)]
    diffusers_hook.enable(model, progress=False, ignore=names)
    [found] = diffusers_hook.summary(model).transformers
    assert caplog.messages == [
        f"WanTransformer3DModel: {100 * found.share:.0f} % of the parameters are in 4 bit, the "
        "others in 16 bit or FP8"
    ]


def test_a_processor_that_is_set_later_is_told_once(caplog):
    model = wan()
    diffusers_hook.enable(model, progress=False, seda=True)
    run(model)
    assert not caplog.messages
    model.blocks[1].attn1.processor = WanAttnProcessor()
    for _ in range(2):
        run(model)
    [told] = caplog.messages
    assert "so that 1 of 2 blocks are read" in told
    assert "1 of 2" in str(diffusers_hook.summary(model))
