"""Embeddings and output projections in packed checkpoints: tied, untied, refused, exported."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dialect_kernels import quantize, reference
from dialect_kernels.formatbook import SEMANTIC_32
from dialect_plugin.checkpoint.convert import convert, render
from dialect_plugin.checkpoint.export_fp8 import export_fp8
from dialect_plugin.checkpoint.inspection import inspect_checkpoint
from dialect_plugin.checkpoint.inspection import render as render_inspection
from dialect_plugin.checkpoint.layer_choice import choose_layers
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import CheckpointError, open_checkpoint, open_packed
from dialect_plugin.scheme import Scheme, SchemeError
from tests.support.conversions import edit_config, options_of, refused

EMBEDDINGS = "model.embed_tokens"


def scheme_in(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def test_a_tied_matrix_is_packed_once_unrotated_with_16_bit_activations(tiny_model, tmp_path):
    source = tiny_model(tie_word_embeddings=True)
    options = options_of(book="semantic_32", rotation="hadamard_32", embeddings=True)
    result = convert(source, tmp_path / "packed", options)
    packed = open_packed(tmp_path / "packed")
    assert [name for name in packed if ".layers." not in name] == [EMBEDDINGS]
    found = packed[EMBEDDINGS]
    assert found.rotation == "none"
    weight = load_file(source / "model.safetensors")[f"{EMBEDDINGS}.weight"]
    expected = reference.quantize(weight, SEMANTIC_32)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.meta, expected.meta)
    assert torch.equal(found.row_exponent, expected.row_exponent)
    stored = scheme_in(tmp_path / "packed")
    assert stored["format_version"] == 2
    assert (stored["embeddings"], stored["lm_head"]) == (True, False)
    unlike = {"activation_format": "none", "rotation": "none"}
    assert stored["overrides"] == {EMBEDDINGS: unlike}
    assert EMBEDDINGS not in stored["ignore"]
    assert "15 layers at" in render(result)
    text = render_inspection(inspect_checkpoint(tmp_path / "packed", Silent()))
    assert "embeddings, which are the output projection too" in text
    assert f"\n{EMBEDDINGS} " in text
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "the embeddings, which are the output projection too" in card


def test_untied_they_are_two_matrices(tiny_model, tmp_path):
    options = options_of(embeddings=True, lm_head=True, rotation="hadamard_32")
    convert(tiny_model(), tmp_path / "packed", options)
    packed = open_packed(tmp_path / "packed")
    assert packed["lm_head"].rotation == "hadamard_32"
    assert packed[EMBEDDINGS].rotation == "none"
    stored = scheme_in(tmp_path / "packed")
    assert (stored["embeddings"], stored["lm_head"]) == (True, True)
    assert stored["overrides"] == {EMBEDDINGS: {"rotation": "none"}}
    text = render_inspection(inspect_checkpoint(tmp_path / "packed", Silent()))
    assert "packed beside the decoder layers: embeddings and output projection" in text


def test_what_was_asked_otherwise(tiny_model, tmp_path):
    overrides = {"re:.*embed": {"activation_format": "fp8", "block_size": 16}}
    options = options_of(embeddings=True, overrides=overrides)
    convert(tiny_model(tie_word_embeddings=True), tmp_path / "packed", options)
    assert scheme_in(tmp_path / "packed")["overrides"][EMBEDDINGS] == overrides["re:.*embed"]


def test_checkpoints_without_them_say_nothing_of_them(tiny_model, tmp_path):
    convert(tiny_model(), tmp_path / "packed", options_of(embeddings=False))
    assert "embeddings" not in scheme_in(tmp_path / "packed")
    assert scheme_in(tmp_path / "packed")["format_version"] == 1


def test_columns_that_no_block_divides(tiny_model, tmp_path):
    source = tiny_model(hidden_size=104, num_attention_heads=1)
    options = options_of(embeddings=True, lm_head=True)
    choice = choose_layers(open_checkpoint(source), options)
    assert EMBEDDINGS in choice.indivisible
    assert (choice.scheme.embeddings, choice.scheme.lm_head) == (False, False)
    sentence = f"{EMBEDDINGS}: its 104 columns are not a multiple of the block size 32"
    strict = options_of(strict=True, embeddings=True, ignore=["re:.*layers"])
    with pytest.raises(SchemeError, match=sentence):
        choose_layers(open_checkpoint(source), strict)


def test_refusals(tiny_model, tmp_path):
    destination = tmp_path / "packed"
    tied = tiny_model(tie_word_embeddings=True)
    sentence = "ties its output projection to the embeddings; use --embeddings"
    refused(tied, destination, sentence, SchemeError, lm_head=True)
    convert(tied, tmp_path / "both", options_of(lm_head=True, embeddings=True))  # one matrix
    targets = [EMBEDDINGS, "re:.*mlp"]
    with pytest.raises(SchemeError, match=r"read in 16 bit; use --embeddings"):
        choose_layers(open_checkpoint(tied), options_of(targets=targets))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"embeddings": False}, "says that the embeddings are not packed, but they are;"),
        ({"rotation": "hadamard_32"}, f"says that {EMBEDDINGS} has the rotation hadamard_32, but"),
    ],
)
def test_a_config_that_does_not_fit(tiny_model, tmp_path, changes, sentence):
    convert(tiny_model(), tmp_path / "packed", options_of(embeddings=True))
    edit_config(tmp_path / "packed", quantization_config=scheme_in(tmp_path / "packed") | changes)
    with pytest.raises(CheckpointError, match=sentence):
        open_packed(tmp_path / "packed")


def test_a_config_that_promises_embeddings(tiny_model, tmp_path):
    convert(tiny_model(), tmp_path / "packed")
    promised = scheme_in(tmp_path / "packed") | {"embeddings": True, "format_version": 2}
    edit_config(tmp_path / "packed", quantization_config=promised)
    with pytest.raises(CheckpointError, match="that the embeddings are packed, but they are not;"):
        open_packed(tmp_path / "packed")


def test_exported_embeddings_have_the_values_in_the_model_s_dtype(tiny_model, tmp_path):
    convert(tiny_model(), tmp_path / "packed", Scheme(embeddings=True, lm_head=True))
    packed = open_packed(tmp_path / "packed")
    result = export_fp8(packed, tmp_path / "fp8", Silent())
    assert result.layers == 15
    weight = load_file(tmp_path / "fp8" / "model.safetensors")[f"{EMBEDDINGS}.weight"]
    assert torch.equal(weight, packed[EMBEDDINGS].dequantize(torch.bfloat16))
    assert torch.equal(weight.float(), packed[EMBEDDINGS].dequantize())
    assert EMBEDDINGS in scheme_in(tmp_path / "fp8")["ignore"]


def test_any_rows_are_rounded_alone(tiny_model):
    """Ranks cut the vocabulary by rows: their bytes are those of the whole matrix."""
    weight = load_file(tiny_model() / "model.safetensors")[f"{EMBEDDINGS}.weight"]
    whole = quantize(weight, SEMANTIC_32)
    assert torch.equal(quantize(weight[100:200], SEMANTIC_32).codes, whole.codes[100:200])
