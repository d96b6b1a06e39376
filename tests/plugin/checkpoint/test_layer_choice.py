"""Which layers a conversion takes, in which blocks, and which checkpoints it refuses."""

import re

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from dialect_plugin.checkpoint.convert import convert, render
from dialect_plugin.checkpoint.layer_choice import choose_layers
from dialect_plugin.checkpoint.options import ConvertOptions
from dialect_plugin.checkpoint.reader import open_checkpoint, open_packed
from dialect_plugin.scheme import Scheme, SchemeError, check_patterns
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


def test_layers_of_an_unknown_architecture_are_chosen_by_name_or_target(source, tmp_path):
    known = convert(source, tmp_path / "known")
    edit_config(source, architectures=["NewForCausalLM"])
    result = convert(source, tmp_path / "by_name")
    assert result.choice.formats == known.choice.formats
    shown = render(result)
    assert "does not have this one, whose layers were chosen by their names: 're:" in shown
    patterns = result.choice.by_name.split()
    assert len(patterns) == 7
    assert r"'re:model.layers.\d+.mlp.up_proj'" in patterns
    assert result.choice.by_name in (tmp_path / "by_name" / "README.md").read_text()
    assert known.choice.by_name == ""
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


def test_routers_stay_in_16_bit_even_as_targets(tiny_model, tmp_path):
    options = ConvertOptions(targets=["re:model.layers.*"])
    result = convert(tiny_model("MixtralForCausalLM"), tmp_path / "packed", options)
    assert len(result.layers) == 2 * (4 + 4 * 3)  # attention, and four experts
    assert not result.choice.has_plain_experts


def rewrite(path, change):
    """Apply `change` to the tensors of the checkpoint in `path`."""
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def test_layers_that_are_stored_transposed_are_refused(tmp_path):
    """GPT-2's Conv1D holds [inputs, outputs]; a square weight does not show it, its bias does."""
    source = tmp_path / "source"
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(source)
    message = r"stored as \[inputs, outputs\] \(Conv1D\).*--quantization blockdialect"
    for targets in ([], ["re:.*attn.c_proj"], ["re:.*c_fc"]):
        refused(source, tmp_path / "packed", message, targets=targets)


