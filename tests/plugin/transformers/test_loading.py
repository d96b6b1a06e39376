"""Packed checkpoints in ``from_pretrained``: the logits of layers that are quantized by hand."""

import copy
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from dialect_kernels import reference
from dialect_kernels.formatbook import SEMANTIC_32
from dialect_plugin import open_packed
from dialect_plugin.calibration.calibrator import Calibrator
from dialect_plugin.calibration.options import CalibrationOptions
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.scheme import Scheme
from dialect_plugin.transformers import BlockDialectConfig, DialectLinear
from tests.support.by_hand import TOKENS, logits_of, quantized_by_hand
from tests.support.conversions import edit_config

LEAVES = {
    "LlamaForCausalLM": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "Qwen2ForCausalLM": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "Qwen3ForCausalLM": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "Gemma3ForCausalLM": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "Phi3ForCausalLM": "qkv_proj o_proj gate_up_proj down_proj",
    "OPTForCausalLM": "q_proj k_proj v_proj out_proj fc1 fc2",
    "MixtralForCausalLM": "q_proj k_proj v_proj o_proj",
}
TIED = (("tie_word_embeddings", True),)


def exact(path, dtype="auto", model_class=AutoModelForCausalLM, **options):
    """A packed checkpoint whose products have the bits of the reference."""
    config = BlockDialectConfig(accumulation="exact", **options)
    with pytest.warns(UserWarning, match="loading attributes"):  # transformers' own
        return model_class.from_pretrained(path, dtype=dtype, quantization_config=config)


def plain(weight):
    return reference.quantize(weight, SEMANTIC_32, 32)


def layers_of(architecture, pack=plain, blocks=2):
    """Every packed layer of the tiny model, by its name in transformers."""
    model = getattr(transformers, architecture)
    with torch.device("meta"):
        from tests.support.tiny_models import COMMON, CONFIGS

        config, own = CONFIGS[architecture]
        settings = {k: v for k, v in (COMMON | own).items() if v is not None}
        names = dict(model(getattr(transformers, config)(**settings)).named_modules())
    leaves = LEAVES[architecture].split()
    found = [n for n in names if n.rpartition(".")[2] in leaves and "experts" not in n]
    assert len(found) == blocks * len(leaves)
    return dict.fromkeys(found, pack)


def test_layers_of_an_unknown_architecture_are_chosen_by_their_names(tiny_model, tmp_path, caplog):
    unknown = shutil.copytree(tiny_model(), tmp_path / "unknown")
    edit_config(unknown, architectures=["NewForCausalLM"])

    def online(path):
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=BlockDialectConfig())

    with caplog.at_level("INFO"):
        assert torch.equal(logits_of(online(unknown)), logits_of(online(tiny_model())))
    (told,) = [line for line in caplog.messages if "chosen by their names" in line]
    assert "NewForCausalLM" in told
    assert told.count("'re:model.layers.") == 7


@pytest.mark.parametrize("architecture", LEAVES)
def test_the_logits_are_those_of_layers_quantized_by_hand(tiny_model, packed, architecture):
    model = (("tie_word_embeddings", True),) if architecture == "Gemma3ForCausalLM" else ()
    loaded = exact(packed(architecture, model, experts=False))
    layers = layers_of(architecture)
    found = {n for n, m in loaded.named_modules() if isinstance(m, DialectLinear)}
    assert found == layers.keys()
    assert loaded.dtype is torch.bfloat16
    by_hand = quantized_by_hand(tiny_model(architecture, **dict(model)), layers)
    assert torch.equal(logits_of(loaded), logits_of(by_hand))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dtype_is_that_of_from_pretrained(tiny_model, packed, dtype):
    loaded = exact(packed(), dtype)
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {dtype}
    by_hand = quantized_by_hand(tiny_model(), layers_of("LlamaForCausalLM"), dtype=dtype)
    assert torch.equal(logits_of(loaded), logits_of(by_hand))
    assert loaded.get_submodule("model.layers.0.mlp.up_proj").weight.dtype is dtype


@pytest.mark.parametrize("activation_format", ["fp8", "none"])
def test_an_option_chooses_the_format_of_activations(tiny_model, packed, activation_format):
    loaded = exact(packed(), activation_format=activation_format)
    assert loaded.config.quantization_config.activation_format == activation_format
    by_hand = quantized_by_hand(tiny_model(), layers_of("LlamaForCausalLM"), activation_format)
    assert torch.equal(logits_of(loaded), logits_of(by_hand))


