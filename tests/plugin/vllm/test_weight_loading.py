"""vLLM's own linear layers and model loader with the plugin's parameters, without an engine."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dialect_kernels import PackedTensor, dialect_linear, quantize
from dialect_kernels.formatbook import DIALECT_FP4, SEMANTIC_32
from dialect_plugin.architectures import ARCHITECTURES
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.scheme import Scheme
from tests.support.engines import (
    STORED,
    expected_bytes,
    load_model,
    packed_experts,
    packed_modules,
    tensors_of,
)
from tests.support.served_models import build, checkpoint_tensors

# importing vLLM takes about ten seconds
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build("LlamaForCausalLM", tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("llama") / "packed"
    convert(source, destination)
    return destination


def quant_config(name="blockdialect", **scheme):
    from vllm.model_executor.layers.quantization import get_quantization_config

    config = get_quantization_config(name).from_config(
        Scheme.model_validate(scheme).to_config()  # as config.json has it
    )
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return config


def qkv(config):
    from vllm.model_executor.layers.linear import QKVParallelLinear

    return QKVParallelLinear(
        128, 32, 4, 2, bias=True, quant_config=config, prefix="model.layers.0.self_attn.qkv_proj"
    )


def gate_up(config):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    return MergedColumnParallelLinear(
        128, [192, 192], bias=False, quant_config=config, prefix="model.layers.0.mlp.gate_up_proj"
    )


def down(config):
    from vllm.model_executor.layers.linear import RowParallelLinear

    return RowParallelLinear(
        192, 128, bias=True, quant_config=config, prefix="model.layers.0.mlp.down_proj"
    )


LAYERS = {
    "qkv": (qkv, {"q": 128, "k": 64, "v": 64}, 128),
    "gate_up": (gate_up, {0: 192, 1: 192}, 128),
    "down": (down, {None: 128}, 192),
}


@pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda book: book.name)
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("layer_name", LAYERS)
def test_shards_land_where_they_belong(layer_name, block_size, book):
    make, shards, columns = LAYERS[layer_name]
    torch.manual_seed(block_size)
    layer = make(quant_config(book=book.name, block_size=block_size))
    weights = {shard: torch.randn(rows, columns) for shard, rows in shards.items()}
    for shard, weight in weights.items():
        part = quantize(weight, book, block_size)
        tensors = (part.codes, part.meta, part.row_exponent)
        for name, tensor in zip(STORED, tensors, strict=True):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    bias = None
    if layer.bias is not None:
        bias = torch.randn(layer.bias.shape)
        layer.bias.data.copy_(bias)
    layer.quant_method.process_weights_after_loading(layer)
    layer.quant_method.process_weights_after_loading(layer)  # vLLM calls it twice

    x = torch.randn(5, columns)
    whole = quantize(torch.cat(list(weights.values())), book, block_size)
    y, _ = layer(x)
    assert torch.equal(y, dialect_linear(x, whole, bias))
    stored = PackedTensor(
        *(getattr(layer, name).data for name in STORED), whole.shape, book, block_size
    )
    assert torch.equal(stored.codes, whole.codes)
    assert torch.equal(stored.meta, whole.meta)
    assert torch.equal(stored.row_exponent, whole.row_exponent)


@pytest.mark.parametrize(
    ("tensor", "parameter", "message"),
    [
        (
            torch.zeros(128, 12, dtype=torch.uint8),
            "weight_meta",
            "model.layers.0.mlp.down_proj.weight_meta: the checkpoint's tensor has 12 columns "
            "where the model and its quantization_config need 6; correct the block size or convert "
            "the model again",
        ),
        (
            torch.zeros(128, 96, dtype=torch.int32),
            "weight_packed",
            "model.layers.0.mlp.down_proj.weight_packed: the checkpoint holds torch.int32; it must "
            "be uint8: give the original 16-bit checkpoint, or convert it again",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tensor, parameter, message):
    layer = down(quant_config())
    target = getattr(layer, parameter)
    with pytest.raises(ValueError) as caught:
        target.weight_loader(target, tensor)
    assert str(caught.value) == message


def test_the_dtype_of_the_model_does_not_change_the_bytes(source, packed):
    weights = checkpoint_tensors(source)
    for dtype in ("float16", "bfloat16", "float32"):
        found = tensors_of(load_model(source, quantization="blockdialect", dtype=dtype))
        modules = packed_modules(found)
        assert len(modules) == 2 * 4
        for module in modules:
            for name, value in expected_bytes(weights, module).items():
                assert torch.equal(found[name], value), (dtype, name)


def test_nothing_but_packed_weights_is_left_after_online_loading(source):
    found = tensors_of(load_model(source, quantization="blockdialect", dtype="bfloat16"))
    kept = {name for name, value in found.items() if value.dim() == 2 and value.is_floating_point()}
    assert kept == {"model.embed_tokens.weight", "lm_head.weight"}


def test_ignore_and_overrides_agree_packed_and_online(source, tmp_path):
    options = {
        "ignore": ["re:.*\\.0\\.mlp\\.(gate|up)_proj", "model.layers.1.self_attn.o_proj"],
        "overrides": {"re:.*down_proj": {"block_size": 16}},
        "lm_head": True,
    }
    convert(source, tmp_path / "packed", Scheme.parse(options))
    from_packed = tensors_of(load_model(tmp_path / "packed"))
    text = json.dumps(options)
    online = tensors_of(
        load_model(
            source,
            quantization="blockdialect",
            hf_overrides={"quantization_config_dict_json": text},
        )
    )
    assert from_packed.keys() == online.keys()
    for name, value in from_packed.items():
        assert torch.equal(value, online[name]), name
    assert "model.layers.0.mlp.gate_up_proj.weight" in online
    assert "model.layers.1.self_attn.o_proj.weight" in online
    assert "model.layers.1.mlp.gate_up_proj.weight_packed" in online
    assert online["model.layers.0.mlp.down_proj.weight_meta"].shape == (128, 192 // 16)
    assert online["lm_head.weight_packed"].shape == (512, 64)
    expected = quantize(checkpoint_tensors(source)["lm_head.weight"], SEMANTIC_32)
    assert torch.equal(online["lm_head.weight_packed"][:500], expected.codes)
    assert not online["lm_head.weight_packed"][500:].any()


def test_columns_that_the_block_size_does_not_divide(tmp_path):
    source = build("LlamaForCausalLM", tmp_path / "source", intermediate_size=176)
    convert(source, tmp_path / "packed")
    from_packed = tensors_of(load_model(tmp_path / "packed"))
    online = tensors_of(load_model(source, quantization="blockdialect"))
    assert online["model.layers.0.mlp.down_proj.weight_meta"].shape == (128, 176 // 16)
    assert from_packed.keys() == online.keys()
    for name, value in from_packed.items():
        assert torch.equal(value, online[name]), name

    odd = build("LlamaForCausalLM", tmp_path / "odd", intermediate_size=168)
    found = tensors_of(load_model(odd, quantization="blockdialect"))
    assert "model.layers.0.mlp.down_proj.weight" in found
    assert "model.layers.0.mlp.gate_up_proj.weight_packed" in found


def save_gemma3(source):
    """A tiny Gemma 3 with a vision tower, under the names that released checkpoints have."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 128,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=500,
        boi_token_index=501,
        eoi_token_index=502,
    )
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(source)
    # the released checkpoints, and vLLM, have a `vision_model` that transformers 5 leaves out
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value
        for name, value in checkpoint_tensors(source).items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_gemma3_with_its_vision_tower_keeps_it_in_16_bit(tmp_path):
    source = tmp_path / "source"
    save_gemma3(source)
    convert(source, tmp_path / "packed")
    stored = checkpoint_tensors(tmp_path / "packed")
    layers = [name for name in stored if name.endswith(".weight_packed")]
    assert len(layers) == 2 * 7
    assert not any("vision" in name or "projector" in name for name in layers)

    from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.models.utils import WeightsMapper

    # as in vLLM's gemma3_mm, which cannot be imported without torchvision
    mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        }
    )
    scheme = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    quantization = get_quantization_config("blockdialect").from_config(scheme)
    quantization.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    quantization.apply_vllm_mapper(mapper)
    text, vision = (
        QKVParallelLinear(hidden, 32, hidden // 32, bias=False, quant_config=quantization, prefix=p)
        for hidden, p in (
            (128, "language_model.model.layers.0.self_attn.qkv_proj"),
            (64, "vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj"),
        )
    )
    assert hasattr(text, "weight_packed")
    assert isinstance(vision.quant_method, UnquantizedLinearMethod)


def test_an_architecture_that_is_not_in_the_table_keeps_its_routers(tmp_path, monkeypatch):
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    monkeypatch.delitem(ARCHITECTURES, "Qwen2MoeForCausalLM")
    config = Qwen2MoeConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    Qwen2MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    found = tensors_of(load_model(tmp_path, quantization="blockdialect"))
    assert packed_modules(found) == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.shared_expert.gate_up_proj",
        "model.layers.0.mlp.shared_expert.down_proj",
    ]
    assert packed_experts(found) == ["model.layers.0.mlp.experts.routed_experts"]


