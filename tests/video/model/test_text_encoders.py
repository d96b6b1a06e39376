"""Text and image encoders of a pipeline, quantized with its transformers or alone."""

import json

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PipelineQuantizationConfig,
    WanPipeline,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

import diffusers_hook
from dialect_kernels import quantize
from dialect_kernels.formatbook import SEMANTIC_32
from dialect_kernels.ops import dequantize
from diffusers_hook import ConfigError, SemanticDialectConfig
from diffusers_hook.layers.dialect import DialectLinear
from tests.video.support.image_cases import flux
from tests.video.support.tiny_encoders import LINEAR_LAYERS, WORDS, encoded, encoder
from tests.video.support.tiny_video import generate, wan_pipeline

BOTH = ("transformer", "text_encoder")
CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


def enabled(name="UMT5", **options):
    model = encoder(name)
    diffusers_hook.enable(model, progress=False, **options)
    return model


def layers_of(model):
    return {n: part for n, part in model.named_modules() if isinstance(part, DialectLinear)}


def pipeline():
    """A Wan pipeline whose text encoder's columns 32 divides."""
    pipe = wan_pipeline()
    pipe.text_encoder = encoder("UMT5")
    return pipe


def decoded(weight):
    """What rounding to nearest makes of a weight."""
    return dequantize(quantize(weight, SEMANTIC_32, 32, "mse"), torch.float32)


@pytest.mark.parametrize("name", LINEAR_LAYERS)
def test_an_encoder_computes_with_its_rounded_weights(name):
    model, plain = encoder(name), encoder(name)
    before = encoded(plain)
    diffusers_hook.enable(model, progress=False)
    layers = layers_of(model)
    assert len(layers) == LINEAR_LAYERS[name]
    for path in layers:
        layer = plain.get_submodule(path)
        assert type(layer) is nn.Linear
        layer.weight.data = decoded(layer.weight.data)
    wanted = encoded(plain)
    assert (wanted - before).norm() > 0.02 * before.norm()
    error = (encoded(model) - wanted).norm() / wanted.norm()
    assert error < 0.004, error  # of products in bfloat16, which the mode `default` may use
    diffusers_hook.disable(model)
    assert torch.equal(encoded(model), before)
    assert {type(part) for part in model.modules()} == {type(p) for p in encoder(name).modules()}


@pytest.mark.parametrize("name", LINEAR_LAYERS)
def test_an_encoder_comes_back_from_its_files(name, tmp_path):
    model = encoder(name)
    model.save_pretrained(tmp_path / "plain")
    diffusers_hook.enable(model, progress=False)
    wanted = encoded(model)
    model.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / WEIGHTS)
    assert sum(key.endswith(".weight_packed") for key in stored) == LINEAR_LAYERS[name]
    loaded = type(model).from_pretrained(tmp_path / "packed")
    assert torch.equal(encoded(loaded), wanted)
    assert diffusers_hook.summary(loaded).transformers[0].originals == "none"
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == stored.keys()
    assert [key for key in stored if not torch.equal(again[key], stored[key])] == []
    online = type(model).from_pretrained(
        tmp_path / "plain", quantization_config=SemanticDialectConfig()
    )
    assert torch.equal(encoded(online), wanted)
    diffusers_hook.disable(model)
    model.save_pretrained(tmp_path / "restored")
    assert "quantization_config" not in json.loads(
        (tmp_path / "restored" / "config.json").read_text()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_encoder_is_loaded_in_another_dtype(dtype, tmp_path):
    enabled().save_pretrained(tmp_path)
    loaded = UMT5EncoderModel.from_pretrained(tmp_path, dtype=dtype)
    output = encoded(loaded)
    assert output.dtype == dtype
    assert output.isfinite().all()
    wo = loaded.encoder.block[0].layer[1].DenseReluDense.wo.weight
    # in float16 the class wants it so
    assert wo.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    codes = load_file(tmp_path / WEIGHTS)
    for path, layer in layers_of(loaded).items():
        assert torch.equal(layer.weight_packed, codes[f"{path}.weight_packed"])
    assert loaded.to(torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match=r"to: torch\.float64 cannot be used"):
        loaded.to(torch.float64)


def test_a_pipeline_keeps_its_text_encoder_unless_it_is_named():
    pipe = pipeline()
    pipe.enable_semantic_dialect(progress=False)
    assert not layers_of(pipe.text_encoder)
    pipe.disable_semantic_dialect()
    before = generate(pipe)
    pipe.enable_semantic_dialect(components=BOTH, progress=False)
    changed = generate(pipe)
    assert changed.isfinite().all()
    assert not torch.equal(changed, before)
    summary = pipe.semantic_dialect_summary()
    found = summary.to_dict()
    assert found.keys() == set(BOTH)
    assert (found["text_encoder"]["layers"], found["text_encoder"]["calls"]) == (12, 2)
    assert found["text_encoder"]["salient_share"] == 0
    assert "UMT5EncoderModel" in str(summary)
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), before)


