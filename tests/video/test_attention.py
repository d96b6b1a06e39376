"""Attention with its log-sum-exp, against the full map in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusers_hook.attention import attention
from diffusers_hook.attention.attention import attention_with_lse, log_sum_exp, tiled_log_sum_exp
from tests.video.support.full_attention import (
    DTYPES,
    MASKS,
    LargestTensor,
    full_attention,
    full_logits,
    full_lse,
    some_mask,
    tensors,
)

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


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("key_heads", "value_size"), [(4, 16), (2, 16), (4, 24)], ids=["plain", "grouped", "two_passes"]
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
    close(lse, logits, dtype)


@pytest.mark.parametrize("value_size", [16, 24], ids=["one_kernel", "two_passes"])
@pytest.mark.parametrize("masked", [-math.inf, "lowest", -10000.0])
def test_a_query_without_keys_gives_zeros(masked, value_size):
    """Softmax over equally low logits would be the mean of all values."""
    masked = torch.finfo(torch.float32).min if masked == "lowest" else masked
    query, key, value = tensors((1, 2, 9, 16), (1, 2, 9, 16), (1, 2, 9, value_size))
    mask = torch.zeros(9, 9)
    mask[4] = masked
    out, lse = attention_with_lse(query, key, value, mask=mask)
    assert (out[:, :, 4] == 0).all()
    assert (lse[:, :, 4] == -math.inf).all()
    assert (out[:, :, [3, 5]] != 0).all()


def test_a_mask_finer_than_the_query_is_not_rounded():
    (query,) = tensors((1, 2, 30, 8), dtype=torch.bfloat16)
    (mask,) = tensors((30, 30), seed=1)
    logits = full_logits(query, query, mask * 10)
    close(log_sum_exp(query, query, mask=mask * 10), logits)
    out, lse = attention_with_lse(query, query, query, mask=mask * 10)
    close(lse, logits)
    assert out.dtype == torch.bfloat16


@BOTH
def test_scale_is_a_factor_of_the_logits(function):
    query, key = tensors((1, 2, 9, 8), (1, 2, 9, 8), seed=3)
    close(function(query, key, scale=0.7), full_logits(query, key, scale=0.7))


def test_transposed_inputs_as_pipelines_pass_them():
    query, key, value = (x.transpose(1, 2) for x in tensors(*[(2, 80, 4, 16)] * 3, seed=6))
    out, lse = attention_with_lse(query, key, value)
    close(lse, full_logits(query, key))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value))
    columns = query.mT.contiguous().mT  # elements of a row apart from each other
    assert torch.equal(attention_with_lse(columns, key, value)[0], out)


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
    out, lse = attention_with_lse(query, key, key)
    assert torch.equal(out, torch.zeros(2, 2, queries, 8))
    assert torch.equal(lse, torch.full((2, 2, queries), -math.inf))


@pytest.mark.parametrize("masked", [False, True])
def test_never_a_full_map(masked):
    query, key, value = tensors(*[(1, 2, 1024, 16)] * 3)
    mask = torch.arange(1024) < 1000 if masked else None
    with LargestTensor() as largest:
        _ = query @ key.mT
    assert largest.elements == 2 * 1024 * 1024
    with LargestTensor() as largest:
        log_sum_exp(query, key, mask=mask)
        tiled_log_sum_exp(query, key, mask=mask)
        attention_with_lse(query, key, value, mask=mask)
    assert largest.elements < 1024 * 1024


def test_no_memory_is_no_reason_to_try_another_kernel(monkeypatch):
    """The error is a RuntimeError, as is the one of a kernel that does not take the inputs."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(attention, "_xformers_forward", lambda: full)
    (query,) = tensors((1, 2, 9, 8))
    with pytest.raises(torch.OutOfMemoryError):
        attention._cuda_kernel(query, query, query, None, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [128, 145])
@pytest.mark.parametrize("size", [64, 128, 20])
def test_kernels_of_the_gpu(size, tokens, dtype, kind):
    query, key, value = tensors(*[(2, 4, tokens, size)] * 3, dtype=dtype)
    mask = some_mask(kind, 2, 4, tokens, tokens)
    mask = mask.to(dtype) if kind == "additive" else mask
    logits = full_logits(query, key, mask)
    on_gpu = [x.cuda() for x in (query, key, value)]
    out, lse = attention_with_lse(*on_gpu, mask=None if mask is None else mask.cuda())
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    np.testing.assert_allclose(
        out.double().cpu().numpy(),
        full_attention(logits) @ value.double().numpy(),
        rtol=tolerance,
        atol=tolerance,
    )
    np.testing.assert_allclose(lse.cpu().numpy(), full_lse(logits), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda q: log_sum_exp(q, q[:, :, :, :4]),
            r"key: has shape \[1, 4, 6, 4\], query \[1, 4, 6, 8\]",
        ),
        (lambda q: log_sum_exp(q, q[:, :3]), "key: has 3 heads, which do not divide query's 4"),
        (lambda q: log_sum_exp(q[0], q), r"pass \[batch, heads, tokens, head size\]"),
        (
            lambda q: log_sum_exp(q, q, mask=torch.ones(5, 6, dtype=torch.bool)),
            r"mask: has shape \[5, 6\], which does not broadcast to \[1, 4, 6, 6\]",
        ),
        (lambda q: attention_with_lse(q, q, q[:, :, :5]), r"value: has shape \[1, 4, 5, 8\]"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 4, 6, 8))
