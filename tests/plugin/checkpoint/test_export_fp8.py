"""Exported FP8 checkpoints: the same weights bit for bit, readable by code that is not ours."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from dialect_kernels import reference
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.export_fp8 import export_fp8
from dialect_plugin.checkpoint.options import ConvertOptions
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import CheckpointError, open_packed
from dialect_plugin.cli import app
from dialect_plugin.scheme import Scheme
from tests.support.conversions import edit_config

OPTIONS = {
    "ignore": ["re:.*layers\\.1\\.self_attn"],
    "overrides": {"re:.*down_proj": {"block_size": 16}},
}


def packed_checkpoint(source, destination, **options):
    convert(source, destination, Scheme.parse(options), workers=1)
    return open_packed(destination)


@pytest.fixture(scope="module", params=["dialect_fp4", "semantic_32"])
def packed(request, tiny_model, tmp_path_factory):
    destination = tmp_path_factory.mktemp("packed") / "model"
    return packed_checkpoint(tiny_model(shard="200KB"), destination, book=request.param, **OPTIONS)


@pytest.fixture(scope="module")
def exported(packed, tmp_path_factory):
    destination = tmp_path_factory.mktemp("exported") / "fp8"
    result = export_fp8(packed, destination, Silent())
    assert result.destination == destination
    assert result.layers == len(packed.layers) == 10
    return destination


def tensors_of(directory):
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def test_weights_are_the_packed_ones_bit_for_bit(packed, exported):
    tensors = tensors_of(exported)
    for name in packed.layers:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert weight.dtype == torch.float8_e4m3fn
        assert (scale.dtype, scale.shape) == (torch.float32, (weight.shape[0], 1))
        values = weight.to(torch.float64) * scale.to(torch.float64)
        expected = packed.read(name).dequantize(torch.float32)
        assert torch.equal(values, expected.to(torch.float64))
        assert torch.equal(values.to(torch.float32).view(torch.int32), expected.view(torch.int32))


def test_everything_else_is_as_in_the_source(packed, exported):
    tensors = tensors_of(exported)
    source = tensors_of(packed.checkpoint.path)
    plain = {k: v for k, v in source.items() if not k.rpartition(".")[2].startswith("weight_")}
    suffixes = (".weight", ".weight_scale")
    written = {layer + suffix for layer in packed.layers for suffix in suffixes}
    assert set(tensors) == set(plain) | written
    assert all(torch.equal(tensors[name], value) for name, value in plain.items())
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    for file in ("tokenizer.json", "generation_config.json"):
        assert (exported / file).read_bytes() == (packed.checkpoint.path / file).read_bytes()


def test_compressed_tensors_dequantizes_it_to_the_same_values(packed, exported):
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    args = QuantizationConfig.model_validate(config).config_groups["group_0"].weights
    tensors = tensors_of(exported)
    for name in packed.layers:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        values = dequantize(weight, scale, args=args, dtype=torch.float32)
        assert torch.equal(values, packed.read(name).dequantize(torch.float32))


def test_vllm_takes_it_as_fp8_and_leaves_the_ignored_layers_alone(packed, exported):
    data = json.loads((exported / "config.json").read_text())["quantization_config"]
    config = CompressedTensorsConfig.from_config(data)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    linear = torch.nn.Linear(1, 1)
    for name in packed.layers:
        scheme = config.get_scheme_dict(linear, name)
        assert config._is_fp8_w8a8(scheme["weights"], scheme["input_activations"])
        assert config._is_dynamic_token_w8a8(scheme["weights"], scheme["input_activations"])
    assert config.get_scheme_dict(linear, "model.layers.0.self_attn.qkv_proj") is not None
    for name in ("lm_head", "model.layers.1.self_attn.qkv_proj", "model.layers.1.self_attn.o_proj"):
        assert config.get_scheme_dict(linear, name) is None


def test_tied_output_projection_and_experts_are_left_alone(tiny_model, tmp_path):
    tied = packed_checkpoint(tiny_model(tie_word_embeddings=True), tmp_path / "tied")
    export_fp8(tied, tmp_path / "tied_fp8", Silent())
    config = json.loads((tmp_path / "tied_fp8" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["model.embed_tokens", "lm_head"]
    assert not (tmp_path / "tied_fp8" / "model.safetensors.index.json").exists()

    convert(tiny_model("MixtralForCausalLM"), tmp_path / "mixture", ConvertOptions(experts=False))
    mixture = open_packed(tmp_path / "mixture")
    export_fp8(mixture, tmp_path / "mixture_fp8", Silent())
    config = json.loads((tmp_path / "mixture_fp8" / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert "re:.*\\.experts\\..*" in ignored
    assert not [name for name in ignored if ".experts." in name and not name.startswith("re:")]


def test_experts_have_the_names_and_the_bytes_that_engines_read(tiny_model, tmp_path):
    """Half of them: those of the other decoder layer stay in 16 bit."""
    mixture = packed_checkpoint(
        tiny_model("MixtralForCausalLM"), tmp_path / "mixture", ignore=["re:.*layers.1.*experts"]
    )
    export_fp8(mixture, tmp_path / "fp8", Silent())
    tensors = tensors_of(tmp_path / "fp8")
    experts = "model.layers.{}.block_sparse_moe.experts.{}.{}"
    for number in range(4):
        for part, leaf in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            name = experts.format(0, number, leaf)
            weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
            expected = mixture.read(experts.format(0, number, part)).dequantize(torch.float32)
            assert weight.dtype == torch.float8_e4m3fn
            assert torch.equal(weight.float() * scale, expected)
            assert tensors[experts.format(1, number, leaf) + ".weight"].dtype == torch.bfloat16
    assert not [name for name in tensors if name.endswith("gate_proj.weight")]
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config = CompressedTensorsConfig.from_config(config["quantization_config"])
    linear = torch.nn.Linear(1, 1)
    assert config.get_scheme_dict(linear, experts.format(0, 2, "w1")) is not None
    assert config.get_scheme_dict(linear, experts.format(1, 2, "w1")) is None


def test_experts_that_engines_do_not_read_one_by_one_are_refused(tiny_model, tmp_path):
    packed_checkpoint(tiny_model("MixtralForCausalLM"), tmp_path / "mixture")
    edit_config(tmp_path / "mixture", architectures=["GraniteMoeForCausalLM"])
    with pytest.raises(
        CheckpointError,
        match=r"is one of an expert, .* FP8 experts of GraniteMoeFor.* with --no-experts",
    ):
        export_fp8(open_packed(tmp_path / "mixture"), tmp_path / "fp8", Silent())
    assert not (tmp_path / "fp8").exists()


def test_a_destination_that_holds_something_is_refused(packed, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty; choose another directory"):
        export_fp8(packed, tmp_path, Silent())
    with pytest.raises(CheckpointError, match="is a file; choose a directory"):
        export_fp8(packed, kept, Silent())
    with pytest.raises(CheckpointError, match="is the source or overlaps it"):
        export_fp8(packed, packed.checkpoint.path / "inside", Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "mine"


def test_a_failing_disk_leaves_no_checkpoint_and_a_rerun_succeeds(packed, tmp_path, monkeypatch):
    calls = []

    def fail_at_the_second(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save_file(*arguments, **keywords)

    monkeypatch.setattr("dialect_plugin.checkpoint.export_fp8.save_file", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        export_fp8(packed, tmp_path / "fp8", Silent())
    assert not (tmp_path / "fp8").exists()
    monkeypatch.undo()
    export_fp8(packed, tmp_path / "fp8", Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]
    assert len(tensors_of(tmp_path / "fp8")) == len(tensors_of(packed.checkpoint.path)) - 10


def test_a_damaged_weight_is_named(packed, tmp_path):
    damaged = shutil.copytree(packed.checkpoint.path, tmp_path / "damaged")
    layer = packed.layers[0]
    shard = damaged / packed.checkpoint.tensors[f"{layer}.weight_row_exponent"].shard
    tensors = load_file(shard)
    tensors[f"{layer}.weight_row_exponent"][3] = -128
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=rf"{layer}.weight_row_exponent: -128 at \[3\]"):
        export_fp8(open_packed(damaged), tmp_path / "fp8", Silent())
    assert not (tmp_path / "fp8").exists()


def test_the_command(packed, tmp_path):
    arguments = ["export", str(packed.checkpoint.path), str(tmp_path / "fp8")]
    refused = CliRunner().invoke(app, [*arguments, "--to", "int8"])
    assert refused.exit_code == 1
    assert refused.stderr.strip().endswith("--to: 'int8'; it must be fp8")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert "10 layers in FP8, no weight changed" in done.stdout
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "is not empty" in again.stderr


PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


@pytest.mark.slow
def test_layers_of_stock_vllm_compute_what_w4a8_says(tiny_model, tmp_path):
    """vLLM's own FP8 layers, which know nothing of dialects, as an oracle for W4A8.

    The activations are E4M3 numbers with the maximum 448 in every row, so that their scale is 1 and
    both sides multiply the same operands; what is left is the order of float32 additions and one
    rounding to bf16 on each side.
    """
    packed = packed_checkpoint(tiny_model(), tmp_path / "packed")
    export_fp8(packed, tmp_path / "fp8", Silent())
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(tmp_path / "fp8"),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=64,
        skip_tokenizer_init=True,
    )
    try:
        (compared,) = llm.apply_model(lambda model: _compare_layers(model, packed))
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    assert compared == set(packed.layers)


def _compare_layers(model, packed):
    """Compare every packed layer and return the names of those that agree."""
    agree = set()
    for number, block in enumerate(model.model.layers):
        for module, names in PARTS.items():
            parts = {name: packed.read(f"model.layers.{number}.{name}") for name in names}
            columns = next(iter(parts.values())).shape[1]
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(5, columns, generator=generator) * 50
            x[:, 7] = 448
            x = x.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.bfloat16)
            outputs = block.get_submodule(module)(x)[0]
            assert outputs.dtype == torch.bfloat16
            outputs = outputs.float().split([p.shape[0] for p in parts.values()], dim=1)
            for (name, p), output in zip(parts.items(), outputs, strict=True):
                expected = reference.dialect_linear(x, p, None, "fp8", "exact").float()
                magnitude = x.float().abs() @ p.dequantize().abs().T
                allowed = 2**-8 * expected.abs() + 2**-20 * magnitude
                if bool(((output - expected).abs() <= allowed).all()):
                    agree.add(f"model.layers.{number}.{name}")
    return agree
