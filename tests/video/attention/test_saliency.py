"""Received attention and the choice of salient tokens, against the full softmax in float64."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_hook.attention import attention, saliency
from diffusers_hook.attention.attention import Attention
from diffusers_hook.attention.saliency import _salient_count, _sampling_step, select_salient
from tests.video.support.full_attention import (
    DTYPES,
    MASKS,
    LargestTensor,
    full_attention,
    full_logits,
    some_mask,
    tensors,
)


def received_attention(query, key, mask=None, scale=None, samples=64, lse=None):
    attention = Attention.checked(query, key, mask, scale, lse)
    return saliency.received_attention(attention, samples)


def tiled_log_sum_exp(query, key, mask=None):
    return Attention.checked(query, key, mask).tiled_lse()


def full_score(logits, samples=64):
    """Section 5 of the format: mean over heads and over every max(1, T_q // 64)-th row."""
    stride = max(1, logits.shape[2] // samples)
    return full_attention(logits)[:, :, ::stride].mean((1, 2))


def close(actual, expected, rtol=2e-6, atol=1e-9):
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("count", "rows", "last"),
    [(0, 0, None), (1, 1, 0), (64, 64, 63), (127, 127, 126), (128, 64, 126), (191, 96, 190)],
)
def test_every_sixty_fourth_part_of_the_queries_from_the_first_on(count, rows, last):
    sampled = list(range(0, count, _sampling_step(count)))
    assert len(sampled) == rows
    assert sampled == list(range(count))[:: max(1, count // 64)]
    assert sampled[-1:] == ([] if last is None else [last])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_score_is_the_mean_of_sampled_softmax_rows(key_heads, dtype, kind):
    query, key = tensors((2, 4, 200, 16), (2, key_heads, 50, 16), dtype=dtype)
    mask = some_mask(kind, 2, 4, 200, 50)
    expected = full_score(full_logits(query, key, mask))
    score = received_attention(query, key, mask=mask)
    close(score, expected)
    lse = tiled_log_sum_exp(query, key, mask=mask)
    close(received_attention(query, key, mask=mask, lse=lse), expected)


def test_scores_of_a_sample_add_up_to_one():
    query, key = tensors((3, 2, 70, 8), (3, 2, 90, 8), seed=1)
    close(received_attention(query, key).sum(1), np.ones(3))


def test_only_the_sampled_queries_count():
    query, key = tensors((1, 2, 300, 8), (1, 2, 300, 8), seed=2)
    score = received_attention(query, key, samples=10)
    query[:, :, [row for row in range(300) if row % 30]] = torch.nan
    assert torch.equal(received_attention(query, key, samples=10), score)


def test_scale_is_a_factor_of_the_logits():
    query, key = tensors((1, 2, 9, 8), (1, 2, 9, 8), seed=3)
    close(received_attention(query, key, scale=0.7), full_score(full_logits(query, key, scale=0.7)))


@pytest.mark.parametrize("masked", [-math.inf, "lowest", -1e9, -10000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_to_write_masked_is_the_same(dtype, masked):
    """bfloat16 writes -10000 as -9984; rows with nothing left attend to nothing in all of them."""
    masked = torch.finfo(dtype).min if masked == "lowest" else masked
    query, key = tensors((2, 4, 40, 16), (2, 4, 40, 16), dtype=dtype)
    kept = some_mask("pairs", 2, 4, 40, 40)
    kept[[0, 5]] = False
    additive = torch.zeros(40, 40, dtype=dtype).masked_fill(~kept, masked)
    expected = received_attention(query, key, mask=kept)
    assert torch.equal(received_attention(query, key, mask=additive), expected)
    close(expected, full_score(full_logits(query, key, kept)))


def test_everything_masked_gives_zeros():
    query, key = tensors((1, 2, 5, 8), (1, 2, 7, 8))
    nothing = torch.zeros(5, 7, dtype=torch.bool)
    lse = torch.full((1, 2, 5), -math.inf)
    assert torch.equal(received_attention(query, key, mask=nothing), torch.zeros(1, 7))
    score = received_attention(query, key, mask=nothing, lse=lse)
    assert torch.equal(score, torch.zeros(1, 7))


@pytest.mark.parametrize("elements", [1, 3000, 20000])
@pytest.mark.parametrize("kind", MASKS)
def test_tiles_do_not_change_the_score(monkeypatch, kind, elements):
    query, key = tensors((2, 4, 100, 8), (2, 2, 60, 8))
    mask = some_mask(kind, 2, 4, 100, 60)
    expected = full_score(full_logits(query, key, mask))
    monkeypatch.setattr(attention, "_TILE_ELEMENTS", elements)
    close(received_attention(query, key, mask=mask), expected)
    lse = tiled_log_sum_exp(query, key, mask=mask)
    close(received_attention(query, key, mask=mask, lse=lse), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_score_through_the_attentions_own_log_sum_exp(dtype):
    query, key = tensors(*[(2, 4, 200, 16)] * 2, dtype=dtype, seed=5)
    score = saliency.received_attention(Attention.checked(query, key, scale=0.3).with_lse())
    expected = full_score(full_logits(query, key, scale=0.3))
    close(score, expected, rtol=5e-6 if dtype == torch.float32 else 2e-4)


def test_transposed_inputs_as_pipelines_pass_them():
    query, key = (x.transpose(1, 2) for x in tensors(*[(2, 80, 4, 16)] * 2, seed=6))
    close(received_attention(query, key), full_score(full_logits(query, key)))


def test_float32_under_autocast_and_no_gradient():
    query, key = tensors((1, 2, 90, 16), (1, 2, 90, 16), seed=7)
    expected = received_attention(query, key)
    query.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = received_attention(query, key)
    assert torch.equal(actual, expected)
    assert not actual.requires_grad


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(queries, keys):
    query, key = tensors((2, 2, queries, 8), (2, 2, keys, 8))
    assert torch.equal(received_attention(query, key), torch.zeros(2, keys))


@pytest.mark.parametrize("masked", [False, True])
def test_never_a_full_map(masked):
    query, key = tensors(*[(1, 2, 1024, 16)] * 2)
    mask = torch.arange(1024) < 1000 if masked else None
    lse = Attention.checked(query, key, mask).with_lse().lse
    with LargestTensor() as largest:
        received_attention(query, key, mask=mask)
        received_attention(query, key, mask=mask, lse=lse)
    assert 64 * 1024 <= largest.elements < 1024 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_score_on_the_gpu(dtype, kind):
    query, key = tensors((2, 4, 200, 64), (2, 2, 145, 64), dtype=dtype)
    mask = some_mask(kind, 2, 4, 200, 145)
    expected = full_score(full_logits(query, key, mask))
    query, key, mask = (x if x is None else x.cuda() for x in (query, key, mask))
    close(received_attention(query, key, mask=mask).cpu(), expected, rtol=1e-5)
    lse = Attention.checked(query, key, mask).with_lse().lse
    score = received_attention(query, key, mask=mask, lse=lse)
    close(score.cpu(), expected, rtol=2e-3)


@pytest.mark.parametrize("tokens", [1, 7, 30, 100, 75600])
def test_count_is_the_ceiling_of_the_written_fraction(tokens):
    for percent in range(101):
        assert _salient_count(percent / 100, tokens) == -(-percent * tokens // 100)


def test_count_of_other_numbers():
    assert _salient_count(0.1, 30) == 3  # 0.1 * 30 is 3.0000000000000004 in exact arithmetic
    assert _salient_count(Fraction(1, 3), 9) == 3
    assert _salient_count(Decimal("0.3"), 10) == 3
    assert _salient_count(1e-05, 100_000) == 1
    assert _salient_count(1, 12) == 12
    assert _salient_count(0.5, 0) == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.5, math.nan, math.inf])
def test_fraction_outside_the_range(fraction):
    with pytest.raises(ValueError, match=r"fraction: .* is not allowed; give a number in 0\.\.1"):
        select_salient(torch.zeros(1, 4), fraction)


@given(
    scores=st.integers(1, 3).flatmap(
        lambda batch: st.integers(0, 40).flatmap(
            lambda tokens: st.lists(
                st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=tokens, max_size=tokens),
                min_size=batch,
                max_size=batch,
            )
        )
    ),
    percent=st.integers(0, 100),
    selection=st.sampled_from(["top", "bottom"]),
)
def test_largest_or_smallest_scores_and_lower_index_in_ties(scores, percent, selection):
    chosen = select_salient(torch.tensor(scores), percent / 100, selection=selection)
    sign = -1 if selection == "top" else 1
    assert chosen.dtype == torch.int64
    for row, picked in zip(scores, chosen.tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda j: (sign * row[j], j))
        assert picked == sorted(ranked[: -(-percent * len(row) // 100)])


def test_ties_in_a_long_row():
    """Sorts switch their method with length."""
    scores = torch.zeros(2, 5000)
    scores[1, 4000:] = 1
    chosen = select_salient(scores, 0.3)
    assert chosen[0].tolist() == list(range(1500))
    assert chosen[1].tolist() == [*range(500), *range(4000, 5000)]


def test_random_tokens_follow_the_generator_alone():
    def draw(seed, scores):
        generator = torch.Generator().manual_seed(seed)
        return select_salient(scores, 0.2, selection="random", generator=generator)

    scores = torch.rand(400, 20, generator=torch.Generator().manual_seed(0))
    chosen = draw(3, scores)
    assert chosen.shape == (400, 4)
    assert (chosen.diff(dim=1) > 0).all()
    assert torch.equal(draw(3, torch.zeros_like(scores)), chosen)
    assert not torch.equal(draw(4, scores), chosen)
    # 80 expected of each, standard deviation 8
    times = chosen.flatten().bincount(minlength=20)
    assert times.min() > 40
    assert times.max() < 120


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: select_salient(q, 0.1), r"scores: has shape \[1, 4, 6, 8\]"),
        (
            lambda q: select_salient(q[0, 0], 0.1, selection="best"),
            "selection: 'best' is not known; choose one of top, random, bottom",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 4, 6, 8))
