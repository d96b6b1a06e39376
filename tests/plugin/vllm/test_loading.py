"""What vLLM's loaders may do to a packed checkpoint, and what a load must not leave open."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LagunaConfig, LagunaForCausalLM

from dialect_kernels import SEMANTIC_32, quantize
from dialect_kernels.device_tables import tables_on
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.options import ConvertOptions
from dialect_plugin.scheme import Scheme
from tests.support import swept_models
from tests.support.conversions import edit_config
from tests.support.engines import STORED, expected_bytes, load_model, packed_modules, tensors_of
from tests.support.served_models import build, checkpoint_tensors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build("LlamaForCausalLM", tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("llama") / "packed"
    convert(source, destination)
    return destination


def write(path, config, tensors, scheme=None):
    """A checkpoint of `tensors` with the config.json of another one, and a scheme of its own."""
    path.mkdir()
    config = json.loads((config / "config.json").read_text())
    if scheme is not None:
        config["quantization_config"] = Scheme.model_validate(scheme).to_config()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def pack(tensors, layers):
    """`tensors` with `layers` packed as they lie, whatever the engine makes of them."""
    packed = dict(tensors)
    for layer in layers:
        stored = quantize(packed.pop(f"{layer}.weight"), SEMANTIC_32).stored
        packed |= {f"{layer}.{name}": value for name, value in stored.items()}
    return packed


def linear_layers(tensors):
    return [n.removesuffix(".weight") for n, v in tensors.items() if v.dim() == 2]


def test_tables_outlive_a_sleep_of_level_2(packed, source):
    """vLLM's worker keeps a copy of all buffers then, and of nothing else that a load has made."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import reload

    read = quantize(torch.randn(8, 64))
    want = read.dequantize()
    model = load_model(packed)
    tables = tables_on(torch.device("cpu"))
    held = [table.clone() for table in tables]
    try:
        saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for table in tables:
            table.view(torch.uint8).fill_(0x5A)
        assert not torch.equal(read.dequantize(), want)
        for name, buffer in model.named_buffers():
            buffer.data.copy_(saved[name])
        assert all(map(torch.equal, tables, held))
        assert torch.equal(read.dequantize(), want)
    finally:
        for table, values in zip(tables, held, strict=True):
            table.copy_(values)

    config = EngineArgs(str(packed), skip_tokenizer_init=True, dtype="float32")
    reload.initialize_layerwise_reload(model)
    model.load_weights(iter(checkpoint_tensors(source).items()))
    reload.finalize_layerwise_reload(model, config.create_model_config())
    assert saved.keys() <= dict(model.named_buffers()).keys()
    assert not any("_table_" in name for name in model.state_dict())


REARRANGED = (
    ": vLLM's loader of this model rearranges the layer's 16-bit weight in a way that packed "
    "tensors cannot follow; convert the model again and --ignore the layer, or serve the 16-bit "
    "checkpoint with --quantization blockdialect"
)


@pytest.mark.parametrize("leaf", ["attn.c_proj", "attn.c_attn", "mlp.c_fc"])
def test_a_weight_that_the_loader_transposes_is_refused(leaf, tmp_path):
    """GPT-2 stores [in, out]; a square weight would fit, packed along the wrong axis."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=128, n_layer=1, n_head=4, vocab_size=500, n_positions=128)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    tensors = checkpoint_tensors(tmp_path / "source")
    layer = f"transformer.h.0.{leaf}"
    scheme = {"ignore": [name for name in linear_layers(tensors) if name != layer]}
    path = write(tmp_path / "packed", tmp_path / "source", pack(tensors, [layer]), scheme)
    with pytest.raises(ValueError) as caught:
        load_model(path)
    assert str(caught.value) == layer + REARRANGED


def mistral(path, seed=0):
    """(source, packed) of a model under Mistral's own names: rows of wq and wk are permuted."""
    source = build("MistralForCausalLM", path / "build", seed)
    tensors = {}
    for name, value in checkpoint_tensors(source).items():
        for part in "qk":
            name = name.replace(
                f"model.layers.0.self_attn.{part}_proj", f"layers.0.attention.w{part}"
            )
        tensors[name] = value
    layers = ["layers.0.attention.wq", "layers.0.attention.wk", "model.layers.0.self_attn.v_proj"]
    ignored = sorted(set(linear_layers(tensors)) - set(layers))
    plain = write(path / "plain", source, tensors)
    packed = write(path / "packed", source, pack(tensors, layers), {"ignore": ignored})
    return plain, packed