def test_square_layers_with_a_bias_are_not_transposed_by_themselves(source, tmp_path):
    def add_biases(weights):
        for layer in range(2):
            weights[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.zeros(128)
            weights[f"model.layers.{layer}.mlp.down_proj.bias"] = torch.zeros(128)

    rewrite(source, add_biases)
    assert len(convert(source, tmp_path / "packed").layers) == 14


def test_layers_whose_fused_matrix_lacks_a_part_stay_in_16_bit(source, tmp_path):
    """Also by name in config.json, where vLLM looks for each part of the fused layer."""
    rewrite(source, lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"))
    result = convert(source, tmp_path / "packed")
    layer = "model.layers.1.self_attn."
    assert set(result.choice.incomplete) == {f"{layer}q_proj", f"{layer}v_proj"}
    assert {f"{layer}{part}_proj" for part in "qkv"} <= set(result.choice.scheme.ignore)
    assert f"{layer}q_proj, {layer}v_proj" in render(result)
    assert len(result.layers) == 11


def test_keys_that_are_values_too_lack_nothing(source, tmp_path):
    rewrite(source, lambda weights: weights.pop("model.layers.1.self_attn.v_proj.weight"))
    edit_config(source, text_config={"attention_k_eq_v": True})
    assert len(convert(source, tmp_path / "packed").layers) == 13


@pytest.mark.parametrize(
    ("parts", "columns"),
    [
        (("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), 128),
        (("feed_forward.w1", "feed_forward.w3"), 128),
        (("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), 128),
        (("attention.query", "attention.key", "attention.value"), 128),
    ],
)
def test_every_fused_group_stays_together(source, tmp_path, parts, columns):
    def add(weights):
        for layer in range(2):
            for part in parts:
                name = f"model.layers.{layer}.{part}.weight"
                weights[name] = torch.ones(64, columns, dtype=torch.bfloat16)

    rewrite(source, add)
    options = {
        "targets": ["re:model.layers"],
        "overrides": {f"re:.*{parts[0]}": {"block_size": 16}},
    }
    message = f"{parts[0]} block size 16.*engines run these as one"
    refused(source, tmp_path / "packed", message, SchemeError, **options)


def test_blocks_behind_the_last_one_belong_to_draft_models(source, tmp_path):
    """Multi-token prediction: DeepSeek-V3's block 61 of 61."""

    def add(weights):
        for name in ("self_attn.q_proj", "eh_proj"):
            weights[f"model.layers.2.{name}.weight"] = torch.ones(64, 128, dtype=torch.bfloat16)

    rewrite(source, add)
    result = convert(source, tmp_path / "packed")
    assert len(result.layers) == 14
    assert "model.layers.2.self_attn.q_proj" in result.choice.scheme.ignore


def test_ignoring_what_is_16_bit_anyway_is_no_error(source, tmp_path):
    ignore = ["lm_head", "model.embed_tokens", "model.norm", "re:.*input_layernorm"]
    assert len(convert(source, tmp_path / "packed", options_of(ignore=ignore)).layers) == 14
    rewrite(source, lambda weights: weights.pop("lm_head.weight"))
    edit_config(source, tie_word_embeddings=True)
    assert len(convert(source, tmp_path / "tied", options_of(ignore=["lm_head"])).layers) == 14


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("down_proj", "re:.*down_proj"),
        ("mlp.down_proj", r"re:.*mlp\.down_proj"),
        ("*.down_proj", "re:.*down_proj"),
        (".*down_proj", "re:.*down_proj"),
        ("layers.1", r"re:.*layers\.1"),
        ("self_attn.*_proj", r"re:.*self_attn\..*_proj"),
        (r"model\.layers\.\d+\.mlp", r"re:model\.layers\.\d+\.mlp"),
    ],
)
def test_a_part_of_a_name_suggests_the_pattern_that_was_meant(source, tmp_path, given, meant):
    message = f"{given!r} matches no layer, because a name must be whole; did you mean {meant!r}"
    for field in ("ignore", "override"):
        patterns = [given] if field == "ignore" else {given: {"block_size": 16}}
        key = {"ignore": "ignore", "override": "overrides"}[field]
        refused(
            source,
            tmp_path / "x",
            f"^{field}: {re.escape(message)}",
            SchemeError,
            **{key: patterns},
        )


def test_a_suggested_pattern_matches_nothing_else():
    names = ["a.layers.1.gate", "a.layers.1.gate_proj", "a.layers.10.gate", "a.layers.2.up"]
    for given, meant in (("gate", "re:.*gate$"), ("layers.1", r"re:.*layers\.1\.")):
        with pytest.raises(SchemeError, match=re.escape(repr(meant))):
            check_patterns("ignore", [given], names)


def test_parameters_in_16_bit_may_be_called_scales_or_blocks(source, tmp_path):
    def add(weights):
        weights["model.layers.0.router_scales"] = torch.ones(4, dtype=torch.bfloat16)
        weights["model.layers.0.mlp_blocks"] = torch.ones(4, dtype=torch.float32)

    rewrite(source, add)
    assert len(convert(source, tmp_path / "packed").layers) == 14
    rewrite(source, lambda w: w.update({"experts_blocks": torch.zeros(4, dtype=torch.uint8)}))
    refused(source, tmp_path / "x", r"quantized already \(it has a tensor experts_blocks\)")


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config", "vision_config"])
def test_a_quantization_config_is_found_wherever_it_is_nested(source, tmp_path, key):
    edit_config(source, **{key: {"inner": {"quantization_config": {"quant_method": "gptq"}}}})
    refused(source, tmp_path / "packed", r"quantized already \(gptq\)")


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
    only = "targets: they match layers only that engines read in 16 bit"
    refused(source, destination, only, SchemeError, targets=["re:.*embed_tokens"])
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
    assert "lm_head" in choice.formats


def test_options_are_closed_and_their_patterns_compile():
    with pytest.raises(ValidationError, match="Extra inputs"):
        ConvertOptions.model_validate({"block_size": 16})
    with pytest.raises(ValidationError, match=r"'re:\(' is not a regular expression"):
        ConvertOptions(targets=["re:("])
    with pytest.raises(ValidationError, match="16, 32 or 64"):
        ConvertOptions(scheme=Scheme(block_size=48))


def test_nothing_to_pack_is_refused(tiny_model, source, tmp_path):
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 40)
    odd = tiny_model(num_attention_heads=1, **sizes)
    refused(odd, tmp_path / "packed", r"no block size \(16, 32, 64\) divides the columns of any")
    tensors = load_file(source / "model.safetensors")
    save_file(
        {
            name.replace("mlp", "ffn").replace("self_attn", "mixer"): t
            for name, t in tensors.items()
        },
        source / "model.safetensors",
        {"format": "pt"},
    )
    refused(source, tmp_path / "packed", "has no layer with the names of LlamaForCausalLM; choose")
