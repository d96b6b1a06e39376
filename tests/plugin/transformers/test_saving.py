"""save_pretrained of packed models, and what transformers quantizes while loading."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from dialect_plugin import open_packed
from dialect_plugin.checkpoint.reader import CheckpointError
from dialect_plugin.transformers import BlockDialectConfig, DialectLinear
from tests.support.by_hand import logits_of


def scheme_of(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def tensors_of(path):
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def same_tensors(first, second):
    first, second = tensors_of(first), tensors_of(second)
    assert first.keys() == second.keys()
    assert all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


SMALLER = {"re:.*o_proj": {"block_size": 16}}
ROTATED = {"rotation": "hadamard_32", "book": "semantic_32"}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", ROTATED | {"lm_head": True}),
        ("Gemma3ForCausalLM", {}),
        ("MixtralForCausalLM", {"experts": False}),
        ("MixtralForCausalLM", ROTATED | {"ignore": ["re:.*layers.1.*experts"]}),
    ],
)
def test_a_saved_model_is_the_checkpoint_again(packed, tmp_path, architecture, options):
    source = packed(architecture, **options)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    loaded.save_pretrained(tmp_path)
    same_tensors(source, tmp_path)
    assert scheme_of(tmp_path) == scheme_of(source)
    assert len(open_packed(tmp_path)) == len(open_packed(source))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(logits_of(again), logits_of(loaded))


def test_saving_over_the_files_that_were_loaded(damaged):
    loaded = AutoModelForCausalLM.from_pretrained(damaged, dtype="auto")
    expected, layers = logits_of(loaded), dict(open_packed(damaged))
    loaded.save_pretrained(damaged)
    assert torch.equal(logits_of(loaded), expected)
    for name, packed in open_packed(damaged).items():
        assert torch.equal(packed.codes, layers[name].codes)


def test_the_chosen_activations_are_saved(packed, tmp_path):
    config = BlockDialectConfig(activation_format="fp8")
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = AutoModelForCausalLM.from_pretrained(packed(), quantization_config=config)
    loaded.save_pretrained(tmp_path)
    assert scheme_of(tmp_path) == scheme_of(packed()) | {"activation_format": "fp8"}


def test_another_class_than_the_checkpoint_s_is_not_saved(packed, tmp_path):
    inner = AutoModel.from_pretrained(packed(), dtype="auto")
    with pytest.raises(CheckpointError, match=r"LlamaModel: is another class than LlamaForCausal"):
        inner.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_a_dequantized_model_is_an_ordinary_one(packed, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(packed(**ROTATED), dtype="auto")
    layer = loaded.get_submodule("model.layers.0.mlp.up_proj")
    decoded = layer.decode()
    plain = loaded.dequantize()
    assert not any(isinstance(m, DialectLinear) for m in plain.modules())
    assert torch.equal(plain.get_submodule("model.layers.0.mlp.up_proj").weight, decoded)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(logits_of(again), logits_of(plain))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {}),
        (
            "LlamaForCausalLM",
            ROTATED | {"lm_head": True, "overrides": {"re:.*o_proj": {"block_size": 16}}},
        ),
        ("OPTForCausalLM", {}),
        ("MixtralForCausalLM", {}),
        ("MixtralForCausalLM", ROTATED | {"ignore": ["re:.*layers.1.*experts"]}),
    ],
)
def test_quantizing_while_loading_gives_the_converter_s_bytes(
    tiny_model, packed, tmp_path, architecture, options
):
    loaded = AutoModelForCausalLM.from_pretrained(
        tiny_model(architecture),
        dtype="auto",
        quantization_config=BlockDialectConfig(**options),
    )
    converted = packed(architecture, **options)
    expected = AutoModelForCausalLM.from_pretrained(converted, dtype="auto")
    assert torch.equal(logits_of(loaded), logits_of(expected))
    loaded.save_pretrained(tmp_path)
    same_tensors(converted, tmp_path)
    assert scheme_of(tmp_path) == scheme_of(converted)


def test_its_bytes_do_not_depend_on_the_dtype(tiny_model, tmp_path):
    """A float32 checkpoint is quantized as it is stored, whatever the model's dtype."""
    from dialect_plugin.checkpoint.convert import convert

    source = tmp_path / "float32"
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    model.save_pretrained(source)
    convert(source, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=BlockDialectConfig()
    )
    for name, expected in open_packed(tmp_path / "packed").items():
        found = loaded.get_submodule(name).packed
        assert torch.equal(found.codes, expected.codes), name
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {torch.bfloat16}


def test_a_config_json_may_ask_for_it(tiny_model, packed, tmp_path):
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(tiny_model(), dtype="auto").save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "blockdialect", "serialized": False}
    (source / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    expected = AutoModelForCausalLM.from_pretrained(packed(), dtype="auto")
    assert torch.equal(logits_of(loaded), logits_of(expected))


def test_nan_in_a_weight_is_refused(tiny_model, tmp_path):
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(tiny_model(), dtype="auto").save_pretrained(source)
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*3, 4"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=BlockDialectConfig())