@pytest.fixture
def damaged(packed, tmp_path):
    """A copy of the packed checkpoint, and a function that changes its tensors."""
    copy = tmp_path / "damaged"
    copy.mkdir()
    tensors = checkpoint_tensors(packed)
    (copy / "config.json").write_text((packed / "config.json").read_text())

    def change(edit):
        edit(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return change


@pytest.mark.parametrize("suffix", STORED)
def test_a_missing_tensor_is_named(damaged, suffix):
    path = damaged(lambda tensors: tensors.pop(f"model.layers.1.self_attn.k_proj.{suffix}"))
    with pytest.raises(ValueError) as caught:
        load_model(path)
    assert str(caught.value) == (
        f"model.layers.1.self_attn.qkv_proj.{suffix}: the checkpoint does not hold all of its "
        "parts; convert the model again"
    )


def test_a_missing_16_bit_weight_is_named(source, tmp_path):
    tensors = checkpoint_tensors(source)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path, quantization="blockdialect")
    assert str(caught.value) == (
        "model.layers.0.mlp.down_proj.weight: the checkpoint does not hold it; complete the "
        "checkpoint, or ignore the layer"
    )


def test_reserved_values_and_nan_are_refused(source, tmp_path):
    convert(source, tmp_path / "packed", Scheme(book="dialect_fp4"))  # the other uses every byte
    tensors = checkpoint_tensors(tmp_path / "packed")
    tensors["model.layers.0.mlp.down_proj.weight_meta"][3, 2] = 0xE0
    for file in (tmp_path / "packed").glob("model*"):
        file.unlink()
    save_file(tensors, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj\.weight_meta: byte 0xe0 at \[3, 2\]"):
        load_model(tmp_path / "packed")

    tensors = checkpoint_tensors(source)
    tensors["model.layers.0.mlp.down_proj.weight"][5, 7] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ValueError, match=r"down_proj\.weight: nan at \[5, 7\]"):
        load_model(tmp_path, quantization="blockdialect")


