"""The log-sum-exp of an attention's logits, against the full map in float64."""

import math

import numpy as np
import pytest
import torch

from diffusers_hook.attention import attention
from diffusers_hook.attention.attention import Attention
from tests.video.support.full_attention import (
    DTYPES,
    MASKS,
    LargestTensor,
    full_logits,
    full_lse,
    some_mask,
    tensors,
)


def log_sum_exp(query, key, mask=None, scale=None):
    return Attention.checked(query, key, mask, scale).with_lse().lse


def tiled_log_sum_exp(query, key, mask=None, scale=None):
    return Attention.checked(query, key, mask, scale).tiled_lse()


BOTH = pytest.mark.parametrize("function", [log_sum_exp, tiled_log_sum_exp])


def close(lse, logits, dtype=torch.float32, function=log_sum_exp):
    """Kernels sum 16-bit products their own way; the tiles are float32."""
    exact = dtype == torch.float32 or function is tiled_log_sum_exp
    assert lse.dtype == torch.float32
    np.testing.assert_allclose(
        lse.cpu().numpy(), full_lse(logits), rtol=1e-6, atol=2e-6 if exact else 2e-4
    )


@BOTH
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_heads", [1, 4])
def test_log_sum_exp_of_more_queries_than_a_tile(key_heads, dtype, kind, function):
    query, key = tensors((2, 4, 300, 8), (2, key_heads, 70, 8), dtype=dtype)
    mask = some_mask(kind, 2, 4, 300, 70)
    mask = mask.to(dtype) if kind == "additive" else mask
    lse = function(query, key, mask=mask)
    close(lse, full_logits(query, key, mask), dtype, function)
    if kind == "empty_rows":
        assert (lse[:, :, [0, 1, 6]] == -math.inf).all()


@pytest.mark.parametrize("elements", [1, 3000, 20000])
@pytest.mark.parametrize("kind", MASKS)
def test_tiles_do_not_change_the_log_sum_exp(monkeypatch, kind, elements):
    query, key = tensors((2, 4, 100, 8), (2, 2, 60, 8))
    mask = some_mask(kind, 2, 4, 100, 60)
    monkeypatch.setattr(attention, "_TILE_ELEMENTS", elements)
    close(tiled_log_sum_exp(query, key, mask=mask), full_logits(query, key, mask))