QKV = "model.layers.0.self_attn.qkv_proj"


def online(source):
    """What vLLM holds if it packs `QKV` of `source` while loading, after it has permuted rows."""
    others = r"re:(?!.*layers\.0\.self_attn\.[qkv]_proj)"
    options = {"quantization_config_dict_json": json.dumps({"ignore": [others]})}
    return load_model(source, quantization="blockdialect", hf_overrides=options)


def test_rows_that_the_loader_permutes(tmp_path):
    """The loader permutes rows of tensors called `weight`; the packed ones follow."""
    source, packed = mistral(tmp_path)
    model = load_model(packed)
    found, right = tensors_of(model), tensors_of(online(source))
    unpermuted = quantize(checkpoint_tensors(source)["layers.0.attention.wq.weight"], SEMANTIC_32)
    for name, plain in zip(STORED, unpermuted.stored.values(), strict=True):
        assert torch.equal(found[f"{QKV}.{name}"], right[f"{QKV}.{name}"]), name
        assert not torch.equal(found[f"{QKV}.{name}"][:128], plain), name


@pytest.mark.parametrize("mode", ["packed", "online"])
@pytest.mark.parametrize("pushed", ["16 bit", "packed"])
def test_rows_that_the_loader_permutes_in_a_push(mode, pushed, tmp_path):
    source, packed = mistral(tmp_path / "old")
    new, new_packed = mistral(tmp_path / "new", seed=1)
    model = load_model(packed) if mode == "packed" else online(source)
    stored = checkpoint_tensors(new_packed if pushed == "packed" else new).items()
    layers = ("layers.0.attention.w", "model.layers.0.self_attn.v")  # vLLM takes no others back
    tensors = [(name, value) for name, value in stored if name.startswith(layers)]
    halves = [tensors[::2], tensors[1::2]]  # a layer's tensors in two calls
    if (mode, pushed) == ("online", "packed"):  # it has not seen these names yet
        rest = [(name, value) for name, value in tensors if not name.endswith("weight_packed")]
        with pytest.raises(ValueError, match="is missing beside the layer's other packed tensors"):
            model.load_weights(iter(rest))
        halves = [tensors]
    for half in halves:
        model.load_weights(iter(half))
    found, right = tensors_of(model), tensors_of(online(new))
    for name in STORED:
        assert torch.equal(found[f"{QKV}.{name}"], right[f"{QKV}.{name}"]), name


def test_a_packed_layer_that_vllm_has_in_16_bit_is_refused(source, tmp_path):
    tensors = checkpoint_tensors(source)
    layer = "model.layers.0.self_attn.o_proj"
    scheme = {"ignore": linear_layers(tensors)}
    path = write(tmp_path / "packed", source, pack(tensors, [layer]), scheme)
    with pytest.raises(ValueError) as caught:
        load_model(path)
    assert str(caught.value) == (
        f"{layer}: the checkpoint holds this layer packed, but vLLM builds it without "
        "quantization; convert the model again and --ignore the layer"
    )


def test_a_16_bit_weight_of_a_packed_layer_is_refused(source, packed, tmp_path):
    tensors = checkpoint_tensors(packed)
    layer = "model.layers.0.self_attn.o_proj"
    for name in STORED:
        del tensors[f"{layer}.{name}"]
    tensors[f"{layer}.weight"] = checkpoint_tensors(source)[f"{layer}.weight"]
    with pytest.raises(ValueError) as caught:
        load_model(write(tmp_path / "packed", packed, tensors))
    assert str(caught.value) == (
        f"{layer}.weight: the checkpoint holds a 16-bit weight of a layer that its "
        "quantization_config calls packed; convert the model again"
    )