@pytest.mark.parametrize("quantization", [None, "blockdialect"])
def test_dummy_weights_load(packed, source, quantization):
    load_model(source if quantization else packed, quantization=quantization, load_format="dummy")


def test_parts_of_a_fused_layer_that_disagree():
    config = quant_config(serialized=False, ignore=["model.layers.0.self_attn.k_proj"])
    with pytest.raises(ValueError) as caught:
        qkv(config)
    assert str(caught.value) == (
        "quantization_config: the parts of the fused layer model.layers.0.self_attn.qkv_proj "
        "disagree (model.layers.0.self_attn.q_proj block size 32, model.layers.0.self_attn.k_proj "
        "16 bit, model.layers.0.self_attn.v_proj block size 32); give all of them the same block "
        "size, or ignore all of them"
    )


def test_columns_of_a_rank_and_dtypes_are_checked():
    from dialect_plugin.vllm.linear import BlockDialectLinearMethod, LinearSpec

    method = BlockDialectLinearMethod(
        LinearSpec("down_proj", True, Scheme(block_size=64).layer("x"))
    )
    arguments = {"weight_loader": lambda parameter, loaded: None}
    with pytest.raises(ValueError) as caught:
        method.create_weights(torch.nn.Module(), 96, [128], 192, 128, torch.bfloat16, **arguments)
    assert str(caught.value) == (
        "down_proj: 96 of 192 input columns per tensor-parallel rank are not a multiple of the "
        "block size 64; use another --tensor-parallel-size, or override the layer's block size"
    )
    with pytest.raises(ValueError, match=r"torch\.float64 is not supported; use --dtype"):
        method.create_weights(torch.nn.Module(), 192, [128], 192, 128, torch.float64, **arguments)


