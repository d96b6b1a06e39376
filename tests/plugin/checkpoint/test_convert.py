"""Conversion: what is written, what is refused, and that nothing is written when it is."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dialect_kernels import DIALECT_FP4, quantize
from dialect_kernels.layer_names import matches
from dialect_plugin import architectures
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.layer_choice import ConvertOptions
from dialect_plugin.checkpoint.reader import JOURNAL, CheckpointError, open_packed
from dialect_plugin.cli import app
from dialect_plugin.scheme import SchemeError
from tests.support.tiny_models import CONFIGS

QUANTIZED_IN_TWO_LAYERS = {
    "Phi3ForCausalLM": 8,
    "OPTForCausalLM": 12,
    "MixtralForCausalLM": 8,
}


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}


@pytest.fixture
def source(tiny_model, tmp_path):
    """A copy of the tiny LLaMA that a test may damage."""
    return Path(shutil.copytree(tiny_model(), tmp_path / "source"))


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def refused(source, destination, match, error=CheckpointError, **options):
    """The conversion fails with one sentence and leaves no trace."""
    with pytest.raises(error, match=match) as caught:
        convert(source, destination, ConvertOptions.model_validate(options))
    assert "\n" not in str(caught.value)
    assert not destination.exists()


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_every_architecture_of_the_table(architecture, tiny_model, tmp_path):
    source = tiny_model(architecture)
    result = convert(source, tmp_path / "packed")
    weights = load_file(source / "model.safetensors")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    layers = {layer.name for layer in result.layers}
    assert len(layers) == QUANTIZED_IN_TWO_LAYERS.get(architecture, 14)
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            expected = quantize(weight, DIALECT_FP4)
            assert torch.equal(stored[f"{layer}.weight_packed"], expected.codes)
            assert torch.equal(stored[f"{layer}.weight_meta"], expected.meta)
            assert torch.equal(stored[f"{layer}.weight_row_exponent"], expected.row_exponent)
            assert name not in stored
        else:
            assert torch.equal(stored[name], weight)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "blockdialect"
    assert (tmp_path / "packed" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    card = (tmp_path / "packed" / "README.md").read_text()
    assert architecture in card
    assert "vllm serve" in card
    assert set(open_packed(tmp_path / "packed").layers) == layers


def test_table_covers_what_is_tested():
    untested = set(architectures.ARCHITECTURES) - set(CONFIGS)
    assert untested == {"Gemma3ForConditionalGeneration"}  # the same text layers, in front a tower
    name = "model.language_model.layers.3.mlp.up_proj"
    assert architectures.is_default_layer("Gemma3ForConditionalGeneration", name)
    tower = "model.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj"
    assert not architectures.is_default_layer("Gemma3ForConditionalGeneration", tower)


def test_shards_overrides_and_ignored_layers(tiny_model, tmp_path):
    source = tiny_model(shard="200KB")
    options = ConvertOptions.model_validate(
        {
            "ignore": ["model.layers.0.self_attn.o_proj"],
            "overrides": {"re:.*down_proj": {"block_size": 16}},
            "block_size": 64,
            "lm_head": True,
        }
    )
    convert(source, tmp_path / "packed", options)
    packed = open_packed(tmp_path / "packed")
    assert len(packed.checkpoint.shards) > 3
    assert {p.name for p in source.glob("*.safetensors")} == set(packed.checkpoint.shards)
    assert "model.layers.0.self_attn.o_proj" not in packed.layers
    assert packed.read("model.layers.1.mlp.down_proj").block_size == 16
    assert packed.read("model.layers.1.mlp.up_proj").block_size == 64
    assert "lm_head" in packed.layers
    scheme = packed.scheme
    assert "model.layers.0.self_attn.o_proj" in scheme.ignore
    assert set(scheme.overrides) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}


def test_columns_that_do_not_divide_are_adapted_or_left(tiny_model, tmp_path):
    source = tiny_model(intermediate_size=208)  # 208 = 13 * 16
    result = convert(source, tmp_path / "packed")
    assert set(result.plan.adapted) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert open_packed(tmp_path / "packed").read("model.layers.0.mlp.down_proj").block_size == 16
    refused(source, tmp_path / "strict", "208 columns", SchemeError, strict=True)
    odd = tiny_model(intermediate_size=200)
    result = convert(odd, tmp_path / "odd")
    assert set(result.plan.indivisible) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert "model.layers.0.mlp.down_proj" in result.plan.scheme.ignore


def test_bytes_do_not_depend_on_threads(tiny_model, tmp_path):
    for workers in (1, 2, 5):
        convert(tiny_model(shard="200KB"), tmp_path / str(workers), workers=workers)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2") == hashes(tmp_path / "5")


def test_unknown_architecture_lists_candidates_and_takes_targets(source, tmp_path):
    edit_config(source, architectures=["NewForCausalLM"])
    refused(source, tmp_path / "packed", r"'NewForCausalLM' is not known.*--targets.*q_proj")
    options = ConvertOptions(targets=[r"re:.*\.mlp\..*"])
    assert len(convert(source, tmp_path / "packed", options).layers) == 6
    everything = convert(source, tmp_path / "all", ConvertOptions(targets=["re:.*"]))
    assert len(everything.layers) == 14  # never the embeddings or the output projection
    targets = ["model.embed_tokens"]
    refused(source, tmp_path / "x", "engines read in 16 bit", SchemeError, targets=targets)


def test_candidates_are_linear_layers_of_numbered_blocks():
    names = [
        "transformer.wte",
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.ln_1",
        "transformer.h.0.moe.experts.3.w1",
        "transformer.h.0.moe.gate",
        "vision_tower.layers.0.fc1",
        "lm_head",
    ]
    assert architectures.candidate_layers(names) == ["transformer.h.0.attn.c_attn"]
    pattern = architectures.decoder_layer_pattern("transformer.h.0.attn.c_attn")
    assert pattern == r"re:transformer.h.\d+.attn.c_attn"
    assert matches(pattern, "transformer.h.17.attn.c_attn")


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
    assert result.plan.has_experts


def test_refusals(source, tmp_path):
    destination = tmp_path / "packed"
    for pattern in ("q_porj", r"re:.*\.q_porj$"):
        near = "matches no layer; near it are model.layers.0.self_attn.q_proj"
        refused(source, destination, near, SchemeError, ignore=[pattern])
    refused(source, destination, "matches no layer; give", SchemeError, ignore=["xyz"])
    near = "near it are model.layers"
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(source, tmp_path, dtype):
    weights = {k: v.to(dtype) for k, v in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors")
    convert(source, tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(stored[f"{name}.weight_packed"], quantize(weights[f"{name}.weight"]).codes)
    assert stored["model.embed_tokens.weight"].dtype == dtype


def test_a_layer_is_converted_piece_by_piece(tiny_model, tmp_path, monkeypatch):
    convert(tiny_model(), tmp_path / "whole")
    monkeypatch.setattr(
        "dialect_plugin.checkpoint.convert._CHUNK_ELEMENTS", 1000
    )  # 7 or 3 rows at a time
    monkeypatch.setattr("dialect_plugin.checkpoint.convert._COPY_BYTES", 1000)
    convert(tiny_model(), tmp_path / "pieces")
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "pieces")


def test_rows_below_the_window_are_reported(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name][2, :32] *= 2.0**-30  # becomes zeros
    weights[name][9, :32] *= 2.0**-16  # is rounded at the window's edge
    weights[name][11, :32] *= 2.0**-8  # inside the window
    weights[name][13, :32] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    result = convert(source, tmp_path / "packed")
    below = {x.name: x.rows_below_window for x in result.layers if x.rows_below_window}
    assert below == {name.removesuffix(".weight"): 2}
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "model.layers.0.mlp.down_proj (2 rows)" in card


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(source, tmp_path, value):
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 17] = value
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    refused(source, tmp_path / "packed", r"model.layers.1.mlp.down_proj.weight.*at \[3, 17\]")
    ignored = ConvertOptions(ignore=["model.layers.1.mlp.down_proj"])
    assert convert(source, tmp_path / "packed", ignored).layers


def test_pickled_weights_are_refused_with_the_remedy(source, tmp_path):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, tmp_path / "packed", "pytorch_model.bin.*save_pretrained")


def test_python_files_are_never_copied(source, tmp_path):
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "LICENSE.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    edit_config(source, auto_map={"AutoModel": "modeling.Model"})
    convert(source, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("*.py"))
    assert not list((tmp_path / "packed").glob("*.index.json"))
    assert "auto_map" not in json.loads((tmp_path / "packed" / "config.json").read_text())


def test_a_destination_in_use_is_refused_unless_overwritten(source, tmp_path):
    destination = tmp_path / "packed"
    destination.mkdir()
    (destination / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(source, destination)
    assert [p.name for p in destination.iterdir()] == ["mine.txt"]
    convert(source, destination, overwrite=True)
    assert not (destination / "mine.txt").exists()
    (destination / "photos").mkdir()
    with pytest.raises(CheckpointError, match="holds the directory photos"):
        convert(source, destination, overwrite=True)
    assert (destination / "config.json").exists()
    for inside in (source, source / "sub", tmp_path):
        with pytest.raises(CheckpointError, match="overlaps"):
            convert(source, inside)


def test_another_unfinished_conversion_is_not_continued(tiny_model, tmp_path):
    source, destination = tiny_model(), tmp_path / "packed"
    convert(source, destination)
    before = hashes(destination)
    (destination / JOURNAL).write_text(json.dumps({"fingerprint": "other", "shards": {}}))
    with pytest.raises(CheckpointError, match="unfinished conversion; run the same"):
        open_packed(destination)
    with pytest.raises(CheckpointError, match="unfinished conversion of another source"):
        convert(source, destination)
    (destination / JOURNAL).unlink()
    assert hashes(destination) == before


class TestIndex:
    """Faults of model.safetensors.index.json and of the files it names."""

    @pytest.fixture
    def sharded(self, tiny_model, tmp_path):
        return Path(shutil.copytree(tiny_model(shard="200KB"), tmp_path / "source"))

    def edit(self, source, change):
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    @pytest.mark.parametrize("name", ["../x.safetensors", "/x", "a/b", "..", "", "a\\b", 3])
    def test_a_name_that_leaves_the_directory(self, sharded, tmp_path, name):
        self.edit(sharded, lambda names: names.update({next(iter(names)): name}))
        refused(sharded, tmp_path / "packed", "must be the name of a file in the same directory")

    @pytest.mark.parametrize("name", ["config.json", "README.md", "model.bin"])
    def test_a_name_of_something_else(self, sharded, tmp_path, name):
        self.edit(sharded, lambda names: names.update({next(iter(names)): name}))
        refused(sharded, tmp_path / "packed", "that ends in .safetensors")

    def test_a_missing_shard(self, sharded, tmp_path):
        next(iter(sharded.glob("*-00002-*"))).unlink()
        refused(sharded, tmp_path / "packed", "00002.*is missing")

    def test_a_tensor_that_is_not_where_it_is_said_to_be(self, sharded, tmp_path):
        self.edit(sharded, lambda names: names.update({"ghost.weight": min(names.values())}))
        refused(sharded, tmp_path / "packed", "ghost.weight.*does not hold it")

    def test_a_tensor_that_is_not_listed(self, sharded, tmp_path):
        self.edit(sharded, lambda names: names.pop("model.norm.weight"))
        refused(sharded, tmp_path / "packed", "does not list model.norm.weight")

    def test_a_tensor_that_is_there_twice(self, sharded, tmp_path):
        (sharded / "model.safetensors.index.json").unlink()
        save_file({"model.norm.weight": torch.ones(4)}, sharded / "extra.safetensors")
        refused(sharded, tmp_path / "packed", "model.norm.weight is in .* and again in")

    def test_a_key_that_is_there_twice(self, sharded, tmp_path):
        (sharded / "config.json").write_text('{"architectures": ["A"], "architectures": ["B"]}')
        refused(sharded, tmp_path / "packed", "'architectures' is given 2 times")


class TestCommand:
    """The command line: exit codes, one sentence, no traceback."""

    def run(self, *arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    def test_quantize_and_inspect(self, tiny_model, tmp_path):
        override = ["--override", "re:.*down_proj=16"]
        done = self.run("quantize", tiny_model(), tmp_path / "packed", *override)
        assert done.exit_code == 0, done.output
        assert "14 layers at" in done.output
        seen = self.run("inspect", tmp_path / "packed")
        assert seen.exit_code == 0, seen.output
        assert "valid: format version 1" in seen.output

    def test_an_overrides_file(self, tiny_model, tmp_path):
        file = tmp_path / "overrides.json"
        file.write_text('{"model.layers.0.mlp.down_proj": {"block_size": 16}}')
        done = self.run("quantize", tiny_model(), tmp_path / "packed", "--overrides", file)
        assert done.exit_code == 0, done.output
        assert (
            open_packed(tmp_path / "packed").read("model.layers.0.mlp.down_proj").block_size == 16
        )

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--block-size", "48"], "--block-size: 48; it must be 16, 32 or 64"),
            (["--book", "x"], "--book: 'x'; it must be 'dialect_fp4' or 'semantic_32'"),
            (["--override", "down_proj"], "--override: 'down_proj'; it must be PATTERN=BLOCK_SIZE"),
            (["--ignore", "re:("], "is not a regular expression"),
        ],
    )
    def test_bad_options(self, tiny_model, tmp_path, arguments, sentence):
        done = self.run("quantize", tiny_model(), tmp_path / "packed", *arguments)
        assert done.exit_code == 1
        assert sentence in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.output
        assert not (tmp_path / "packed").exists()

    def test_a_hub_id_without_a_network(self, tmp_path):
        done = self.run("quantize", "organisation/model", tmp_path / "packed")
        assert done.exit_code == 1
        assert done.stderr.startswith("blockdialect: organisation/model: is no directory here")
        assert done.stderr.count("\n") == 1

    def test_usage(self):
        assert self.run("quantize").exit_code == 2

    def test_verify(self):
        done = self.run("verify")
        assert done.exit_code == 0, done.output
        assert "agree with the golden vectors" in done.output