@pytest.mark.parametrize("quantization", [None, "blockdialect"])
@pytest.mark.parametrize("more", [32, -32])
@pytest.mark.parametrize(
    ("leaf", "fused", "rows"),
    [
        ("self_attn.q_proj", "self_attn.qkv_proj", 128),
        ("self_attn.k_proj", "self_attn.qkv_proj", 64),
        ("mlp.up_proj", "mlp.gate_up_proj", 192),
        ("mlp.down_proj", "mlp.down_proj", 128),
    ],
)
def test_rows_that_the_model_does_not_have(
    leaf, fused, rows, more, quantization, source, packed, tmp_path
):
    """A config.json with other heads: vLLM would take the first rows and serve them."""
    origin = source if quantization else packed
    tensors = checkpoint_tensors(origin)
    for name in ("weight",) if quantization else STORED:
        full = tensors[f"model.layers.0.{leaf}.{name}"]
        tensors[f"model.layers.0.{leaf}.{name}"] = torch.cat([full, full])[: rows + more]
    with pytest.raises(ValueError) as caught:
        load_model(write(tmp_path / "odd", origin, tensors), quantization=quantization)
    assert str(caught.value).startswith(f"model.layers.0.{fused}.weight")
    assert str(caught.value).endswith(
        f": the checkpoint's tensor has {rows + more} rows where the model needs {rows}; "
        "config.json belongs to another model: copy it and the weights again"
    )


INCOMPLETE = "; complete the checkpoint, or convert the model again from a complete one"


@pytest.mark.parametrize("quantization", [None, "blockdialect"])
@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (["model.norm.weight"], "model.norm.weight: the checkpoint does not hold it"),
        (
            ["model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"],
            "model.embed_tokens.weight: the checkpoint does not hold it, nor 1 more of the model's "
            "tensors",
        ),
        (["lm_head.weight"], "lm_head.weight: the checkpoint does not hold it"),
    ],
)
def test_a_tensor_that_is_not_quantized_is_missed(
    lost, message, quantization, source, packed, tmp_path
):
    """vLLM's own check is off for quantized models, which then serve memory as it was."""
    origin = source if quantization else packed
    tensors = checkpoint_tensors(origin)
    for name in lost:
        del tensors[name]
    with pytest.raises(ValueError) as caught:
        load_model(write(tmp_path / "lossy", origin, tensors), quantization=quantization)
    assert str(caught.value) == message + INCOMPLETE


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (["k_proj.bias"], "the checkpoint does not hold all of its parts"),
        (["q_proj.bias", "k_proj.bias", "v_proj.bias"], "the checkpoint does not hold it"),
    ],
)
def test_a_bias_is_missed(lost, message, tmp_path):
    source = build("Qwen2ForCausalLM", tmp_path / "source")
    convert(source, tmp_path / "packed")
    tensors = checkpoint_tensors(tmp_path / "packed")
    for name in lost:
        del tensors[f"model.layers.1.self_attn.{name}"]
    with pytest.raises(ValueError) as caught:
        load_model(write(tmp_path / "lossy", tmp_path / "packed", tensors))
    assert str(caught.value) == f"model.layers.1.self_attn.qkv_proj.bias: {message}{INCOMPLETE}"


@pytest.mark.parametrize("quantization", [None, "blockdialect"])
def test_a_tensor_that_a_loader_skips(quantization, tmp_path):
    """vLLM builds Laguna's bias of the routing inside of a module that its loader looks past."""
    config = LagunaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    source = tmp_path / "source"
    LagunaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    if not quantization:
        convert(source, tmp_path / "packed")
    with pytest.raises(ValueError) as caught:
        load_model(source if quantization else tmp_path / "packed", quantization=quantization)
    layer, name = "model.layers.1.mlp.experts", "e_score_correction_bias"
    assert str(caught.value) == (
        f"{layer}.routed_experts.{name}: vLLM's loader of this model left it empty, although the "
        f"checkpoint holds {layer}.{name}; serve it with a version of vLLM that loads this tensor"
    )


def test_a_part_of_a_16_bit_layer_is_missed(source, tmp_path):
    scheme = Scheme(ignore=["re:.*layers.0.self_attn.[qkv]_proj"])
    convert(source, tmp_path / "packed", scheme)
    tensors = checkpoint_tensors(tmp_path / "packed")
    del tensors["model.layers.0.self_attn.v_proj.weight"]
    with pytest.raises(ValueError) as caught:
        load_model(write(tmp_path / "lossy", tmp_path / "packed", tensors))
    assert str(caught.value) == (
        "model.layers.0.self_attn.qkv_proj.weight: the checkpoint does not hold all of its parts"
        + INCOMPLETE
    )