@pytest.mark.parametrize(
    ("rank", "bias", "compiled"),
    [
        (0, None, {None}),
        (0, torch.zeros(8), {torch.bfloat16}),
        (1, torch.zeros(8), {torch.bfloat16, None}),
    ],
)
def test_what_is_compiled_for_a_layer(rank, bias, compiled, monkeypatch):
    """Of the ranks that add up a layer's parts only the first one adds its bias."""
    from dialect_plugin.vllm import linear

    p, seen = quantize(torch.randn(8, 64), SEMANTIC_32), []
    monkeypatch.setattr(
        linear, "warm_up", lambda p, form, dtype, bias_dtype, decoded: seen.append(bias_dtype)
    )
    method = linear.BlockDialectLinearMethod(
        linear.LinearSpec("down_proj", True, Scheme().layer("down_proj"))
    )
    method.dtype = torch.bfloat16
    layer = SimpleNamespace(
        weight_packed=p.codes,
        weight_meta=p.meta,
        weight_row_exponent=p.row_exponent,
        bias=bias,
        tp_rank=rank,
    )
    method._warm_up(layer)
    assert len(seen) == len(compiled)
    assert set(seen) == compiled


def test_the_output_projection_of_a_tied_model_is_refused(tmp_path):
    source = build("LlamaForCausalLM", tmp_path / "tied", tie_word_embeddings=True)
    text = json.dumps({"lm_head": True})
    with pytest.raises(ValueError, match="ties its output projection to the embeddings"):
        load_model(
            source,
            quantization="blockdialect",
            hf_overrides={"quantization_config_dict_json": text},
        )


def test_which_flag_goes_with_which_checkpoint(packed):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization import get_quantization_config

    def chosen(path, quantization):
        arguments = EngineArgs(str(path), quantization=quantization, skip_tokenizer_init=True)
        return arguments.create_model_config().quantization

    assert chosen(packed, None) == "blockdialect"
    names = ("blockdialect", "blockdialect_w4a4", "blockdialect_w4a8", "blockdialect_w4a16")
    for name in names:
        assert chosen(packed, name) == name
    with pytest.raises(ValueError, match="does not match the quantization method"):
        chosen(packed, "fp8")

    formats = {
        name: quant_config(name, activation_format="fp8").scheme.activation_format for name in names
    }
    assert formats == {
        "blockdialect": "fp8",  # the checkpoint's
        "blockdialect_w4a4": "dialect",
        "blockdialect_w4a8": "fp8",
        "blockdialect_w4a16": "none",  # the flag's
    }
    for name in formats:
        override = get_quantization_config(name).override_quantization_method
        assert override({"quant_method": "fp8"}, name) is None
        assert override({"quant_method": "blockdialect"}, "fp8") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "the key 'surprise' is not known"),
        ({"format_version": 7}, "upgrade blockdialect"),
        ({"block_size": 48}, "block_size is 48"),
        ({"activation_format": "fp4"}, "activation_format is 'fp4'"),
    ],
)
def test_a_faulty_scheme_is_one_sentence(changes, message, source):
    scheme = {"quant_method": "blockdialect", "serialized": False} | changes
    with pytest.raises(ValueError, match=message):
        load_model(source, hf_overrides={"quantization_config": scheme})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{block_size: 16}", "quantization_config_dict_json: is not JSON (Expecting property name"),
        ("[16]", "quantization_config_dict_json: holds list; write an object"),
    ],
)
def test_options_that_are_no_json_object(text, message, source):
    overrides = {"quantization_config_dict_json": text}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(source, quantization="blockdialect", hf_overrides=overrides)


def test_a_file_of_options_that_cannot_be_read(source, tmp_path):
    overrides = {"quantization_config_file": str(tmp_path / "options.json")}
    with pytest.raises(ValueError, match=r"options.json: cannot be read .*; give a JSON file"):
        load_model(source, quantization="blockdialect", hf_overrides=overrides)


def test_a_config_that_does_not_say_whether_weights_are_packed(source):
    overrides = {"quantization_config": {"quant_method": "blockdialect"}}
    with pytest.raises(ValueError, match="serialized is missing; set it to false to quantize a"):
        load_model(source, hf_overrides=overrides)


def test_registering_again_changes_nothing():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    from dialect_plugin import register

    before = list(QUANTIZATION_METHODS)
    register()
    assert before == QUANTIZATION_METHODS
    assert [name for name in before if "blockdialect" in name] == [
        "blockdialect",
        "blockdialect_w4a4",
        "blockdialect_w4a8",
        "blockdialect_w4a16",
    ]