@BOTH
@pytest.mark.parametrize("masked", [-math.inf, "lowest", -1e9, -10000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_to_write_masked_is_the_same(dtype, masked, function):
    """bfloat16 writes -10000 as -9984; a row with nothing left is -inf in all of them."""
    masked = torch.finfo(dtype).min if masked == "lowest" else masked
    query, key = tensors((2, 4, 40, 16), (2, 4, 40, 16), dtype=dtype)
    kept = some_mask("pairs", 2, 4, 40, 40)
    kept[[0, 5]] = False
    additive = torch.zeros(40, 40, dtype=dtype).masked_fill(~kept, masked)
    lse = function(query, key, mask=additive)
    assert torch.equal(lse, function(query, key, mask=kept))
    assert (lse[:, :, [0, 5]] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 1:5]).all()


def test_a_mask_finer_than_the_query_is_not_rounded():
    (query,) = tensors((1, 2, 30, 8), dtype=torch.bfloat16)
    (mask,) = tensors((30, 30), seed=1)
    logits = full_logits(query, query, mask * 10)
    close(log_sum_exp(query, query, mask=mask * 10), logits)


@BOTH
def test_scale_is_a_factor_of_the_logits(function):
    query, key = tensors((1, 2, 9, 8), (1, 2, 9, 8), seed=3)
    close(function(query, key, scale=0.7), full_logits(query, key, scale=0.7))


@BOTH
def test_transposed_inputs_as_pipelines_pass_them(function):
    query, key = (x.transpose(1, 2) for x in tensors(*[(2, 80, 4, 16)] * 2, seed=6))
    lse = function(query, key)
    close(lse, full_logits(query, key))
    columns = query.mT.contiguous().mT  # elements of a row apart from each other
    close(function(columns, key), full_logits(query, key))


@BOTH
def test_float32_under_autocast_and_no_gradient(function):
    query, key = tensors((1, 2, 90, 16), (1, 2, 90, 16), seed=7)
    expected = function(query, key)
    query.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = function(query, key)
    assert torch.equal(actual, expected)
    assert not actual.requires_grad


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(queries, keys):
    query, key = tensors((2, 2, queries, 8), (2, 2, keys, 8))
    assert torch.equal(log_sum_exp(query, key), torch.full((2, 2, queries), -math.inf))


@pytest.mark.parametrize("masked", [False, True])
def test_never_a_full_map(masked):
    query, key = tensors(*[(1, 2, 1024, 16)] * 2)
    mask = torch.arange(1024) < 1000 if masked else None
    with LargestTensor() as largest:
        _ = query @ key.mT
    assert largest.elements == 2 * 1024 * 1024
    with LargestTensor() as largest:
        log_sum_exp(query, key, mask=mask)
        tiled_log_sum_exp(query, key, mask=mask)
    assert largest.elements < 1024 * 1024


def test_no_memory_is_no_reason_to_try_another_kernel(monkeypatch):
    """The error is a RuntimeError, as is the one of a kernel that does not take the inputs."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(attention, "_xformers_forward", lambda: full)
    (query,) = tensors((1, 2, 9, 8))
    with pytest.raises(torch.OutOfMemoryError):
        attention._cuda_kernel(query, query, None, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [128, 145])
@pytest.mark.parametrize("size", [64, 128, 20])
def test_kernels_of_the_gpu(size, tokens, dtype, kind):
    query, key = tensors(*[(2, 4, tokens, size)] * 2, dtype=dtype)
    mask = some_mask(kind, 2, 4, tokens, tokens)
    mask = mask.to(dtype) if kind == "additive" else mask
    lse = log_sum_exp(query.cuda(), key.cuda(), None if mask is None else mask.cuda())
    expected = full_lse(full_logits(query, key, mask))
    np.testing.assert_allclose(lse.cpu().numpy(), expected, rtol=1e-5, atol=1e-3)


def test_a_given_log_sum_exp_stays():
    (query,) = tensors((1, 2, 9, 8))
    lse = torch.zeros(1, 2, 9)
    assert Attention.checked(query, query, lse=lse).with_lse().lse is lse


def test_every_second_query():
    query, key, lse = tensors((2, 4, 9, 8), (2, 4, 7, 8), (2, 4, 9))
    mask = some_mask("pairs", 2, 4, 9, 7)
    half = Attention.checked(query, key, mask, 0.3, lse).every(2)
    expected = Attention.checked(query[:, :, ::2], key, mask[::2], 0.3, lse[:, :, ::2])
    assert torch.equal(half.tiled_lse(), expected.tiled_lse())
    assert torch.equal(half.lse, expected.lse)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda q: Attention.checked(q, q[:, :, :, :4]),
            r"key: has shape \[1, 4, 6, 4\], query \[1, 4, 6, 8\]",
        ),
        (
            lambda q: Attention.checked(q, q[:, :3]),
            "key: has 3 heads, which do not divide query's 4",
        ),
        (lambda q: Attention.checked(q[0], q), r"pass \[batch, heads, tokens, head size\]"),
        (
            lambda q: Attention.checked(q, q, torch.ones(5, 6, dtype=torch.bool)),
            r"mask: has shape \[5, 6\], which does not broadcast to \[1, 4, 6, 6\]",
        ),
        (
            lambda q: Attention.checked(q, q, lse=torch.zeros(1, 4, 5)),
            r"lse: has shape \[1, 4, 5\], but query needs \[1, 4, 6\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 4, 6, 8))
