"""Which layers a conversion takes, in which blocks, and which checkpoints it refuses."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.layer_choice import ConvertOptions, choose_layers
from dialect_plugin.checkpoint.reader import open_checkpoint, open_packed
from dialect_plugin.scheme import Scheme, SchemeError
from tests.support.conversions import edit_config, options_of, refused


def test_columns_that_do_not_divide_are_adapted_or_left(tiny_model, tmp_path):
    source = tiny_model(intermediate_size=208)  # 208 = 13 * 16
    result = convert(source, tmp_path / "packed")
    assert set(result.choice.adapted) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert open_packed(tmp_path / "packed").read("model.layers.0.mlp.down_proj").block_size == 16
    refused(source, tmp_path / "strict", "208 columns", SchemeError, strict=True)
    odd = tiny_model(intermediate_size=200)
    result = convert(odd, tmp_path / "odd")
    assert set(result.choice.indivisible) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert "model.layers.0.mlp.down_proj" in result.choice.scheme.ignore


def test_unknown_architecture_lists_candidates_and_takes_targets(source, tmp_path):
    edit_config(source, architectures=["NewForCausalLM"])
    refused(source, tmp_path / "packed", r"'NewForCausalLM' is not known.*--targets.*q_proj")
    options = ConvertOptions(targets=[r"re:.*\.mlp\..*"])
    assert len(convert(source, tmp_path / "packed", options).layers) == 6
    everything = convert(source, tmp_path / "all", ConvertOptions(targets=["re:.*"]))
    assert len(everything.layers) == 14  # never the embeddings or the output projection
    targets = ["model.embed_tokens"]
    refused(source, tmp_path / "x", "engines read in 16 bit", SchemeError, targets=targets)


def test_parts_of_a_fused_layer_stay_together(source, tmp_path):
    destination = tmp_path / "packed"
    overrides = {"model.layers.0.mlp.up_proj": {"block_size": 16}}
    both = "mlp.gate_proj block size 32, .*mlp.up_proj block size 16: engines run these as one"
    refused(source, destination, both, SchemeError, overrides=overrides)
    name = "model.layers.1.self_attn.v_proj"
    refused(source, destination, f"{name} 16 bit", SchemeError, ignore=[name])


def test_experts_and_routers_stay_in_16_bit_even_as_targets(tiny_model, tmp_path):
    options = ConvertOptions(targets=["re:model.layers.*"])
    result = convert(tiny_model("MixtralForCausalLM"), tmp_path / "packed", options)
    assert len(result.layers) == 8
    assert result.choice.has_experts


def test_refusals(source, tmp_path):
    destination = tmp_path / "packed"
    for pattern in ("q_porj", r"re:.*\.q_porj$"):
        near = "matches no layer; similar names are model.layers.0.self_attn.q_proj"
        refused(source, destination, near, SchemeError, ignore=[pattern])
    refused(source, destination, "matches no layer; give", SchemeError, ignore=["xyz"])
    near = "similar names are model.layers"
    refused(source, destination, near, SchemeError, ignore=["model.layers.0.self_attn.q_porj"])
    overrides = {"re:nothing": {"block_size": 16}}
    refused(source, destination, "override: 're:nothing'", SchemeError, overrides=overrides)
    refused(source, destination, "no layer is left", SchemeError, ignore=["re:model.*"])
    edit_config(source, tie_word_embeddings=True)
    refused(source, destination, "ties its output projection", SchemeError, lm_head=True)
    edit_config(source, quantization_config={"quant_method": "awq"})
    refused(source, destination, r"quantized already \(awq\)")
    edit_config(source, quantization_config=None, text_config={"quantization_config": {}})
    (source / "hf_quant_config.json").write_text("{}")
    refused(source, destination, r"quantized already \(it has a hf_quant_config.json\)")
    (source / "hf_quant_config.json").unlink()
    extra = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    save_file(extra, source / "scales.safetensors")
    refused(source, destination, "quantized already .*up_proj.weight_scale")


def test_a_layer_of_another_dtype_is_refused(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, source / "model.safetensors")
    refused(source, tmp_path / "packed", f"{name}: has dtype F8_E4M3; only BF16, F16 and F32")


def test_the_chosen_scheme_is_that_of_the_options_with_exact_names(tiny_model):
    options = options_of(
        ignore=["re:.*layers.0.mlp"],
        overrides={"re:.*down_proj": {"block_size": 16}},
        serialized=False,
        activation_format="fp8",
        lm_head=True,
    )
    choice = choose_layers(open_checkpoint(tiny_model()), options)
    left = [f"model.layers.0.mlp.{name}" for name in ("down_proj", "gate_proj", "up_proj")]
    assert sorted(choice.scheme.ignore) == sorted([*left, "model.embed_tokens"])
    assert list(choice.scheme.overrides) == ["model.layers.1.mlp.down_proj"]
    assert choice.scheme.serialized  # a conversion packs, whatever the scheme was made for
    assert choice.scheme.activation_format == "fp8"
    assert "lm_head" in choice.block_sizes


def test_options_are_closed_and_their_patterns_compile():
    with pytest.raises(ValidationError, match="Extra inputs"):
        ConvertOptions.model_validate({"block_size": 16})
    with pytest.raises(ValidationError, match=r"'re:\(' is not a regular expression"):
        ConvertOptions(targets=["re:("])
    with pytest.raises(ValidationError, match="16, 32 or 64"):
        ConvertOptions(scheme=Scheme(block_size=48))
