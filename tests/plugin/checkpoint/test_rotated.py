"""Rotated conversions, and other keys that version 1 lacks: bytes, config.json, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dialect_kernels import quantize
from dialect_kernels.formatbook import DIALECT_FP4, SEMANTIC_32
from dialect_plugin.checkpoint.convert import convert, render
from dialect_plugin.checkpoint.layer_choice import choose_layers
from dialect_plugin.checkpoint.reader import CheckpointError, open_checkpoint, open_packed
from dialect_plugin.cli import app
from dialect_plugin.scheme import SchemeError
from tests.support.brute_force import butterfly
from tests.support.conversions import edit_config, hashes, options_of, refused

ROTATED = "hadamard_32"
LAYER = "model.layers.0.mlp.down_proj"
OFF = {"rotation": "none"}
GATE, UP = "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])


def scheme_of(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def rotated(weight):
    """The rotated weight by the format's definition, one sum at a time."""
    return torch.from_numpy(butterfly(weight.to(torch.float32).numpy()))


@pytest.fixture(scope="module")
def packed(tiny_model, tmp_path_factory):
    destination = tmp_path_factory.mktemp("rotated") / "packed"
    options = options_of(rotation=ROTATED, book="semantic_32", overrides={GATE: OFF, UP: OFF})
    convert(tiny_model(shard="200KB"), destination, options)
    return destination


def test_the_bytes_are_those_of_the_rotated_weight(tiny_model, packed):
    weights = {}
    for file in tiny_model(shard="200KB").glob("*.safetensors"):
        weights |= load_file(file)
    found = open_packed(packed)
    for name in (LAYER, "model.layers.1.self_attn.k_proj", GATE):
        weight = weights[f"{name}.weight"]
        expected = quantize(weight if name == GATE else rotated(weight), SEMANTIC_32)
        assert found[name].rotation == ("none" if name == GATE else ROTATED)
        for stored, value in expected.stored.items():
            assert torch.equal(found[name].stored[stored], value), (name, stored)


def test_config_json_has_version_2_and_what_differs(packed):
    scheme = scheme_of(packed)
    assert scheme["format_version"] == 2
    assert scheme["rotation"] == ROTATED
    assert scheme["overrides"] == {GATE: OFF, UP: OFF}


def test_config_json_without_rotation_is_that_of_version_1(tiny_model, tmp_path):
    overrides = {"re:.*o_proj": {"block_size": 16}, "re:.*down_proj": {"rotation": "none"}}
    convert(tiny_model(), tmp_path / "packed", options_of(overrides=overrides))
    assert (
        (tmp_path / "packed" / "config.json")
        .read_text()
        .endswith(
            """\
  "quantization_config": {
    "quant_method": "blockdialect",
    "format_version": 1,
    "serialized": true,
    "book": "semantic_32",
    "block_size": 32,
    "activation_format": "dialect",
    "ignore": [
      "lm_head",
      "model.embed_tokens"
    ],
    "overrides": {
      "model.layers.0.self_attn.o_proj": {
        "block_size": 16
      },
      "model.layers.1.self_attn.o_proj": {
        "block_size": 16
      }
    },
    "lm_head": false
  }
}
"""
        )
    )


def test_inspect_and_the_card_show_it(packed):
    shown = run("inspect", packed)
    assert shown.exit_code == 0, shown.output
    first = "valid: format version 2, book semantic_32, activations dialect (W4A4), "
    assert shown.stdout.startswith(f"{first}rotation {ROTATED}\n")
    lines = shown.stdout.splitlines()
    head = next(line for line in lines if line.startswith("layer "))
    assert head.split()[:5] == ["layer", "shape", "block", "rotation", "bytes"]
    (gate,) = [line for line in lines if line.startswith("1.mlp.gate_proj")]
    assert " none " in gate
    (down,) = [line for line in lines if line.startswith("1.mlp.down_proj")]
    assert f" {ROTATED} " in down
    card = (packed / "README.md").read_text()
    assert f"| rotation | `{ROTATED}`, of weights and activations |" in card
    assert "| layer | shape | block | rotation | SQNR, dB |" in card
    assert f"| {GATE} | 256 x 128 | 32 | none | " in card
    assert f"| {LAYER} | 128 x 256 | 32 | {ROTATED} | " in card
    assert "layers differ" not in card  # in their block size


def test_the_loss_is_that_of_the_weight_rotated_back(tiny_model, tmp_path):
    result = convert(tiny_model(), tmp_path / "packed", options_of(rotation=ROTATED))
    (record,) = [layer for layer in result.layers if layer.name == LAYER]
    weight = load_file(tiny_model() / "model.safetensors")[f"{LAYER}.weight"].double()
    values = open_packed(tmp_path / "packed")[LAYER].dequantize().numpy()
    error = torch.from_numpy(butterfly(values)).double() / 32 - weight
    assert record.signal == pytest.approx(weight.square().sum().item(), rel=1e-5)
    assert record.noise == pytest.approx(error.square().sum().item(), rel=1e-4)