def test_layers_have_what_their_overrides_say(tiny_model, packed):
    own = "model.layers.1.mlp.down_proj"
    checkpoint = packed(
        rotation="hadamard_32",
        book="semantic_32",
        overrides={own: {"rotation": "none", "activation_format": "fp8", "block_size": 16}},
    )
    loaded = exact(checkpoint)
    layers = layers_of(
        "LlamaForCausalLM",
        lambda w: reference.quantize(w, SEMANTIC_32, 32, rotation="hadamard_32"),
    )
    layers[own] = lambda w: reference.quantize(w, SEMANTIC_32, 16)
    formats = dict.fromkeys(layers, "dialect") | {own: "fp8"}
    assert torch.equal(
        logits_of(loaded), logits_of(quantized_by_hand(tiny_model(), layers, formats))
    )


def test_a_calibrated_checkpoint(tiny_model, tmp_path):
    text = CalibrationOptions(calibrate="default", samples=2, sequence_length=64)
    scheme = Scheme(book="semantic_32", rotation="hadamard_32")
    convert(tiny_model(), tmp_path / "packed", scheme, calibration=Calibrator(text))
    loaded = exact(tmp_path / "packed")
    stored = dict(open_packed(tmp_path / "packed"))
    by_hand = quantized_by_hand(
        tiny_model(), {name: lambda _, packed=p: packed for name, p in stored.items()}
    )
    assert torch.equal(logits_of(loaded), logits_of(by_hand))
    assert stored.keys() == layers_of("LlamaForCausalLM").keys()


def test_a_packed_output_projection(tiny_model, packed):
    loaded = exact(packed(lm_head=True))
    layers = layers_of("LlamaForCausalLM") | {"lm_head": plain}
    assert isinstance(loaded.get_output_embeddings(), DialectLinear)
    by_hand = quantized_by_hand(tiny_model(), layers)
    assert torch.equal(logits_of(loaded), logits_of(by_hand))
    inner = exact(packed(lm_head=True), model_class=AutoModel)  # has none
    expected = by_hand.model(TOKENS).last_hidden_state
    with torch.no_grad():
        assert torch.equal(inner(TOKENS).last_hidden_state, expected)


def test_bytes_are_the_file_s(packed):
    loaded = AutoModelForCausalLM.from_pretrained(packed(), dtype="auto")
    stored = open_packed(packed())
    assert len(stored) == 14
    for name, expected in stored.items():
        found = loaded.get_submodule(name).packed
        assert found.shape == expected.shape
        for field, tensor in expected.stored.items():
            assert torch.equal(found.stored[field], tensor), (name, field)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())


def test_a_copy_and_a_device_map(packed):
    loaded = AutoModelForCausalLM.from_pretrained(packed(), dtype="auto", device_map="auto")
    expected = logits_of(loaded)
    assert torch.equal(logits_of(copy.deepcopy(loaded)), expected)
    loaded.to("cpu")
    assert torch.equal(logits_of(loaded), expected)


def test_layers_on_disk(packed, tmp_path):
    expected = logits_of(AutoModelForCausalLM.from_pretrained(packed(), dtype="auto"))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        packed(), dtype="auto", device_map=places, offload_folder=tmp_path
    )
    assert loaded.get_submodule("model.layers.1.mlp.up_proj").weight_packed.is_meta
    assert torch.equal(logits_of(loaded), expected)


def test_older_names_of_tensors(packed, damaged):
    """As in checkpoints of the inner model, which transformers gives its prefix back."""
    file = damaged / "model.safetensors"
    tensors = {n.removeprefix("model."): t for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    config = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(config.replace('"model.', '"'))
    loaded = AutoModelForCausalLM.from_pretrained(damaged, dtype=torch.float32)
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {torch.float32}
    expected = AutoModelForCausalLM.from_pretrained(packed(), dtype=torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(expected))


@pytest.mark.parametrize("activation_format", ["dialect", "none"])
def test_the_default_is_near_to_exact(packed, activation_format):
    expected = exact(packed(), torch.float32, activation_format=activation_format)
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = AutoModelForCausalLM.from_pretrained(
            packed(),
            dtype=torch.float32,
            quantization_config=BlockDialectConfig(activation_format=activation_format),
        )
    up = "model.layers.0.mlp.up_proj"
    assert loaded.get_submodule(up).accumulation == "default"
    assert expected.get_submodule(up).accumulation == "exact"
    torch.testing.assert_close(logits_of(loaded), logits_of(expected), rtol=0, atol=1e-3)


def test_generation(packed):
    loaded = AutoModelForCausalLM.from_pretrained(packed(), dtype="auto")
    tokens = loaded.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    logits = logits_of(loaded, tokens[:, :-1])
    # float sums of attention differ between one token and many, so that ties may break otherwise
    best = logits[0, TOKENS.shape[1] - 1]
    assert best[tokens[0, TOKENS.shape[1]]] == best.max()