@pytest.mark.parametrize("quantization", [None, "blockdialect"])
@pytest.mark.parametrize(
    ("lost", "tensor"),
    [
        ([(2, "gate")], "w13_weight"),
        ([(2, "down")], "w2_weight"),
        ([(expert, "up") for expert in range(4)], "w13_weight"),
    ],
)
def test_a_16_bit_expert_is_missed(lost, tensor, quantization, tmp_path):
    """vLLM has one tensor for all experts of a layer; those that arrive must be all of them."""
    source = build("MixtralForCausalLM", tmp_path / "source")
    experts = {"ignore": ["re:.*\\.experts\\..*"]}
    options = {"quantization_config_dict_json": json.dumps(experts)} if quantization else {}
    if quantization is None:
        convert(source, tmp_path / "packed", ConvertOptions(experts=False))
    origin = source if quantization else tmp_path / "packed"
    tensors = checkpoint_tensors(origin)
    leaves = {"gate": "w1", "down": "w2", "up": "w3"}
    for expert, part in lost:
        del tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.{leaves[part]}.weight"]
    with pytest.raises(ValueError) as caught:
        load_model(
            write(tmp_path / "lossy", origin, tensors),
            quantization=quantization,
            hf_overrides=options,
        )
    assert str(caught.value).startswith("model.layers.1.")
    assert str(caught.value).endswith(
        f".{tensor}: the checkpoint does not hold all of its parts{INCOMPLETE}"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"ignore": ["model.layers.0.self_attn.o_porj"]},
        {"overrides": {"model.layers.0.self_attn.o_porj": {"block_size": 16}}},
    ],
)
def test_a_name_that_is_no_layer_is_refused(options, source):
    overrides = {"quantization_config_dict_json": json.dumps(options)}
    with pytest.raises(ValueError) as caught:
        load_model(source, quantization="blockdialect", hf_overrides=overrides)
    assert "'model.layers.0.self_attn.o_porj' in ignore or overrides is no layer" in str(
        caught.value
    )
    assert "similar names are model.layers.0.self_attn.o_proj" in str(caught.value)


def test_the_output_projection_may_be_ignored(source):
    """Recipes of other tools always do."""
    overrides = {"quantization_config_dict_json": json.dumps({"ignore": ["lm_head"]})}
    load_model(source, quantization="blockdialect", hf_overrides=overrides)


def test_an_architecture_that_the_table_lacks(source, tmp_path, caplog, monkeypatch):
    """vLLM serves it with LLaMA's class; its layers are the same packed and online, and told."""
    tensors = checkpoint_tensors(source)
    other = write(tmp_path / "other", source, tensors)
    edit_config(other, architectures=["TeleChat3ForCausalLM"])
    convert(other, tmp_path / "packed")
    packed = tensors_of(load_model(tmp_path / "packed"))
    logger = logging.getLogger("vllm.blockdialect")  # vLLM's import has set its loggers up by now
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)

    def ours():  # vLLM's own warnings arrive, too, once another test has run
        return [record.getMessage() for record in caplog.records if record.name == logger.name]

    with caplog.at_level("INFO", logger.name):
        load_model(tmp_path / "packed")
        assert not ours()
        online = tensors_of(load_model(other, quantization="blockdialect"))
    assert online.keys() == packed.keys()
    assert all(torch.equal(online[name], value) for name, value in packed.items())
    assert len(packed_modules(packed)) == 2 * 4
    (told,) = ours()
    leaves = ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")
    assert told.endswith(" ".join(rf"'re:model.layers.\d+.{leaf}'" for leaf in leaves))


