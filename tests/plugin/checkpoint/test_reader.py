"""Reading packed checkpoints: every fault is ours to name, and nothing crashes or hangs."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dialect_kernels import SEMANTIC_32, PackedTensor, quantize
from dialect_plugin import open_packed as open_directory
from dialect_plugin.checkpoint.convert import convert, render
from dialect_plugin.checkpoint.inspection import inspect_checkpoint
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import PACKED_SUFFIXES, CheckpointError, open_packed
from dialect_plugin.scheme import Scheme, SchemeError
from tests.support.conversions import refused

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def packed_model(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model"
    convert(tiny_model(), path)
    return path


@pytest.fixture
def packed(packed_model, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(packed_model, tmp_path / "packed"))


def read_all(path):
    return inspect_checkpoint(path, Silent())


def fault_of(path):
    """The sentence a reader says of it, or an empty one; an error not of ours goes through."""
    try:
        read_all(path)
    except ValueError as error:
        return str(error)
    return ""


def damage(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_a_sound_one_is_read(packed):
    found = read_all(packed)
    assert len(found.layers) == 14
    assert found.bits_per_weight == pytest.approx(4.25 + 8 / 128, abs=0.05)


def test_reserved_deltas_are_named_by_position(tiny_model, tmp_path):
    """In the book of 16; the other one uses every byte."""
    packed = tmp_path / "packed"
    convert(tiny_model(), packed, Scheme(book="dialect_fp4"))

    def change(tensors):
        tensors[f"{LAYER}.weight_meta"][2, 3] = 14 << 4 | 5

    damage(packed, change)
    with pytest.raises(ValueError, match=rf"{LAYER}.weight_meta.*\[2, 3\].*reserved delta 14"):
        read_all(packed)


@pytest.mark.parametrize("value", [-128, -121, 126, 127])
def test_row_exponents_out_of_range(packed, value):
    def change(tensors):
        tensors[f"{LAYER}.weight_row_exponent"][7] = value

    damage(packed, change)
    with pytest.raises(ValueError, match=rf"{LAYER}.weight_row_exponent: {value} at \[7\]"):
        read_all(packed)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_meta"), "weight_meta is missing"),
        (lambda t: t.update({f"{LAYER}.weight_meta": torch.zeros(4, 4)}), "must be torch.uint8"),
        (
            lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(256, 32, dtype=torch.uint8)}),
            "does not fit",
        ),
        (lambda t: t.update({f"{LAYER}.weight": torch.zeros(256, 128)}), "stored packed although"),
    ],
)
def test_wrong_tensors(packed, change, match):
    damage(packed, change)
    with pytest.raises(CheckpointError, match=match):
        read_all(packed)


def test_the_scheme_and_the_tensors_must_agree(packed):
    original = json.loads((packed / "config.json").read_text())

    def fault(**changes):
        config = {**original, "quantization_config": original["quantization_config"] | changes}
        (packed / "config.json").write_text(json.dumps(config))
        return fault_of(packed)

    assert "does not fit" in fault(overrides={LAYER: {"block_size": 16}})
    assert "no such layer is packed" in fault(overrides={"absent": {"block_size": 16}})
    assert "lm_head is packed, but it is not" in fault(lm_head=True)
    assert "although config.json ignores it" in fault(ignore=[LAYER])
    assert fault() == ""

    def keep_one_in_16_bit(tensors):
        for suffix in PACKED_SUFFIXES:
            tensors.pop(LAYER + suffix)
        tensors[f"{LAYER}.weight"] = torch.zeros(256, 128, dtype=torch.bfloat16)

    damage(packed, keep_one_in_16_bit)
    assert "config.json does not ignore it" in fault()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"surprise": 1}, "the key 'surprise' is not known"),
        ({"block_size": "32"}, "block_size is '32'"),
        ({"format_version": 3}, "upgrade blockdialect"),
        ({"format_version": 0}, "versions begin at 1"),
        ({"book": "other"}, "it must be 'dialect_fp4' or 'semantic_32'"),
        ({"serialized": False}, "serialized is false"),
        ({"overrides": {"a": {"block_size": 8}}}, "overrides.a.block_size is 8"),
        ({"overrides": {"a": {"window": 8}}}, "'overrides.a.window' is not known"),
    ],
)
def test_wrong_schemes(packed, change, match):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= change
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(SchemeError, match=match) as caught:
        read_all(packed)
    assert "\n" not in str(caught.value)


def test_a_16_bit_checkpoint_is_not_packed(tiny_model):
    with pytest.raises(CheckpointError, match="make one with blockdialect quantize"):
        read_all(tiny_model())


def test_truncated_files(packed):
    file = packed / "model.safetensors"
    whole = file.read_bytes()
    for i in range(64):
        file.write_bytes(whole[: len(whole) * i // 64])
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            read_all(packed)


def test_single_flipped_bits_in_the_header(packed):
    file = packed / "model.safetensors"
    whole = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    sentences = []
    for _ in range(200):
        bit = draw.randrange(header * 8)
        whole[bit // 8] ^= 1 << bit % 8
        file.write_bytes(whole)
        sentences.append(fault_of(packed))
        whole[bit // 8] ^= 1 << bit % 8
    sentences = [sentence for sentence in sentences if sentence]
    assert len(sentences) > 150
    assert not [sentence for sentence in sentences if "\n" in sentence]


def test_a_tensor_that_a_header_names_twice(packed):
    entry = '"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    file = packed / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "the key 'a' is given 2 times" in fault_of(packed)


def test_a_header_of_a_length_beyond_reason(packed):
    (packed / "model.safetensors").write_bytes((2**63 - 1).to_bytes(8, "little") + b"{}")
    assert "cannot be read as safetensors" in fault_of(packed)


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

    def test_tensors_are_where_the_headers_say(self, sharded, tmp_path):
        """Engines read the files; an index that is wrong about single tensors stops nothing."""
        first, *_ = sorted(p.name for p in sharded.glob("*.safetensors"))
        norm, moved = "model.norm.weight", "model.layers.0.input_layernorm.weight"
        self.edit(sharded, lambda names: names.update({"ghost.weight": first, moved: first}))
        self.edit(sharded, lambda names: names.pop(norm))
        result = convert(sharded, tmp_path / "packed")
        assert result.unheld == ("ghost.weight",)
        assert "no file holds: ghost.weight" in render(result)
        packed = open_packed(tmp_path / "packed").checkpoint
        assert {moved, norm} < set(packed.tensors)
        written = json.loads((packed.path / "model.safetensors.index.json").read_text())
        assert written["weight_map"] == {n: info.shard for n, info in packed.tensors.items()}

    def test_a_packed_checkpoint_lacks_nothing_of_its_index(self, sharded, tmp_path):
        convert(sharded, tmp_path / "packed")
        first, *_ = sorted(p.name for p in sharded.glob("*.safetensors"))
        self.edit(tmp_path / "packed", lambda names: names.update({"ghost.weight": first}))
        assert "lists ghost.weight, which no file holds" in fault_of(tmp_path / "packed")

    def test_a_tensor_that_is_there_twice(self, sharded, tmp_path):
        (sharded / "model.safetensors.index.json").unlink()
        save_file({"model.norm.weight": torch.ones(4)}, sharded / "extra.safetensors")
        refused(sharded, tmp_path / "packed", "model.norm.weight is in .* and again in")

    def test_of_a_key_that_is_there_twice_the_last_counts(self, sharded, tmp_path):
        """As in every other reader of JSON."""
        config = (sharded / "config.json").read_text()
        (sharded / "config.json").write_text('{"architectures": ["B"], ' + config.lstrip("{ \n"))
        assert convert(sharded, tmp_path / "packed").layers
        assert (tmp_path / "packed" / "config.json").read_text().count("architectures") == 1


@pytest.mark.parametrize("of_path", [str, Path])
def test_a_packed_directory_is_a_mapping_of_its_layers(tiny_model, packed_model, tmp_path, of_path):
    packed = open_directory(of_path(packed_model))
    assert len(packed) == 14
    assert list(packed) == list(packed.layers)
    name = "model.layers.0.mlp.down_proj"
    assert name in packed
    assert "model.norm" not in packed
    weight = load_file(tiny_model() / "model.safetensors")[f"{name}.weight"]
    for read in (packed[name], packed.get(name), dict(packed)[name]):
        assert torch.equal(read.dequantize(), quantize(weight, SEMANTIC_32).dequantize())
    assert packed.get("model.norm") is None
    with pytest.raises(KeyError, match=r"mlp\.down_porj' is not a packed layer of .*down_proj"):
        packed["model.layers.0.mlp.down_porj"]
    assert repr(packed) == f"PackedCheckpoint('{packed_model}', 14 packed layers)"
    packed[name].save(tmp_path / "f")
    assert torch.equal(PackedTensor.load(tmp_path / "f").codes, packed[name].codes)


def test_a_directory_that_is_not_packed_is_refused(tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="this is not a packed checkpoint: make one with"):
        open_directory(str(tiny_model()))
    with pytest.raises(CheckpointError, match="is missing; a checkpoint directory needs it"):
        open_directory(tmp_path)