def test_layers_whose_columns_do_not_fit_are_not_rotated(tiny_model, tmp_path):
    source = tiny_model(intermediate_size=208)  # 13 * 16
    result = convert(source, tmp_path / "packed", options_of(rotation=ROTATED, block_size=16))
    layers = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert result.choice.unrotated == tuple(layers)
    assert result.choice.adapted == ()
    told = "the columns of these layers are not a multiple of 32, so that they are not rotated: "
    assert f"{told}model.layers.0-1.mlp.down_proj\n" in render(result)
    assert told.replace("the", "The", 1) in (tmp_path / "packed" / "README.md").read_text()
    assert scheme_of(tmp_path / "packed")["overrides"] == dict.fromkeys(layers, OFF)
    found = open_packed(tmp_path / "packed")
    assert found[LAYER].rotation == "none"
    assert found["model.layers.0.mlp.up_proj"].rotation == ROTATED
    message = (
        f"^{LAYER}: its 208 columns are not a multiple of 32, which the rotation {ROTATED} needs; "
        "override its rotation with none, ignore it, or drop --strict$"
    )
    strict = {"rotation": ROTATED, "block_size": 16, "strict": True}
    refused(source, tmp_path / "strict", message, SchemeError, **strict)
    overrides = {"re:.*down_proj": OFF}
    convert(source, tmp_path / "strict", options_of(**strict, overrides=overrides))


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("rotation", ROTATED, "none"),
        ("book", "dialect_fp4", "semantic_32"),
        ("activation_format", "fp8", "dialect"),
    ],
)
def test_parts_of_a_fused_layer_agree_in_every_key(source, tmp_path, key, value, other):
    words = key.replace("_", " ")
    message = (
        f"mlp.gate_proj {words} {other}, model.layers.1.mlp.up_proj {words} {value}: engines run "
        f"these as one matrix; give all of them the same {words}, or ignore all of them$"
    )
    refused(source, tmp_path / "x", message, SchemeError, overrides={UP: {key: value}})
    overrides = {"re:.*layers.1.mlp.(gate|up)": {key: value}}
    convert(source, tmp_path / "packed", options_of(overrides=overrides))
    scheme = scheme_of(tmp_path / "packed")
    assert scheme["format_version"] == 2
    assert scheme["overrides"] == {GATE: {key: value}, UP: {key: value}}
    assert "rotation" not in scheme


def test_each_layer_has_the_book_of_its_override(source, tmp_path):
    overrides = {"re:.*down_proj": {"book": "dialect_fp4", "activation_format": "none"}}
    convert(source, tmp_path / "packed", options_of(overrides=overrides))
    weight = load_file(source / "model.safetensors")[f"{LAYER}.weight"]
    found = open_packed(tmp_path / "packed")
    assert found[LAYER].book is DIALECT_FP4
    assert torch.equal(found[LAYER].meta, quantize(weight, DIALECT_FP4).meta)
    assert found[UP].book is SEMANTIC_32
    assert found.scheme.layer(LAYER).activation_format == "none"
    shown = run("inspect", tmp_path / "packed").stdout
    (down,) = [line for line in shown.splitlines() if line.startswith("0.mlp.down_proj")]
    assert down.split()[5:7] == ["dialect_fp4", "none"]
    (total,) = [line for line in shown.splitlines() if line.startswith("all 14 layers")]
    assert "%" not in total  # dialects of two books are not counted together


def test_a_weight_that_overflows_when_rotated_is_named_before_anything_is_written(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    weights[f"{LAYER}.weight"][5, 64:96] = 3e38
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    message = (
        rf"^{LAYER}.weight in model.safetensors: rotated by {ROTATED}, inf at \[5, 64\]; only "
        f"finite weights can be quantized: repair the checkpoint, or --ignore {LAYER}$"
    )
    refused(source, tmp_path / "x", message, CheckpointError, rotation=ROTATED)
    convert(source, tmp_path / "packed")
    weights[f"{LAYER}.weight"][5, 64:96] = 1e37  # large, and no sum overflows
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "large", options_of(rotation=ROTATED))


def test_bytes_do_not_depend_on_threads_or_groups_of_rows(tiny_model, tmp_path, monkeypatch):
    options = options_of(rotation=ROTATED)
    convert(tiny_model(), tmp_path / "whole", options, workers=1)
    monkeypatch.setattr("dialect_plugin.checkpoint.convert._CHUNK_ELEMENTS", 1000)
    convert(tiny_model(), tmp_path / "pieces", options, workers=3)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "pieces")


def test_a_finished_conversion_is_known_by_its_rotation(source, tmp_path):
    destination = tmp_path / "packed"
    convert(source, destination, options_of(rotation=ROTATED))
    assert convert(source, destination, options_of(rotation=ROTATED)).finished_before
    with pytest.raises(CheckpointError, match="not empty"):
        convert(source, destination)


