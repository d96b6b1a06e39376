"""Rotated layers, and layers with a book or activations of their own, in vLLM."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dialect_kernels import PackedTensor, dialect_linear
from dialect_kernels.formatbook import book_by_name
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.scheme import Scheme
from tests.support.engines import (
    STORED,
    engine,
    expected_bytes,
    load_model,
    logprobs,
    packed_modules,
    tensors_of,
)
from tests.support.served_models import build, checkpoint_tensors, expected_logprobs

pytestmark = pytest.mark.slow

ROTATED = "hadamard_32"
ARCHITECTURE = "LlamaForCausalLM"
TOLERANCE = 1e-3  # see test_engine
OPTIONS = {
    "rotation": ROTATED,
    "lm_head": True,
    "overrides": {
        "re:.*layers.1.mlp.(gate|up)": {"book": "dialect_fp4", "rotation": "none"},
        "re:.*down_proj": {"activation_format": "fp8", "block_size": 16},
        "re:.*o_proj": {"activation_format": "none", "block_size": 64},
    },
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build(ARCHITECTURE, tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("llama") / "packed"
    convert(source, destination, Scheme.parse(OPTIONS))
    return destination


def load_online(source, options=OPTIONS, quantization="blockdialect"):
    overrides = {"quantization_config_dict_json": json.dumps(options)}
    return load_model(source, quantization=quantization, hf_overrides=overrides)


def quantized(model):
    """vLLM's layers with packed weights, by name, and their tokens' width."""
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "weight_packed")
    }


@pytest.mark.usefixtures("one_rank")
def test_packed_and_online_hold_the_same_bytes(source, packed):
    from_packed, online = tensors_of(load_model(packed)), tensors_of(load_online(source))
    assert from_packed.keys() == online.keys()
    for name, value in from_packed.items():
        rows = 500 if name.startswith("lm_head") else None  # the rest is padding
        assert torch.equal(value[:rows], online[name][:rows]), name
    weights = checkpoint_tensors(source)
    for module in packed_modules(online):
        if module == "lm_head":
            continue
        form = Scheme.parse(OPTIONS).layer(module.replace("gate_up_proj", "up_proj"))
        arguments = (form.formatbook, form.block_size, form.rotation)
        for name, value in expected_bytes(weights, module, *arguments).items():
            assert torch.equal(online[name], value), name


@pytest.mark.usefixtures("one_rank")
def test_each_layer_computes_in_its_own_formats(source, packed):
    wanted = {
        "layers.0.self_attn.qkv_proj": ("semantic_32", 32, "dialect", ROTATED),
        "layers.1.mlp.gate_up_proj": ("dialect_fp4", 32, "dialect", "none"),
        "layers.1.mlp.down_proj": ("semantic_32", 16, "fp8", ROTATED),
        "layers.1.self_attn.o_proj": ("semantic_32", 64, "none", ROTATED),
    }
    torch.manual_seed(0)
    for model in (load_model(packed), load_online(source)):
        layers = quantized(model)
        for name, form in wanted.items():
            layer = layers[f"model.{name}"]
            book, block_size, activation_format, rotation = form
            assert layer.quant_method.spec.format == form
            columns = layer.weight_packed.shape[1] * 2
            weight = PackedTensor.from_stored(
                {stored: getattr(layer, stored).data for stored in STORED},
                columns,
                book_by_name(book),
                block_size,
                rotation,
            )
            x = torch.randn(3, columns)
            x[:, 5] *= 1000  # what a rotation spreads
            y = layer.quant_method.apply(layer, x)
            assert torch.equal(y, dialect_linear(x, weight, None, activation_format)), name


@pytest.mark.usefixtures("one_rank")
def test_a_flag_with_an_ending_decides_for_every_layer(packed):
    for flag, form in (("w4a4", "dialect"), ("w4a8", "fp8"), ("w4a16", "none")):
        layers = quantized(load_model(packed, quantization=f"blockdialect_{flag}"))
        formats = {layer.quant_method.spec.format for layer in layers.values()}
        assert {entry.activation_format for entry in formats} == {form}
        assert {entry.rotation for entry in formats} == {"none", ROTATED}
        assert {entry.book for entry in formats} == {"dialect_fp4", "semantic_32"}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("mode", ["packed", "online"])
def test_16_bit_weights_that_are_pushed_are_rotated(mode, source, packed, tmp_path):
    weights = checkpoint_tensors(build(ARCHITECTURE, tmp_path / "other", seed=1))
    model = load_model(packed) if mode == "packed" else load_online(source)
    model.load_weights(iter(weights.items()))
    found = tensors_of(model)
    for module in ("model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"):
        for name, value in expected_bytes(weights, module, rotation=ROTATED).items():
            assert torch.equal(found[name], value), name


@pytest.mark.usefixtures("one_rank")
def test_columns_that_the_rotation_does_not_divide(tmp_path):
    source = build(ARCHITECTURE, tmp_path / "source", intermediate_size=176)
    convert(source, tmp_path / "packed", Scheme(rotation=ROTATED))
    from_packed = load_model(tmp_path / "packed")
    online = load_online(source, {"rotation": ROTATED})
    for model in (from_packed, online):
        layers = quantized(model)
        form = layers["model.layers.0.mlp.down_proj"].quant_method.spec.format
        assert form == ("semantic_32", 16, "dialect", "none")
        form = layers["model.layers.0.mlp.gate_up_proj"].quant_method.spec.format
        assert form == ("semantic_32", 32, "dialect", ROTATED)
    tensors = tensors_of(online)
    for name, value in tensors_of(from_packed).items():
        assert torch.equal(value, tensors[name]), name


@pytest.mark.usefixtures("one_rank")
def test_a_rank_s_share_of_the_columns_is_rotated_in_whole_groups():
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.layers.quantization import get_quantization_config

    from dialect_plugin.vllm.linear import BlockDialectLinearMethod, LinearSpec

    scheme = Scheme(serialized=False, rotation=ROTATED, block_size=16)
    config = get_quantization_config("blockdialect")(scheme)
    prefix = "model.layers.0.mlp.down_proj"
    layer = RowParallelLinear(192, 128, bias=False, quant_config=config, prefix=prefix)
    assert layer.quant_method.spec.format.rotation == ROTATED
    layer.input_size_per_partition = 96  # of two ranks
    assert config.get_quant_method(layer, prefix).spec.format.rotation == ROTATED
    layer.input_size_per_partition = 48  # of four
    assert config.get_quant_method(layer, prefix).spec.format.rotation == "none"

    method = BlockDialectLinearMethod(LinearSpec("down_proj", True, scheme.layer("down_proj")))
    arguments = {"weight_loader": lambda parameter, loaded: None}
    for columns, whole, message in (
        (
            48,
            192,
            "down_proj: 48 of 192 input columns per tensor-parallel rank are not a multiple of 32, "
            f"which the rotation {ROTATED} needs; use another --tensor-parallel-size, or override "
            "the layer's rotation",
        ),
        (
            48,
            48,
            "down_proj: its 48 input columns are not a multiple of 32, which the rotation "
            f"{ROTATED} needs; override its rotation or ignore the layer",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            method.create_weights(
                torch.nn.Module(), columns, [8], whole, 8, torch.bfloat16, **arguments
            )
        assert str(caught.value) == message


@pytest.mark.usefixtures("one_rank")
def test_parts_of_a_fused_layer_that_are_rotated_differently(source):
    options = {"overrides": {"model.layers.0.self_attn.k_proj": {"rotation": ROTATED}}}
    with pytest.raises(ValueError) as caught:
        load_online(source, options)
    assert str(caught.value) == (
        "quantization_config: the parts of the fused layer model.layers.0.self_attn.qkv_proj "
        "disagree (model.layers.0.self_attn.q_proj rotation none, model.layers.0.self_attn.k_proj "
        f"rotation {ROTATED}, model.layers.0.self_attn.v_proj rotation none); give all of them the "
        "same rotation, or ignore all of them"
    )


@pytest.mark.usefixtures("one_rank")
def test_a_weight_that_overflows_when_rotated_is_named(source, tmp_path):
    tensors = checkpoint_tensors(source)
    tensors["model.layers.0.mlp.down_proj.weight"][5, :32] = 3e38
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ValueError, match=r"down_proj\.weight: row 5 overflows float32"):
        load_online(tmp_path, {"rotation": ROTATED})


def adapter_of(source, directory, rank=8, scale=2.0):
    """A random LoRA adapter of every quantized layer, saved in `directory`."""
    torch.manual_seed(3)
    adapter, leaves = {}, set()
    for name, weight in checkpoint_tensors(source).items():
        if ".layers." in name and weight.dim() == 2:
            module = name.removesuffix(".weight")
            leaves.add(module.rpartition(".")[2])
            prefix = f"base_model.model.{module}"
            rows, columns = weight.shape
            adapter[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns) * 0.1
            adapter[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank) * 0.1
    save_file(adapter, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(rank * scale),
        "target_modules": sorted(leaves),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return adapter


def test_the_engine_computes_the_rotated_model_and_adapters_see_plain_activations(source, tmp_path):
    from vllm.lora.request import LoRARequest

    convert(source, tmp_path / "packed", Scheme(rotation=ROTATED))
    adapter = adapter_of(source, tmp_path)
    oracles = {
        (form, rotation): expected_logprobs(source, ARCHITECTURE, form, rotation=rotation)[:-1]
        for form in ("dialect", "fp8")
        for rotation in ("none", ROTATED)
    }
    oracle = oracles["dialect", ROTATED]
    for key, other in oracles.items():  # so that the tolerance can tell them apart
        assert key == ("dialect", ROTATED) or (oracle - other).abs().max() > 50 * TOLERANCE
    adapted = expected_logprobs(
        source, ARCHITECTURE, adapter=adapter, adapter_scale=2.0, rotation=ROTATED
    )[:-1]
    assert (oracle - adapted).abs().max() > 50 * TOLERANCE
    with engine(tmp_path / "packed", enable_lora=True, max_lora_rank=8) as llm:
        torch.testing.assert_close(logprobs(llm), oracle, rtol=1e-4, atol=TOLERANCE)
        found = logprobs(llm, lora_request=LoRARequest("adapter", 1, str(tmp_path)))
        torch.testing.assert_close(found, adapted, rtol=1e-4, atol=TOLERANCE)
    with engine(tmp_path / "packed", quantization="blockdialect_w4a8", enforce_eager=False) as llm:
        found = logprobs(llm)
        torch.testing.assert_close(found, oracles["fp8", ROTATED], rtol=1e-4, atol=TOLERANCE)