def test_the_text_encoder_alone_is_quantized_where_it_alone_is_named():
    pipe = pipeline()
    pipe.enable_semantic_dialect(components=["text_encoder"], progress=False)
    assert len(layers_of(pipe.text_encoder)) == 12
    assert not layers_of(pipe.transformer)


def test_a_pipeline_with_its_text_encoder_is_saved_and_loaded(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "plain")
    pipe.enable_semantic_dialect(components=BOTH, progress=False, seda=True)
    video = generate(pipe)
    pipe.save_pretrained(tmp_path / "packed")
    packed = WanPipeline.from_pretrained(tmp_path / "packed")
    packed.set_progress_bar_config(disable=True)
    assert torch.equal(generate(packed), video)
    mapping = {
        "transformer": SemanticDialectConfig(seda=True),
        "text_encoder": SemanticDialectConfig(),
    }
    online = WanPipeline.from_pretrained(
        tmp_path / "plain", quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )
    online.set_progress_bar_config(disable=True)
    assert torch.equal(generate(online), video)


def test_files_that_disable_reads_are_not_saved_over(tmp_path):
    encoder("UMT5").save_pretrained(tmp_path)
    model = UMT5EncoderModel.from_pretrained(tmp_path)
    before = encoded(model)
    diffusers_hook.enable(model, progress=False)
    assert diffusers_hook.summary(model).transformers[0].originals == "disk"
    with pytest.raises(RuntimeError, match="save_pretrained: the folder holds the 16-bit weights"):
        model.save_pretrained(tmp_path)
    diffusers_hook.disable(model)
    assert torch.equal(encoded(model), before)
    model.save_pretrained(tmp_path / "elsewhere")


def test_options_of_one_component():
    pipe = pipeline()
    own = {"activation_format": "fp8", "block_size": 16, "ignore": []}
    pipe.enable_semantic_dialect(
        components={"transformer": {"salient_fraction": 0.5}, "text_encoder": own},
        rotation="hadamard_32",
        progress=False,
    )
    layers = layers_of(pipe.text_encoder)
    assert len(layers) == 14  # T5's `wo` too
    for layer in layers.values():
        assert (layer.activation_format, layer.block_size) == ("fp8", 16)
        assert layer.rotation == "hadamard_32"
    for layer in layers_of(pipe.transformer).values():
        assert (layer.activation_format, layer.block_size) == ("dialect", 32)
    generate(pipe)
    share = pipe.semantic_dialect_summary().to_dict()["transformer"]["salient_share"]
    assert share > 0.25


def test_an_encoder_alone_is_rotated(tmp_path):
    encoder("UMT5").save_pretrained(tmp_path)
    model = enabled(rotation="hadamard_32")
    assert {layer.rotation for layer in layers_of(model).values()} == {"hadamard_32"}
    config = SemanticDialectConfig(rotation="hadamard_32")
    online = UMT5EncoderModel.from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(encoded(online), encoded(model))


def test_blocks_of_an_encoder_can_be_left_out():
    layers = layers_of(enabled(ignore=["first:1"]))
    assert len(layers) == 7  # of the second block, `wo` too
    assert all(name.startswith("encoder.block.1.") for name in layers)


@pytest.mark.parametrize(
    ("components", "sentence"),
    [
        (["text_encoder_2"], "components: WanPipeline has no model 'text_encoder_2'; it has "),
        (["scheduler"], "components: WanPipeline has no model 'scheduler'; it has "),
        ("text_encoder", "components: 'text_encoder' cannot be used: it must be a list of names,"),
        ([], r"components: \[\] cannot be used: it must be a list of names, or options by name"),
        (
            {"text_encoder": {"seda": True}},
            "seda: has no effect on text_encoder, an encoder of transformers, whose tokens are",
        ),
        ({"text_encoder": {"bits": 3}}, "bits: is not an option of SemanticDialectConfig"),
        (["transformer", "vae"], "AutoencoderKLWan: has .*, as U-Nets and autoencoders do"),
    ],
)
def test_components_that_cannot_be_quantized_are_refused(components, sentence):
    pipe = pipeline()
    with pytest.raises(ValueError, match=sentence):
        pipe.enable_semantic_dialect(components=components, progress=False)
    assert not layers_of(pipe.transformer)
    assert not layers_of(pipe.text_encoder)


def test_components_are_those_of_pipelines():
    with pytest.raises(ConfigError, match=r"components: \['text_encoder'\] are those of a pipeli"):
        enabled(components=["text_encoder"])
    with pytest.raises(ConfigError, match="protected_steps: has no effect on UMT5EncoderModel"):
        enabled(protected_steps="auto")


