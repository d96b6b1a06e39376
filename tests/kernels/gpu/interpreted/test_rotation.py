"""Rotated tokens and weights in Triton's interpreter, every byte against the reference."""

import os
from dataclasses import replace

import pytest
import torch

from dialect_kernels import (
    DIALECT_FP4,
    SEMANTIC_32,
    PackedTensor,
    baselines,
    cpu,
    dialect_linear,
    quantize,
    reference,
    semantic_linear,
)
from dialect_kernels.formatbook import BLOCK_SIZES
from dialect_kernels.rotation import rotate_activation, rotate_weight
from tests.support.quantizer_cases import (
    DTYPES,
    all_pairs,
    decompose,
    reference_fp8,
    same_rows,
    tensor,
)
from tests.support.rotated import ROTATED, assert_bits, hard_rows, unrotated

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from dialect_kernels.gpu import linear
from dialect_kernels.gpu.layout import RowConfig
from dialect_kernels.gpu.quantize_activations import quantize_activation
from dialect_kernels.gpu.quantize_fp8 import quantize_activation_fp8
from dialect_kernels.gpu.quantize_packed import quantize_weight
from dialect_kernels.gpu.rotation import rotate_tokens

BOOKS = (DIALECT_FP4, SEMANTIC_32)

all_books = pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
all_blocks = pytest.mark.parametrize("block_size", BLOCK_SIZES)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rows_of(dtype: torch.dtype, columns: int = 96) -> torch.Tensor:
    """`hard_rows` without subnormal bfloat16, which the interpreter misreads."""
    x = hard_rows(columns).to(dtype)
    return torch.where(x.abs() < 2.0**-126, 0.0, x) if dtype == torch.bfloat16 else x


@all_pairs
def test_activations_are_rotated_before_they_are_rounded(dtype, block_size, book):
    x = rows_of(dtype)
    want = reference_fp8(rotate_activation(x), book, block_size)
    assert same_rows(quantize_activation(x, book, block_size, rotation=ROTATED), want)
    assert not same_rows(reference_fp8(x, book, block_size), want)


@all_dtypes
def test_fp8_tokens_are_rotated_before_they_are_scaled(dtype):
    x = rows_of(dtype)
    q, scale = baselines.quantize_fp8(rotate_activation(x))
    padded = torch.nn.functional.pad(q.view(torch.uint8), (0, 32))
    assert same_rows(quantize_activation_fp8(x, 64, rotation=ROTATED), (padded, scale))


@all_books
def test_rows_longer_than_a_chunk(book):
    x, config = tensor(2, 352, seed=4), RowConfig(128, 1)
    x[:, -1] = 1e4  # the row's largest block is its last
    want = reference_fp8(rotate_activation(x), book, 64)
    assert same_rows(quantize_activation(x, book, 64, rotation=ROTATED, config=config), want)
    q, scale = baselines.quantize_fp8(rotate_activation(x))
    got = quantize_activation_fp8(x, rotation=ROTATED, config=config)
    assert same_rows(got, (q.view(torch.uint8), scale))
    window = book.largest_stored_delta
    got = quantize_weight(x, book, 16, "mse", window, ROTATED, config)
    want = reference.quantize(x, book, 16, rotation=ROTATED)
    assert all(torch.equal(a, b) for a, b in zip(got.tensors, want.tensors, strict=True))


@all_dtypes
@pytest.mark.parametrize("columns", [0, 32, 96, 8224])
def test_sixteen_bit_tokens_are_rounded_once(columns, dtype):
    x = rows_of(dtype, columns) if columns else torch.zeros(3, 0, dtype=dtype)
    x = x[:2] if columns > 96 else x
    assert_bits(rotate_tokens(x), rotate_activation(x).to(dtype))
    if columns == 96:
        assert_bits(rotate_tokens(x[::2, 32:]), rotate_activation(x[::2, 32:]).to(dtype))
        assert_bits(rotate_tokens(x[:, :32]), rotate_activation(x[:, :32]).to(dtype))


def test_columns_that_cannot_be_rotated_are_refused():
    for quantizer in (quantize_activation, quantize_activation_fp8):
        with pytest.raises(ValueError, match="x: has 40 columns; rotation 'hadamard_32' needs"):
            quantizer(torch.zeros(2, 40), rotation=ROTATED)


