"""Attention with rounded operands, against loops over heads, queries and blocks."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dialect_plugin.checkpoint.reader import CheckpointError
from dialect_plugin.evaluation.attention import AttentionRounding, _attend, rounded_attention
from dialect_plugin.evaluation.formats import format_of
from dialect_plugin.evaluation.layers import rounding_of
from dialect_plugin.evaluation.options import FormatName

NAMES = ["dialect_fp4-32", "semantic_32-16", "mxfp4-32"]


def as_it_is(x):
    return x.float()


def by_loops(rounding, query, key, value, mask, scale, softcap):
    """[B, H, T, D] -> [B, T, H, D], one number of the published recipe after the other."""
    query_key, round_, size = rounding
    out = torch.empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    groups = query.shape[1] // key.shape[1]
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            q = query_key(query[batch, head])
            k = query_key(key[batch, head // groups])
            v = value[batch, head // groups].float().clone()
            for first in range(0, len(v) - size + 1, size):
                for channel in range(v.shape[1]):
                    block = v[first : first + size, channel].clone()
                    v[first : first + size, channel] = round_(block[None])[0]
            scores = (q @ k.T) * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores = scores + mask[batch, 0]
            p = round_(scores.softmax(dim=-1))
            out[batch, :, head] = p @ v
    return out.to(query.dtype)


@pytest.mark.parametrize("query_key_block_size", [None, 16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_operands_are_rounded_in_the_published_directions(name, softcap, query_key_block_size):
    torch.manual_seed(0)
    chosen = FormatName.parse(name)
    rounding = format_of(chosen, None).attention(query_key_block_size)
    x = torch.randn(8, 64)
    assert rounding.block_size == chosen.block_size
    assert rounding.probabilities_value(x).equal(rounding_of(chosen)(x))
    if query_key_block_size and chosen.ours:
        chosen = replace(chosen, block_size=query_key_block_size)
    assert rounding.query_key(x).equal(rounding_of(chosen)(x))
    query, key = torch.randn(2, 4, 75, 64), torch.randn(2, 2, 75, 64)
    value = torch.randn(2, 2, 75, 64) * torch.logspace(-2, 2, 64)
    mask = torch.full((75, 75), -torch.inf).triu(1).expand(2, 1, 75, 75)
    arguments = rounding, query, key, value, mask, 0.125, softcap
    torch.testing.assert_close(_attend(*arguments), by_loops(*arguments), rtol=1e-5, atol=1e-5)


def test_without_rounding_it_is_attention():
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, heads, 40, 32) for heads in (4, 2, 2))
    rounding = AttentionRounding(as_it_is, as_it_is, 32)
    mask = torch.full((40, 40), -torch.inf).triu(1)[None, None]
    found = _attend(rounding, query, key, value, mask, 32**-0.5, None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
@torch.inference_mode()
def test_models_attend_with_it_and_then_as_before(tiny_model, architecture):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).float().eval()
    tokens = torch.arange(3, 80)[None]
    before = model(tokens).logits
    exact = AttentionRounding(as_it_is, as_it_is, 32)
    with rounded_attention(model, exact, architecture):
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-3, atol=1e-4)
    name = FormatName.parse("mxfp4-32")
    with rounded_attention(
        model, AttentionRounding(rounding_of(name), rounding_of(name), 32), architecture
    ):
        assert (model(tokens).logits - before).abs().max() > 1e-3
    assert model(tokens).logits.equal(before)


def test_a_model_that_does_not_attend_is_named(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model()).eval()
    exact = AttentionRounding(as_it_is, as_it_is, 32)
    with (
        pytest.raises(CheckpointError, match=r"^Llama: its attention cannot be rounded in this"),
        rounded_attention(model, exact, "Llama"),
    ):
        pass
