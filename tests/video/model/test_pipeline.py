"""Operations over several components: they work, or are refused before the first one changes."""

import copy
import logging

import pytest
import torch
from diffusers import (
    PipelineQuantizationConfig,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig

import diffusers_hook
from diffusers_hook import ConfigError, SemanticDialectConfig
from diffusers_hook.layers.quantized import QuantizedLinear
from diffusers_hook.model import swap
from diffusers_hook.model.attach import attached
from tests.video.support.tiny_video import generate, wan, wan_pipeline

OPTIONS = {"progress": False, "seda": True}


def dtypes(pipe):
    parts = ("transformer", "text_encoder", "vae")
    return {
        f"{part}.{name}": tensor.dtype
        for part in parts
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def loaded(folder, tmp_path, dtype=None, quantized=False):
    """A pipeline from files, enabled or quantized while it loads."""
    wan_pipeline().save_pretrained(folder)
    if quantized:
        mapping = {"transformer": SemanticDialectConfig(seda=True)}
        config = PipelineQuantizationConfig(quant_mapping=mapping)
        pipe = WanPipeline.from_pretrained(folder, dtype=dtype, quantization_config=config)
    else:
        pipe = WanPipeline.from_pretrained(folder, dtype=dtype)
        pipe.enable_semantic_dialect(**OPTIONS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_lora(model):
    torch.manual_seed(7)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_pipeline_with_a_lora_is_saved_whole_and_without_it(tmp_path, quantized, caplog):
    """Its tensors would not be found again; it has a file of its own."""
    pipe = loaded(tmp_path / "plain", tmp_path, quantized=quantized)
    before = generate(pipe)
    state = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    add_lora(pipe.transformer)
    changed = generate(pipe)
    assert not torch.equal(changed, before)
    pipe.save_pretrained(tmp_path / "saved")
    assert "WanTransformer3DModel: is saved without its adapters; save them with" in caplog.text
    again = WanPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    found = again.transformer.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert torch.equal(generate(again), before)
    assert torch.equal(generate(pipe), changed)


def test_files_that_disable_reads_are_not_saved_over_nor_those_beside_them(tmp_path):
    pipe = loaded(tmp_path, tmp_path)
    for copied in (pipe, copy.copy(pipe)):  # servers copy a pipeline for each request
        for file in tmp_path.rglob("*.json"):
            file.unlink()
        with pytest.raises(RuntimeError, match="save_pretrained: the folder holds the 16-bit wei"):
            copied.save_pretrained(tmp_path)
        assert not list(tmp_path.rglob("*.json"))
    pipe.disable_semantic_dialect()
    assert type(pipe) is WanPipeline
    pipe.save_pretrained(tmp_path)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_that_a_pipeline_has_changes_nothing(tmp_path, dtype, quantized):
    pipe = loaded(tmp_path, tmp_path, dtype, quantized)
    before, held = generate(pipe), dtypes(pipe)
    assert pipe.to("cpu", dtype) is pipe
    assert dtypes(pipe) == held
    assert torch.equal(generate(pipe), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_is_that_of_a_loaded_pipeline(tmp_path, dtype):
    pipe = loaded(tmp_path, tmp_path, quantized=True)
    expected = dtypes(WanPipeline.from_pretrained(tmp_path, dtype=dtype))
    codes = {n: p.clone() for n, p in pipe.transformer.state_dict().items() if "packed" in n}
    scale = pipe.transformer.scale_shift_table.clone()
    pipe.to(dtype)
    found = {n: d for n, d in dtypes(pipe).items() if n.startswith("transformer.")}
    both = found.keys() & expected.keys()
    assert {n: found[n] for n in both} == {n: expected[n] for n in both}
    assert found["transformer.scale_shift_table"] == torch.float32
    assert torch.equal(pipe.transformer.scale_shift_table, scale)  # never was in 16 bit
    assert all(torch.equal(pipe.transformer.state_dict()[name], c) for name, c in codes.items())
    layer = next(m for m in pipe.transformer.modules() if isinstance(m, QuantizedLinear))
    assert layer.weight.dtype == dtype
    if dtype == torch.bfloat16:  # the VAE has no 16-bit float convolutions on CPUs
        assert generate(pipe).isfinite().all()


def test_a_dtype_without_quantized_layers_is_refused_first():
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(**OPTIONS)
    held = dtypes(pipe)
    for call in (lambda: pipe.to(torch.float64), lambda: pipe.to("cpu", dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"to: torch\.float64 cannot be used: a quantized mod"):
            call()
        assert dtypes(pipe) == held
    with pytest.raises(ValueError, match="computes in float32, bfloat16 or float16"):
        pipe.transformer.to(torch.float64)


@pytest.mark.parametrize("quantized", [False, True])
def test_from_pipe_shares_a_quantized_transformer(tmp_path, quantized):
    pipe = loaded(tmp_path, tmp_path, torch.bfloat16, quantized)
    before = generate(pipe)
    other = WanVideoToVideoPipeline.from_pipe(pipe, dtype=torch.bfloat16)
    assert type(other) is WanVideoToVideoPipeline
    assert other.transformer is pipe.transformer
    assert torch.equal(generate(pipe), before)
    again = WanPipeline.from_pipe(other, dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate(again), before)
    WanPipeline.from_pipe(pipe)  # its default is float32
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float32


@pytest.mark.parametrize("method", ["fuse_lora", "unfuse_lora"])
def test_a_lora_is_fused_into_no_component_if_one_is_enabled(method):
    pipe = wan_pipeline(two=True)
    for part in (pipe.transformer, pipe.transformer_2):
        add_lora(part)
    both = ["transformer", "transformer_2"]
    if method == "unfuse_lora":
        pipe.fuse_lora(components=both)
    diffusers_hook.enable(pipe.transformer_2, progress=False)
    pipe.enable_semantic_dialect = None  # the first one is in 16 bit
    merged = [p.merged for p in pipe.transformer.modules() if hasattr(p, "base_layer")]
    from diffusers_hook.model.pipeline import check_components

    check_components(pipe)
    with pytest.raises(RuntimeError, match=f"{method}: a LoRA cannot be put into or taken out of"):
        getattr(pipe, method)(components=both)
    assert merged == [p.merged for p in pipe.transformer.modules() if hasattr(p, "base_layer")]


@pytest.mark.parametrize("last", ["patch", "hook"])
@pytest.mark.parametrize("first", ["patch", "hook"])
def test_the_class_of_a_pipeline_is_patched_as_without_the_hook(first, last):
    """cache-dit replaces `__call__` in the class of the pipeline that it is given."""
    pipe, original = wan_pipeline(), WanPipeline.__call__

    def patch():
        pipe.__class__.__call__ = lambda self: "patched"
        pipe.__class__.mine = original

    def unpatch():
        pipe.__class__.__call__ = pipe.__class__.mine
        del pipe.__class__.mine

    on = [patch, lambda: pipe.enable_semantic_dialect(progress=False)]
    off = [unpatch, pipe.disable_semantic_dialect]
    for step in on if first == "patch" else reversed(on):
        step()
    assert pipe() == "patched"
    for step in off if last == "hook" else reversed(off):
        step()
    assert type(pipe) is WanPipeline
    assert WanPipeline.__call__ is original
    assert not hasattr(WanPipeline, "mine")


def half_loaded(tmp_path):
    """A pipeline of two transformers of which the second was loaded quantized."""
    model = wan()
    diffusers_hook.enable(model, progress=False)
    model.save_pretrained(tmp_path)
    pipe = wan_pipeline(two=True)
    pipe.transformer_2 = WanTransformer3DModel.from_pretrained(tmp_path)
    return pipe


def test_options_of_one_transformer_change_with_the_other_one_or_not_at_all(tmp_path, monkeypatch):
    pipe = half_loaded(tmp_path)
    before, config = generate(pipe), attached(pipe.transformer_2).config

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(swap, "mark", stop)
        with pytest.raises(KeyboardInterrupt):
            pipe.enable_semantic_dialect(progress=False, salient_fraction=0.5)
    assert attached(pipe.transformer) is None
    assert attached(pipe.transformer_2).config == config
    assert torch.equal(generate(pipe), before)
    with pytest.raises(ConfigError, match="block_size: 16 needs other weights than those loaded"):
        pipe.enable_semantic_dialect(progress=False, block_size=16)
    assert attached(pipe.transformer) is None
    assert torch.equal(generate(pipe), before)


def test_a_second_transformer_that_cannot_be_disabled_keeps_the_first_quantized(tmp_path):
    pipe = half_loaded(tmp_path)
    pipe.enable_semantic_dialect(progress=False)
    before = generate(pipe)
    with pytest.raises(RuntimeError, match="was loaded quantized; load the 16-bit checkpoint"):
        pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), before)


def test_a_wrong_key_of_a_mapping_is_told_once(tmp_path, monkeypatch):
    """By diffusers itself, which knows the pipeline's components."""
    wan_pipeline().save_pretrained(tmp_path)
    mapping = {"transfomer": SemanticDialectConfig()}
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("diffusers.pipelines.pipeline_loading_utils")
    monkeypatch.setattr(logger, "disabled", False)
    logger.addHandler(handler)
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_warning()  # whatever other tests have set
    try:
        pipe = WanPipeline.from_pretrained(tmp_path, quantization_config=config)
    finally:
        diffusers_logging.set_verbosity(level)
        logger.removeHandler(handler)
    [message] = [message for message in told if "transfomer" in message]
    assert "will be ignored as they do not belong to the underlying pipeline" in message
    assert attached(pipe.transformer) is None