@all_pairs
def test_weights_are_rotated_before_they_are_quantized(dtype, block_size, book):
    w = rows_of(dtype)
    w = w[rotate_weight(w).isfinite().all(dim=1)]
    assert len(w) > 9
    want = reference.quantize(w, book, block_size, rotation=ROTATED)
    got = quantize_weight(w, book, block_size, "mse", book.largest_stored_delta, ROTATED)
    assert got.rotation == ROTATED
    assert all(torch.equal(a, b) for a, b in zip(got.tensors, want.tensors, strict=True))


@all_blocks
def test_salient_and_grouped_tokens(block_size):
    x = tensor(7, 160, seed=2).to(torch.bfloat16)
    x[2] = float("nan")
    turned = rotate_activation(x)
    group = torch.tensor([3, 3, 3, -1, 0, 0, 3], dtype=torch.int32)
    salient = torch.tensor([0, 3, 6, 2])
    for config in (None, RowConfig(128, 1)):
        got = quantize_activation(
            x, SEMANTIC_32, block_size, salient=salient, group=group, rotation=ROTATED,
            config=config,
        )  # fmt: skip
        plain = quantize_activation(turned, SEMANTIC_32, block_size, salient=salient, group=group)
        assert same_rows(got, (plain[0].view(torch.uint8), plain[1]))
    got = quantize_activation(x, SEMANTIC_32, block_size, salient=salient, rotation=ROTATED)
    first = reference.round_activation(x, SEMANTIC_32, block_size, rotation=ROTATED)
    residual = reference_fp8(decompose(turned, first, salient), SEMANTIC_32, block_size)
    assert torch.equal(got[0].view(torch.uint8)[7:], residual[0])


def product(x, p, activation_format, accumulation="default", bias=None):
    assert linear.covers(x, p, activation_format, accumulation)
    return linear.dialect_linear(x, p, bias, activation_format, accumulation)


@all_pairs
@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_products(activation_format, dtype, block_size, book):
    """As those of rotated tokens with the same bytes, to the last bit."""
    if activation_format == "none" and dtype == torch.float32:  # which has no kernel
        dtype = torch.bfloat16
    bias = torch.randn(20)
    x = torch.cat([rows_of(dtype)[:13], tensor(4, 96, seed=5).to(dtype)])
    p = quantize(tensor(20, 96, seed=1) / 50, book, block_size, rotation=ROTATED)
    turned = rotate_activation(x)
    turned = turned.to(dtype) if activation_format == "none" else turned
    for rows in (1, len(x)):  # few tokens, and more than a tile
        got = product(x[:rows], p, activation_format, bias=bias)
        want = product(turned[:rows], unrotated(p), activation_format, bias=bias)
        assert_bits(got, want.to(dtype))
    if activation_format == "dialect":
        got = product(x, p, activation_format, "exact", bias)
        assert_bits(got, reference.dialect_linear(x, p, bias, activation_format))


def test_the_ops_run_the_kernels(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    w, x, bias = tensor(24, 96, seed=1), tensor(5, 96), torch.randn(24)
    want = reference.quantize(w, SEMANTIC_32, 16, rotation=ROTATED)
    products = [
        reference.dialect_linear(x, want, bias),
        reference.semantic_linear(x, want, bias, torch.tensor([1, 3])),
    ]
    monkeypatch.setattr(reference, "pack_rounded", None)
    monkeypatch.setattr(reference, "dialect_linear", None)
    monkeypatch.setattr(PackedTensor, "dequantize", None)
    p = quantize(w, SEMANTIC_32, 16, rotation=ROTATED)
    assert p.rotation == ROTATED
    assert torch.equal(p.codes, want.codes)
    assert torch.equal(dialect_linear(x, p, bias, accumulation="exact"), products[0])
    got = semantic_linear(x, p, bias, torch.tensor([1, 3]))
    assert (got - products[1]).abs().max() <= 1e-5 * products[1].abs().max()
    linear.warm_up(replace(p, rotation="none"), "none", torch.bfloat16)
    linear.warm_up(p, "none", torch.bfloat16)
