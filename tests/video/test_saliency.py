"""Received attention and the choice of salient tokens, against the full softmax in float64."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_hook import saliency
from diffusers_hook.saliency import (
    attention_with_lse,
    log_sum_exp,
    received_attention,
    received_attention_from_lse,
    salient_count,
    sampled_queries,
    select_salient,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def full_logits(query, key, mask=None, scale=None):
    """float64 [B, H, T_q, T_k], -inf where masked."""
    query, key = query.double().numpy(), key.double().numpy()
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    logits = query @ np.swapaxes(key, 2, 3) * scale
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return np.where(mask.numpy(), logits, -np.inf)
    return logits + mask.double().numpy()


def full_lse(logits):
    with np.errstate(divide="ignore"):
        return np.log(np.exp(logits).sum(-1))


def full_attention(logits):
    """Softmax rows; zeros where everything is masked."""
    weights = np.exp(logits)
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def full_score(logits, samples=64):
    """Section 5 of the format: mean over heads and over every max(1, T_q // 64)-th row."""
    stride = max(1, logits.shape[2] // samples)
    return full_attention(logits)[:, :, ::stride].mean((1, 2))


def close(actual, expected, rtol=2e-6, atol=1e-9):
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, rtol=rtol, atol=atol)


def some_mask(kind, batch, heads, queries, keys):
    generator = torch.Generator().manual_seed(keys)
    if kind == "none":
        return None
    if kind == "padding":
        return torch.arange(keys) < torch.tensor([keys - 3, keys // 2]).view(batch, 1, 1, 1)
    if kind == "pairs":
        return torch.rand(queries, keys, generator=generator) < 0.7
    if kind == "every_head":
        return torch.rand(batch, heads, queries, keys, generator=generator) < 0.5
    if kind == "additive":
        return torch.randn(batch, 1, queries, keys, generator=generator)
    # three queries, two of which are sampled, attend to nothing
    mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    mask[:, :, [0, 1, 6]] = False
    return mask


MASKS = ("none", "padding", "pairs", "every_head", "additive", "empty_rows")


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation's result had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.untyped_storage().nbytes() // item.itemsize)
        return result


@pytest.mark.parametrize(
    ("count", "rows", "last"),
    [(0, 0, None), (1, 1, 0), (64, 64, 63), (127, 127, 126), (128, 64, 126), (191, 96, 190)],
)
def test_every_sixty_fourth_part_of_the_queries_from_the_first_on(count, rows, last):
    sampled = list(sampled_queries(count))
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
    lse = log_sum_exp(query, key, mask=mask)
    close(received_attention_from_lse(query, key, lse, mask=mask), expected)


def test_scores_of_a_sample_add_up_to_one():
    query, key = tensors((3, 2, 70, 8), (3, 2, 90, 8), seed=1)
    close(received_attention(query, key).sum(1), np.ones(3))


def test_only_the_sampled_queries_count():
    query, key = tensors((1, 2, 300, 8), (1, 2, 300, 8), seed=2)
    score = received_attention(query, key, samples=10)
    query[:, :, [row for row in range(300) if row % 30]] = torch.nan
    assert torch.equal(received_attention(query, key, samples=10), score)


@pytest.mark.parametrize("function", [received_attention, log_sum_exp])
def test_scale_is_a_factor_of_the_logits(function):
    query, key = tensors((1, 2, 9, 8), (1, 2, 9, 8), seed=3)
    logits = full_logits(query, key, scale=0.7)
    expected = full_score(logits) if function is received_attention else full_lse(logits)
    close(function(query, key, scale=0.7), expected, atol=1e-6)


@pytest.mark.parametrize(
    "masked",
    [-math.inf, "lowest", -1e9, -10000.0],
)
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
    lse = log_sum_exp(query, key, mask=additive)
    assert torch.equal(lse, log_sum_exp(query, key, mask=kept))
    assert (lse[:, :, [0, 5]] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 1:5]).all()


def test_everything_masked_gives_zeros():
    query, key = tensors((1, 2, 5, 8), (1, 2, 7, 8))
    score = received_attention(query, key, mask=torch.zeros(5, 7, dtype=torch.bool))
    assert torch.equal(score, torch.zeros(1, 7))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_heads", [1, 4])
def test_log_sum_exp_of_more_queries_than_a_tile(key_heads, dtype, kind):
    query, key = tensors((2, 4, 300, 8), (2, key_heads, 70, 8), dtype=dtype)
    mask = some_mask(kind, 2, 4, 300, 70)
    expected = full_lse(full_logits(query, key, mask))
    close(log_sum_exp(query, key, mask=mask), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("elements", [1, 3000, 20000])
@pytest.mark.parametrize("kind", MASKS)
def test_tiles_do_not_change_the_result(monkeypatch, kind, elements):
    query, key = tensors((2, 4, 100, 8), (2, 2, 60, 8))
    mask = some_mask(kind, 2, 4, 100, 60)
    logits = full_logits(query, key, mask)
    monkeypatch.setattr(saliency, "_TILE_ELEMENTS", elements)
    close(received_attention(query, key, mask=mask), full_score(logits))
    close(log_sum_exp(query, key, mask=mask), full_lse(logits), atol=2e-6)


@pytest.mark.parametrize(
    ("key_heads", "value_size", "kind"),
    [(4, 16, "none"), (2, 16, "none"), (4, 24, "none"), (4, 16, "padding"), (2, 24, "additive")],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_its_log_sum_exp(dtype, key_heads, value_size, kind):
    query, key, value = tensors(
        (2, 4, 45, 16), (2, key_heads, 37, 16), (2, key_heads, 37, value_size), dtype=dtype
    )
    mask = some_mask(kind, 2, 4, 45, 37)
    mask = mask.to(dtype) if kind == "additive" else mask
    logits = full_logits(query, key, mask)
    out, lse = attention_with_lse(query, key, value, mask=mask)
    values = np.repeat(value.double().numpy(), 4 // key_heads, axis=1)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert out.dtype == dtype
    np.testing.assert_allclose(
        out.double().numpy(), full_attention(logits) @ values, rtol=tolerance, atol=tolerance
    )
    # the kernel's own sums of 16-bit products
    close(lse, full_lse(logits), atol=2e-6 if dtype == torch.float32 else 2e-4)


def test_score_through_the_kernels_log_sum_exp():
    query, key, value = tensors(*[(2, 4, 200, 16)] * 3, seed=5)
    out, lse = attention_with_lse(query, key, value, scale=0.3)
    score = received_attention_from_lse(query, key, lse, scale=0.3)
    close(score, full_score(full_logits(query, key, scale=0.3)), rtol=5e-6)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, scale=0.3))


def test_transposed_inputs_as_pipelines_pass_them():
    query, key, value = (x.transpose(1, 2) for x in tensors(*[(2, 80, 4, 16)] * 3, seed=6))
    logits = full_logits(query, key)
    close(received_attention(query, key), full_score(logits))
    out, lse = attention_with_lse(query, key, value)
    close(lse, full_lse(logits), atol=2e-6)
    turned = attention_with_lse(query.mT.contiguous().mT, key, value)
    assert torch.equal(turned[0], out)


def test_float32_under_autocast_and_no_gradient():
    query, key = tensors((1, 2, 90, 16), (1, 2, 90, 16), seed=7)
    expected = received_attention(query, key), log_sum_exp(query, key)
    query.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = received_attention(query, key), log_sum_exp(query, key)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(queries, keys):
    query, key = tensors((2, 2, queries, 8), (2, 2, keys, 8))
    assert torch.equal(received_attention(query, key), torch.zeros(2, keys))
    assert torch.equal(log_sum_exp(query, key), torch.full((2, 2, queries), -math.inf))
    out, lse = attention_with_lse(query, key, key)
    assert out.shape == query.shape
    assert lse.shape == (2, 2, queries)


@pytest.mark.parametrize("masked", [False, True])
def test_never_a_full_map(masked):
    query, key, value = tensors(*[(1, 2, 1024, 16)] * 3)
    mask = torch.arange(1024) < 1000 if masked else None
    with LargestTensor() as largest:
        _ = query @ key.mT
    assert largest.elements == 2 * 1024 * 1024
    with LargestTensor() as largest:
        received_attention(query, key, mask=mask)
        lse = log_sum_exp(query, key, mask=mask)
        received_attention_from_lse(query, key, lse, mask=mask)
        if mask is None:
            attention_with_lse(query, key, value)
    assert largest.elements < 1024 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [128, 145])
@pytest.mark.parametrize("size", [64, 128, 20])
def test_kernels_of_the_gpu(size, tokens, dtype):
    query, key, value = tensors(*[(2, 4, tokens, size)] * 3, dtype=dtype)
    logits = full_logits(query, key)
    query, key, value = query.cuda(), key.cuda(), value.cuda()
    out, lse = attention_with_lse(query, key, value)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(query, key, value), rtol=tolerance, atol=tolerance
    )
    close(lse.cpu(), full_lse(logits), atol=1e-5 if dtype == torch.float32 else 1e-3)
    close(received_attention(query, key).cpu(), full_score(logits), rtol=1e-5)
    close(received_attention_from_lse(query, key, lse).cpu(), full_score(logits), rtol=2e-3)


@pytest.mark.parametrize("tokens", [1, 7, 30, 100, 75600])
def test_count_is_the_ceiling_of_the_written_fraction(tokens):
    for percent in range(101):
        assert salient_count(percent / 100, tokens) == -(-percent * tokens // 100)


def test_count_of_other_numbers():
    assert salient_count(0.1, 30) == 3  # 0.1 * 30 is 3.0000000000000004 in exact arithmetic
    assert salient_count(Fraction(1, 3), 9) == 3
    assert salient_count(Decimal("0.3"), 10) == 3
    assert salient_count(1e-05, 100_000) == 1
    assert salient_count(1, 12) == 12
    assert salient_count(0.5, 0) == 0


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
        (
            lambda q: received_attention(q, q[:, :, :, :4]),
            r"key: has shape \[1, 4, 6, 4\], query \[1, 4, 6, 8\]",
        ),
        (lambda q: received_attention(q, q[:, :3]), "key: has 3 heads, which do not divide"),
        (lambda q: received_attention(q[0], q), "pass \\[batch, heads, tokens, head size\\]"),
        (
            lambda q: log_sum_exp(q, q, mask=torch.ones(5, 6, dtype=torch.bool)),
            r"mask: has shape \[5, 6\], which does not broadcast to \[1, 4, 6, 6\]",
        ),
        (
            lambda q: received_attention_from_lse(q, q, torch.zeros(1, 4, 5)),
            r"lse: has shape \[1, 4, 5\], but query needs \[1, 4, 6\]",
        ),
        (lambda q: attention_with_lse(q, q, q[:, :, :5]), r"value: has shape \[1, 4, 5, 8\]"),
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
