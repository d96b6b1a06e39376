"""Packed embeddings in transformers: tied to the output projection or not, scaled or not."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from dialect_kernels import SEMANTIC_32, reference
from dialect_plugin import open_packed
from dialect_plugin.checkpoint.reader import CheckpointError
from dialect_plugin.transformers import BlockDialectConfig, DialectEmbedding, DialectLinear
from tests.support.by_hand import TOKENS, logits_of, quantized_by_hand

TIED = (("tie_word_embeddings", True),)
CASES = [
    ("LlamaForCausalLM", (), {"embeddings": True, "lm_head": True}),
    ("LlamaForCausalLM", TIED, {"embeddings": True}),
    ("Gemma3ForCausalLM", TIED, {"embeddings": True}),  # scales its embeddings
]
by_case = pytest.mark.parametrize(
    ("architecture", "model", "options"), CASES, ids=["untied", "tied", "scaled"]
)


def exact(path, **options):
    config = BlockDialectConfig(accumulation="exact", **options)
    with pytest.warns(UserWarning, match="loading attributes"):  # transformers' own
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto", quantization_config=config)


def by_hand(source, packed):
    """The 16-bit model with decoded embeddings, and the reference's product in packed layers."""
    opened = open_packed(packed)
    tied = "lm_head" not in opened
    stored = {name: opened[name] for name in opened if name != "model.embed_tokens"}
    formats = {name: opened.scheme.layer(name).activation_format for name in stored}
    if tied:
        stored["lm_head"], formats["lm_head"] = opened["model.embed_tokens"], "none"
    model = quantized_by_hand(source, {n: lambda _, p=p: p for n, p in stored.items()}, formats)
    rows = opened["model.embed_tokens"].dequantize(torch.bfloat16)
    model.get_input_embeddings().weight = torch.nn.Parameter(rows)
    return model


@by_case
def test_logits_of_packed_embeddings(tiny_model, packed, architecture, model, options):
    path = packed(architecture, model, **options)
    loaded = exact(path)
    embeddings, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(embeddings, DialectEmbedding)
    assert isinstance(head, DialectLinear)
    assert (head.weight_packed is embeddings.weight_packed) == bool(model)
    expected = by_hand(tiny_model(architecture, **dict(model)), path)
    assert torch.equal(logits_of(loaded), logits_of(expected))


@by_case
def test_saved_and_quantized_while_loading(
    tiny_model, packed, tmp_path, architecture, model, options
):
    path = packed(architecture, model, **options)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    online = AutoModelForCausalLM.from_pretrained(
        tiny_model(architecture, **dict(model)),
        dtype="auto",
        quantization_config=BlockDialectConfig(**options),
    )
    assert torch.equal(logits_of(online), logits_of(loaded))
    assert not [name for name, value in online.named_parameters() if value.is_meta]
    stored = load_file(path / "model.safetensors")
    for number, saved in enumerate((loaded, online)):
        saved.save_pretrained(tmp_path / str(number))
        found = load_file(tmp_path / str(number) / "model.safetensors")
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], stored[name]) for name in stored)
        scheme = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert scheme["quantization_config"] == open_packed(path).scheme.to_config()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype="auto")
        assert torch.equal(logits_of(again), logits_of(loaded))


@by_case
def test_a_dequantized_model_is_an_ordinary_one(packed, tmp_path, architecture, model, options):
    loaded = AutoModelForCausalLM.from_pretrained(packed(architecture, model, **options))
    rows = loaded.get_input_embeddings()(TOKENS)
    plain = loaded.dequantize()
    embeddings, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    assert not isinstance(embeddings, DialectEmbedding)
    assert torch.equal(embeddings(TOKENS), rows)
    assert (head.weight is embeddings.weight) == bool(model)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(plain))


def test_a_model_without_output_projection(packed):
    inner = AutoModel.from_pretrained(packed("LlamaForCausalLM", TIED, embeddings=True))
    embeddings = inner.get_input_embeddings()
    assert isinstance(embeddings, DialectEmbedding)
    assert torch.equal(embeddings(TOKENS), embeddings.packed.dequantize(torch.bfloat16)[TOKENS])
    assert inner(TOKENS).last_hidden_state.isfinite().all()
    half = inner.to(torch.float16)
    assert embeddings(TOKENS).dtype == torch.float16
    assert half(TOKENS).last_hidden_state.dtype == torch.float16


def test_embeddings_of_another_class_are_refused(packed, monkeypatch):
    from transformers.models.llama import modeling_llama

    class Doubled(torch.nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 2

    original = modeling_llama.LlamaModel.__init__

    def with_other_embeddings(self, config):
        original(self, config)
        self.embed_tokens = Doubled(config.vocab_size, config.hidden_size)

    path = packed("LlamaForCausalLM", (), embeddings=True)
    monkeypatch.setattr(modeling_llama.LlamaModel, "__init__", with_other_embeddings)
    with pytest.raises(CheckpointError, match=r"embed_tokens: is packed, but .* has Doubled in"):
        AutoModelForCausalLM.from_pretrained(path)


def test_rows_are_those_of_the_reference(tiny_model, packed):
    loaded = AutoModelForCausalLM.from_pretrained(packed("LlamaForCausalLM", (), embeddings=True))
    weight = load_file(tiny_model() / "model.safetensors")["model.embed_tokens.weight"]
    rows = reference.quantize(weight, SEMANTIC_32).dequantize(torch.bfloat16)[TOKENS]
    assert torch.equal(loaded.get_input_embeddings()(TOKENS), rows)