def test_names_of_a_checkpoint_of_the_inner_model(source, tmp_path):
    """Embedding models have no ``model.`` in front of their tensors' names; vLLM's layers do."""
    tensors = {
        name.removeprefix("model."): value
        for name, value in checkpoint_tensors(source).items()
        if name != "lm_head.weight"
    }
    inner = write(tmp_path / "inner", source, tensors)
    config = json.loads((inner / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    (inner / "config.json").write_text(json.dumps(config))
    options = {
        "ignore": ["layers.0.mlp.down_proj", r"re:layers\.1\.self_attn\.o_proj"],
        "overrides": {"layers.1.mlp.down_proj": {"block_size": 64}},
    }
    overrides = {"quantization_config_dict_json": json.dumps(options)}
    model = load_model(inner, runner="pooling", quantization="blockdialect", hf_overrides=overrides)
    found = tensors_of(model)
    assert "model.layers.0.mlp.down_proj.weight" in found
    assert "model.layers.1.self_attn.o_proj.weight" in found
    assert found["model.layers.1.mlp.down_proj.weight_meta"].shape == (128, 192 // 64)
    assert found["model.layers.1.mlp.gate_up_proj.weight_meta"].shape == (384, 128 // 32)


@pytest.mark.parametrize("mode", ["packed", "online"])
@pytest.mark.parametrize("pushed", ["16 bit", "packed"])
def test_weights_pushed_into_a_loaded_model(mode, pushed, source, packed, tmp_path):
    """What trainers do between two steps: model.load_weights with names of the checkpoint."""
    other = build("LlamaForCausalLM", tmp_path / "other", seed=1)
    weights = checkpoint_tensors(other)
    quantization = "blockdialect" if mode == "online" else None
    model = load_model(source if quantization else packed, quantization=quantization)
    storage = {name: value.data_ptr() for name, value in tensors_of(model).items()}
    if pushed == "packed":
        convert(other, tmp_path / "new")
    new = checkpoint_tensors(tmp_path / "new") if pushed == "packed" else weights
    half = len(new) // 2
    for part in (list(new.items())[:half], list(new.items())[half:]):
        model.load_weights(iter(part))
    found = tensors_of(model)
    assert {name: value.data_ptr() for name, value in found.items()} == storage
    assert torch.equal(found["model.norm.weight"], weights["model.norm.weight"].float())
    modules = packed_modules(found)
    assert len(modules) == 2 * 4
    for module in modules:
        for name, value in expected_bytes(weights, module).items():
            assert torch.equal(found[name], value), name


def test_a_weight_that_cannot_be_pushed_changes_nothing(packed, source):
    model = load_model(packed)
    before = {name: value.clone() for name, value in tensors_of(model).items()}
    name = "model.layers.1.mlp.down_proj.weight"
    bad = checkpoint_tensors(source)[name].clone()
    bad[3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"down_proj\.weight: inf at \[3, 4\]"):
        model.load_weights([(name, bad)])
    after = tensors_of(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize("mode", ["packed", "online"])
@pytest.mark.parametrize("pushed", ["16 bit", "packed"])
def test_a_push_that_fails_midway_changes_nothing(mode, pushed, source, packed, tmp_path):
    other = build("LlamaForCausalLM", tmp_path / "other", seed=1)
    if pushed == "packed":
        convert(other, tmp_path / "new")
    new = checkpoint_tensors(tmp_path / "new" if pushed == "packed" else other)
    last = "model.layers.1.mlp.down_proj.weight" + ("_meta" if pushed == "packed" else "")
    bad = new.pop(last)[:, :-1]
    quantization = "blockdialect" if mode == "online" else None
    model = load_model(source if quantization else packed, quantization=quantization)
    before = {name: value.clone() for name, value in tensors_of(model).items()}
    loaders = {name: getattr(p, "weight_loader", None) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="columns where the model"):
        model.load_weights([*new.items(), (last, bad)])
    after = tensors_of(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    for name, parameter in model.named_parameters():
        assert getattr(parameter, "weight_loader", None) == loaders[name], name
    model.load_weights(iter(checkpoint_tensors(other).items()))  # and the next one arrives
    name = "model.embed_tokens.weight"
    assert not torch.equal(tensors_of(model)[name], before[name])


def test_what_a_model_copies_without_a_loader_comes_back(tmp_path):
    """GPT-OSS writes its 16-bit experts into the parameters itself."""
    source = swept_models.build("GptOssForCausalLM", tmp_path / "source")
    plain = json.dumps({"ignore": ["re:.*\\.experts\\..*"]})
    options = {"quantization_config_dict_json": plain}
    model = load_model(source, quantization="blockdialect", hf_overrides=options)
    before = {name: value.clone() for name, value in tensors_of(model).items()}
    tensors = checkpoint_tensors(source)
    new = {n: v + 0.125 for n, v in tensors.items() if "experts" in n and n.endswith("bias")}
    last = "model.layers.1.self_attn.o_proj.weight"
    bad = tensors[last][:, :-1]
    with pytest.raises(ValueError, match="columns where the model"):
        model.load_weights([*new.items(), (last, bad)])
    after = tensors_of(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    model.load_weights(iter(new.items()))
    name = "model.layers.0.mlp.experts.routed_experts.w2_bias"
    assert not torch.equal(tensors_of(model)[name], before[name])


@pytest.mark.parametrize("mode", ["packed", "online"])
def test_tensors_that_arrive_twice(mode, source, packed):
    """Blocks that share a layer: its tensors come once for each of them."""
    model, quantization = (packed, None) if mode == "packed" else (source, "blockdialect")
    expected = tensors_of(load_model(model, quantization=quantization))
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    plain = DefaultModelLoader.get_all_weights

    def twice(self, config, model):
        for name, value in plain(self, config, model):
            yield name, value
            yield name, value.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DefaultModelLoader, "get_all_weights", twice)
        found = tensors_of(load_model(model, quantization=quantization))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_block_size_fits_the_columns_of_a_rank():
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.layers.quantization import get_quantization_config

    config = get_quantization_config("blockdialect")(Scheme(serialized=False))
    prefix = "model.layers.0.mlp.down_proj"
    layer = RowParallelLinear(192, 128, bias=False, quant_config=config, prefix=prefix)
    assert layer.quant_method.spec.format.block_size == 32
    layer.input_size_per_partition = 48  # of four ranks
    assert config.get_quant_method(layer, prefix).spec.format.block_size == 16


def test_a_packed_output_projection_of_a_pooling_model(tmp_path):
    """Embeddings need none; scores that vLLM cuts out of it need its 16-bit weight."""
    source = build("Qwen3ForCausalLM", tmp_path / "source", tie_word_embeddings=False)
    convert(source, tmp_path / "packed", Scheme(lm_head=True))
    found = tensors_of(load_model(tmp_path / "packed", runner="pooling"))
    assert not any("lm_head" in name for name in found)
    assert len(packed_modules(found)) == 2 * 4
    reranker = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    with pytest.raises(ValueError, match=r"^lm_head: vLLM's loader of this model does not take"):
        load_model(tmp_path / "packed", runner="pooling", hf_overrides=reranker)


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen3Model"])
def test_an_output_projection_that_a_pooling_model_does_not_use(architecture, tmp_path):
    source = build("Qwen3ForCausalLM", tmp_path / "source", tie_word_embeddings=False)
    overrides = {
        "architectures": [architecture],
        "quantization_config_dict_json": json.dumps({"lm_head": True}),
    }
    with pytest.raises(ValueError) as caught:
        load_model(source, runner="pooling", quantization="blockdialect", hf_overrides=overrides)
    assert str(caught.value) == (
        "quantization_config: lm_head is true, but a pooling model (embeddings, scores) does not "
        "use its output projection; set lm_head to false"
    )


def test_what_vllm_notes_at_a_loader_is_noted_at_its_wrapper():
    """Llama 4 calls a loader with an expert's number only if the loader says that it takes one."""
    from dialect_plugin.vllm.parameters import shards_of, wrapped_loaders

    def loader(param, loaded_weight, weight_name, shard_id, expert_id):
        calls.append(expert_id)

    loader.supports_moe_loading = True
    calls, parameter = [], torch.nn.Parameter(torch.zeros(4, 6, 3))
    parameter.weight_loader = loader
    with wrapped_loaders([(parameter, lambda own: lambda *args: own(*args))]):
        assert parameter.weight_loader is not loader
        assert parameter.weight_loader.supports_moe_loading
        parameter.weight_loader(parameter, torch.zeros(3, 3), "name", "w1", 2)
    assert parameter.weight_loader is loader
    assert calls == [2]
    one, every = torch.zeros(3, 3), torch.zeros(4, 3, 3)
    assert shards_of(loader, parameter, one, "name", "w1", 2) == (("w1", 2),)
    assert shards_of(loader, parameter, every, "name", shard_id="w1", expert_id=0) == (
        ("w1", None),
    )
    assert shards_of(loader, parameter, one, "name", "w1", expert_id=None) == ("w1",)