def test_an_unfinished_conversion_is_continued_with_its_rotation_only(tiny_model, tmp_path):
    source, destination = tiny_model(shard="200KB"), tmp_path / "packed"
    options = options_of(rotation=ROTATED)
    convert(source, tmp_path / "whole", options)

    class StopLate:
        def begin(self, what, tensors, nbytes):
            self.left = tensors - 2 if what == "quantizing" else -1

        def advance(self, nbytes):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, destination, options, progress=StopLate())
    with pytest.raises(CheckpointError, match="another source or with other options"):
        convert(source, destination)
    assert convert(source, destination, options).resumed > 0
    assert hashes(destination) == hashes(tmp_path / "whole")


def test_a_config_that_does_not_belong_to_the_weights(packed, tmp_path):
    checkpoint = open_packed(packed).checkpoint
    copy = tmp_path / "copy"
    copy.mkdir()
    for shard in checkpoint.shards:
        (copy / shard).symlink_to(packed / shard)
    (copy / "config.json").write_text((packed / "config.json").read_text())
    edit_config(copy, quantization_config=scheme_of(packed) | {"format_version": 1})
    with pytest.raises(SchemeError, match=r"format_version is 1; rotation, .* need version 2"):
        open_packed(copy)
    edit_config(copy, quantization_config=scheme_of(packed) | {"format_version": 3})
    with pytest.raises(SchemeError, match="reads versions up to 2; upgrade blockdialect"):
        open_packed(copy)


def test_a_rotated_weight_of_other_columns_is_refused(tmp_path, tiny_model):
    source = tiny_model(intermediate_size=208)
    convert(source, tmp_path / "packed", options_of(block_size=16))
    scheme = scheme_of(tmp_path / "packed") | {"format_version": 2, "rotation": ROTATED}
    edit_config(tmp_path / "packed", quantization_config=scheme)
    with pytest.raises(CheckpointError, match=rf"layer {LAYER}: .*208 columns; rotation"):
        open_packed(tmp_path / "packed").read(LAYER)


def test_fp8_engines_cannot_rotate(packed, tmp_path):
    done = run("export", packed, tmp_path / "fp8")
    assert done.exit_code == 1
    assert done.stderr.startswith(
        f"blockdialect: {packed}: the layer {open_packed(packed).layers[0]} has the rotation "
        f"{ROTATED}, and engines that serve FP8 do not rotate its input; "
    )
    assert not (tmp_path / "fp8").exists()


def test_the_command_takes_a_rotation_and_keys_of_overrides(tiny_model, tmp_path):
    done = run(
        "quantize",
        tiny_model(),
        tmp_path / "packed",
        *("--rotation", ROTATED),
        *("--override", "re:.*o_proj=16"),
        *("--override", "re:.*o_proj=rotation:none"),
        *("--override", "re:.*down_proj=activation_format:fp8"),
    )
    assert done.exit_code == 0, done.output
    scheme = scheme_of(tmp_path / "packed")
    assert scheme["rotation"] == ROTATED
    assert scheme["overrides"]["model.layers.0.self_attn.o_proj"] == {"block_size": 16, **OFF}
    assert scheme["overrides"][LAYER] == {"activation_format": "fp8"}
    for override in ("x=rotation:x", "x=window:3", "x=block_size:48", "x=book:", "=16"):
        done = run("quantize", tiny_model(), tmp_path / "x", "--override", override)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"blockdialect: --override: {override!r}; it must be PATTERN")


def test_report_and_plan_measure_rotated_weights(tiny_model, tmp_path):
    few = ("--targets", "re:.*down_proj", "--all-rows")
    shown = run("report", tiny_model(), "--rotation", ROTATED, "--json", *few)
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["rotation"] == ROTATED
    (layer,) = [entry for entry in found["layers"] if entry["name"] == LAYER]
    weight = load_file(tiny_model() / "model.safetensors")[f"{LAYER}.weight"]
    error = (quantize(rotated(weight), SEMANTIC_32).dequantize() - rotated(weight)).double()
    assert layer["signal"] == pytest.approx(weight.double().square().sum().item(), rel=1e-4)
    noise = layer["losses"]["BlockDialect-32"]["noise"]
    assert noise == pytest.approx(error.square().sum().item() / 32, rel=1e-4)
    table = run("report", tiny_model(), "--rotation", ROTATED, *few).stdout
    assert table.startswith(f"SQNR of the weights, rotated by {ROTATED}, in dB\n")
    file = tmp_path / "overrides.json"
    arguments = ("--bits", "4.35", "--rotation", ROTATED, "-o", file, *few)
    planned = run("plan", tiny_model(), *arguments)
    assert planned.exit_code == 0, planned.output
    assert f"--overrides {file} --rotation {ROTATED}" in planned.stdout


def test_the_choice_is_one_packed_format_for_each_layer(tiny_model):
    choice = choose_layers(open_checkpoint(tiny_model()), options_of(rotation=ROTATED))
    assert set(choice.formats.values()) == {("semantic_32", 32, "dialect", ROTATED)}
