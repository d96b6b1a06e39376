"""The checkpoints that benchmarks make: whole, readable, of the stated shape."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.language.checkpoints import convert, write_checkpoint, write_tokenizer
from benchmarks.lib.shapes import LLAMA_1B
from dialect_plugin.checkpoint.reader import open_packed

SMALL = replace(LLAMA_1B, hidden=64, intermediate=128, layers=2, head=2, vocabulary=100)


def tensors_of(directory):
    files = sorted(directory.glob("*.safetensors"))
    return len(files), {name: value for file in files for name, value in load_file(file).items()}


def test_one_file_or_several_hold_the_same_model(tmp_path):
    write_checkpoint(tmp_path / "one", SMALL)
    write_checkpoint(tmp_path / "several", SMALL, file_per_layer=True)
    (one, whole), (several, parts) = (tensors_of(tmp_path / name) for name in ("one", "several"))
    assert (one, several) == (1, 1 + SMALL.layers)
    assert whole.keys() == parts.keys()
    assert all(whole[name].equal(parts[name]) for name in whole)
    linear = {name: value for name, value in whole.items() if "_proj" in name}
    assert sum(value.numel() for value in linear.values()) == SMALL.linear_weights
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == SMALL.config


def test_transformers_loads_every_weight(tmp_path):
    write_checkpoint(tmp_path / "model", SMALL)
    write_tokenizer(tmp_path / "model", SMALL.vocabulary)
    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert model.num_parameters() == sum(
        v.numel() for v in tensors_of(tmp_path / "model")[1].values()
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("w3 w99").input_ids == [3, 99]


def test_the_shipped_command_converts_it(tmp_path):
    write_checkpoint(tmp_path / "model", SMALL)
    peak = convert(tmp_path / "model", tmp_path / "packed")
    assert len(open_packed(tmp_path / "packed").layers) == SMALL.layers * len(SMALL.projections)
    assert peak.pss > 100 << 20, "Python with torch takes more than that"
    with pytest.raises(SystemExit, match="blockdialect quantize failed"):
        convert(tmp_path / "nowhere", tmp_path / "other")