def test_a_loaded_encoder_takes_another_activation_format(tmp_path):
    enabled(activation_format="fp8").save_pretrained(tmp_path)
    pipe = pipeline()
    pipe.text_encoder = UMT5EncoderModel.from_pretrained(tmp_path)
    pipe.enable_semantic_dialect(components=BOTH, progress=False)
    formats = {layer.activation_format for layer in layers_of(pipe.text_encoder).values()}
    assert formats == {"fp8"}
    diffusers_hook.enable(pipe.text_encoder, activation_format="none", progress=False)
    assert torch.equal(encoded(pipe.text_encoder), encoded(enabled()))
    with pytest.raises(ConfigError, match="block_size: 16 needs other weights than those loaded"):
        diffusers_hook.enable(pipe.text_encoder, block_size=16, progress=False)
    with pytest.raises(RuntimeError, match="UMT5EncoderModel was loaded quantized"):
        diffusers_hook.disable(pipe.text_encoder)


@pytest.mark.parametrize("damage", ["missing", "dtype", "shape", "value"])
def test_damaged_files_are_refused(damage, tmp_path):
    enabled().save_pretrained(tmp_path)
    path = "encoder.block.0.layer.0.SelfAttention.q"
    stored = load_file(tmp_path / WEIGHTS)
    key = f"{path}.weight_meta"
    if damage == "missing":
        del stored[key]
    elif damage == "dtype":
        stored[key] = stored[key].to(torch.int32)
    elif damage == "shape":
        stored[key] = stored[key][:, :0].clone()
    else:
        stored[f"{path}.weight_row_exponent"].fill_(127)
    save_file(stored, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=path):
        UMT5EncoderModel.from_pretrained(tmp_path)


def test_weights_that_cannot_be_quantized_are_named(tmp_path):
    model = encoder("UMT5")
    layer = model.encoder.block[1].layer[0].SelfAttention.k
    layer.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"encoder\.block\.1\.layer\.0\.SelfAttention\.k\.weight"):
        diffusers_hook.enable(model, progress=False)
    assert not layers_of(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder\.block\.1\.layer\.0\.SelfAttention\.k\.weight"):
        UMT5EncoderModel.from_pretrained(tmp_path, quantization_config=SemanticDialectConfig())


def test_dequantizing_gives_plain_layers(tmp_path):
    enabled().save_pretrained(tmp_path)
    loaded = UMT5EncoderModel.from_pretrained(tmp_path)
    plain = loaded.dequantize()
    assert not layers_of(plain)
    reference = encoder("UMT5")
    layer = reference.encoder.block[0].layer[0].SelfAttention.q
    found = plain.encoder.block[0].layer[0].SelfAttention.q
    assert torch.equal(found.weight, decoded(layer.weight.data))
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(
        encoded(UMT5EncoderModel.from_pretrained(tmp_path / "plain")), encoded(plain)
    )


def test_offloading_changes_nothing():
    pipe = pipeline()
    pipe.enable_semantic_dialect(components=BOTH, progress=False)
    video = generate(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipe), video)
    pipe.remove_all_hooks()
    pipe.disable_semantic_dialect()
    pipe.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    pipe.enable_semantic_dialect(components=BOTH, progress=False)
    assert torch.equal(generate(pipe), video)


def test_sequential_offload_refuses_an_exchange_of_layers():
    model = enabled()
    wanted = encoded(model)
    cpu_offload(model, CPU)
    assert torch.equal(encoded(model), wanted)
    with pytest.raises(RuntimeError, match="its layers are offloaded one by one"):
        diffusers_hook.disable(model)


def test_compiled_blocks_have_no_graph_break():
    model = enabled()
    wanted = encoded(model)
    for block in model.encoder.block:
        block.layer[1].compile(backend="aot_eager", fullgraph=True)
    assert (encoded(model) - wanted).norm() < 1e-3 * wanted.norm()


def _tokenizer():
    words = {f"w{i}": i for i in range(WORDS - 3)} | {"<pad>": 13, "</s>": 14, "<unk>": 15}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=16,
    )  # fmt: skip


def test_both_text_encoders_of_flux(tmp_path):
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=encoder("CLIP"),
        tokenizer=_tokenizer(),
        text_encoder_2=encoder("T5"),
        tokenizer_2=_tokenizer(),
        transformer=flux()[0],
    )
    pipe.set_progress_bar_config(disable=True)

    def latents(pipe):
        return pipe(
            "w1 w2 w3", height=32, width=32, num_inference_steps=2, max_sequence_length=16,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    before = latents(pipe)
    names = ("transformer", "text_encoder", "text_encoder_2")
    pipe.enable_semantic_dialect(components=names, progress=False)
    found = {n: s["layers"] for n, s in pipe.semantic_dialect_summary().to_dict().items()}
    assert (found["text_encoder"], found["text_encoder_2"]) == (12, 12)
    wanted = latents(pipe)
    assert not torch.equal(wanted, before)
    pipe.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path, vae=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents(loaded), wanted)
    pipe.disable_semantic_dialect()
    assert torch.equal(latents(pipe), before)
