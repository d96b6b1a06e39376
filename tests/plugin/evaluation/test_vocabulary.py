"""Evaluations with packed embeddings, which a tied output projection shares."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dialect_kernels import baselines, reference
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.reader import open_packed
from dialect_plugin.evaluation.evaluator import evaluate
from dialect_plugin.evaluation.options import EvaluationOptions
from dialect_plugin.scheme import Scheme

EMBEDDINGS = "model.embed_tokens"
LENGTH = 64


@torch.inference_mode()
def divergence(source, text, change):
    """KL of each of two windows, where `change` exchanges layers of the 16-bit model."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer(text.read_text(), add_special_tokens=False).input_ids
    step = LENGTH - 1
    found = []
    exact, changed = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval() for _ in range(2)
    )
    change(changed)
    for start in (0, len(tokens) // step // 2 * step):
        window = torch.tensor([[tokenizer.bos_token_id, *tokens[start : start + step]]])
        first, second = (
            model(window).logits[0, :-1].double().log_softmax(dim=-1) for model in (exact, changed)
        )
        found.append(float((first.exp() * (first - second)).sum(dim=-1).mean()))
    return found


@pytest.mark.parametrize("ties", [False, True])
def test_embeddings_and_what_is_tied_to_them(ties, tiny_model, text, tmp_path):
    source = tiny_model(tie_word_embeddings=ties)
    convert(source, tmp_path / "packed", Scheme(embeddings=True, lm_head=not ties))
    opened = open_packed(tmp_path / "packed")
    options = EvaluationOptions.model_validate(
        {"text": str(text), "windows": 2, "sequence_length": LENGTH, "formats": "mxfp4-32"}
    )
    ours, peer = evaluate([tmp_path / "packed"], source, options).rows
    assert ours.activations == ("mixed" if ties else "W4A4")

    def exchange(model, rows, product):
        head = model.lm_head.weight.detach()
        model.get_input_embeddings().weight = torch.nn.Parameter(rows)
        for name in [*opened.layers, *(["lm_head"] if ties else [])]:
            if name != EMBEDDINGS:
                layer = model.get_submodule(name)
                weight = head if name == "lm_head" else layer.weight.detach()
                layer.forward = lambda x, n=name, w=weight: product(n, w, x[0])[None]

    def dialect(name, weight, x):
        stored = EMBEDDINGS if ties and name == "lm_head" else name
        form = opened.scheme.layer(stored).activation_format
        return reference.dialect_linear(x, opened[stored], None, form)

    def mxfp4(name, weight, x):
        tied = ties and name == "lm_head"
        tokens = x.float() if tied else baselines.quantize_mxfp4(x.float())
        return (tokens @ baselines.quantize_mxfp4(weight.float()).T).to(x.dtype)

    rows = opened[EMBEDDINGS].dequantize(torch.bfloat16)
    expected = divergence(source, text, lambda model: exchange(model, rows, dialect))
    assert ours.divergence == pytest.approx(expected, rel=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(source).get_input_embeddings().weight
    rows = baselines.quantize_mxfp4(plain.detach().float()).to(torch.bfloat16)
    expected = divergence(source, text, lambda model: exchange(model, rows, mxfp4))
    assert peer.divergence == pytest.approx(expected, rel=1e-4)
