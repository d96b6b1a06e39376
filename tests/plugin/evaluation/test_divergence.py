"""The divergence of two models' predictions, against sums in float64."""

import pytest
import torch

from dialect_plugin.evaluation import divergence
from dialect_plugin.evaluation.divergence import compare, negative_log_likelihood


def logits(seed, positions=7, vocabulary=301):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(positions, vocabulary, generator=generator) * 4


@pytest.mark.parametrize("chunk", [1, 301 * 3, 1 << 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_figures_are_those_of_float64(monkeypatch, chunk, dtype):
    monkeypatch.setattr(divergence, "_CHUNK_ELEMENTS", chunk)
    reference, found = logits(0).to(dtype), logits(1).to(dtype)
    tokens = torch.arange(7) * 40
    p, q = (torch.softmax(x.double(), dim=-1) for x in (reference, found))
    got = compare(reference, found, tokens)
    expected = torch.stack([(p[i] * (p[i] / q[i]).log()).sum() for i in range(7)])
    torch.testing.assert_close(got.divergence, expected, rtol=1e-5, atol=1e-6)
    nll = torch.stack([-q[i, tokens[i]].log() for i in range(7)])
    torch.testing.assert_close(got.nll, nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(negative_log_likelihood(found, tokens), got.nll)
    assert got.expected.tolist() == reference.argmax(dim=-1).tolist()
    assert got.top.tolist() == found.argmax(dim=-1).tolist()


def test_a_model_does_not_differ_from_itself():
    x = logits(2)
    got = compare(x, x.clone(), torch.zeros(7, dtype=torch.int64))
    assert got.divergence.abs().max() == 0
    assert got.expected.equal(got.top)


def test_small_divergences_are_not_lost_in_float32():
    """At 5e-7 nats, less than W4A16 ever costs, two digits are right."""
    reference = logits(3, 200, 49_152)
    found = reference + 1e-3 * logits(4, 200, 49_152) / 4
    p, q = (x.double().log_softmax(dim=-1) for x in (reference, found))
    expected = (p.exp() * (p - q)).sum(dim=-1).mean()
    assert 1e-7 < expected < 1e-6
    got = compare(reference, found, torch.zeros(200, dtype=torch.int64)).divergence.mean()
    assert got == pytest.approx(float(expected), rel=0.05)


def test_a_large_vocabulary_is_computed_with_in_parts():
    parts = divergence._parts(torch.empty(511, 262_144, device="meta"))
    assert sum(len(range(511)[part]) for part in parts) == 511
    assert max(part.stop - part.start for part in parts) * 262_144 <= 1 << 23
    assert divergence._parts(torch.empty(2, 1 << 24, device="meta")) == [slice(0, 1), slice(1, 2)]


def test_inputs_are_left_alone():
    reference, found = logits(5), logits(6)
    before = reference.clone(), found.clone()
    compare(reference, found, torch.zeros(7, dtype=torch.int64))
    assert reference.equal(before[0])
    assert found.equal(before[1])
