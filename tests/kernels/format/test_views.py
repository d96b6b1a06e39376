"""Arguments that are views of other tensors give the bits of those that are not."""

import pytest
import torch

from dialect_kernels import (
    SEMANTIC_32,
    PackedExperts,
    PackedTensor,
    dialect_embedding,
    dialect_linear,
    expert_linear,
    ops,
    quantize,
    semantic_linear,
)
from tests.support.views import apart, shifted

views = pytest.mark.parametrize("view", [apart, shifted])


def tensor(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def viewed(p, view):
    return PackedTensor(*map(view, p.tensors), p.shape, p.book, p.block_size, p.rotation)


@views
def test_a_packed_tensor_holds_its_bytes_one_behind_the_other(view):
    p = quantize(tensor(20, 96))
    found = viewed(p, view)
    assert all(tensor.is_contiguous() for tensor in found.tensors)
    assert all(map(torch.equal, found.tensors, p.tensors))
    assert torch.equal(found.dequantize(), p.dequantize())


def test_a_contiguous_tensor_is_not_copied():
    p = quantize(tensor(20, 96))
    again = PackedTensor(*p.tensors, p.shape, p.book, p.block_size)
    assert [t.data_ptr() for t in again.tensors] == [t.data_ptr() for t in p.tensors]


@views
@pytest.mark.parametrize("accumulation", ["default", "exact"])
@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_products(activation_format, accumulation, view):
    p, x, bias = quantize(tensor(48, 96)), tensor(5, 96), tensor(48)
    want = dialect_linear(x, p, bias, activation_format, accumulation)
    given = (view(x), viewed(p, view), view(bias))
    assert torch.equal(dialect_linear(*given, activation_format, accumulation), want)


@views
def test_decomposed_tokens(view):
    p, x, bias = quantize(tensor(48, 96), SEMANTIC_32), tensor(10, 96), tensor(48)
    salient, group = torch.tensor([2, 5, 9]), torch.arange(10) % 3 - 1
    want = semantic_linear(x, p, bias, salient, group)
    given = (view(x), viewed(p, view), view(bias), view(salient), view(group))
    assert torch.equal(semantic_linear(*given), want)
    numbers = (view(salient), view(group.int()))
    found = ops.semantic_op(given[0], *given[1].op_arguments(given[2]), *numbers)
    assert torch.equal(found, want)


@views
def test_experts_and_embeddings(view):
    experts = PackedExperts.stack([quantize(tensor(48, 96) + i) for i in range(3)])
    x, bias = tensor(7, 96), tensor(3, 48)
    rows, offsets = torch.tensor([0, 6, 3, 3]), torch.tensor([0, 1, 1, 4])
    want = expert_linear(x, experts, offsets, rows, bias)
    given = PackedExperts(viewed(experts.together, view), 3)
    assert torch.equal(expert_linear(view(x), given, view(offsets), view(rows), view(bias)), want)
    codes, meta, exponent, _, *rest = experts.op_arguments(None)
    stored = (view(codes), view(meta), view(exponent), view(bias))
    numbers = (view(rows), view(offsets))
    found = ops.grouped_linear(view(x), *numbers, *stored, *rest, "dialect", "exact")
    want = expert_linear(x, experts, offsets, rows, bias, "dialect", "exact")
    assert torch.equal(found, want)
    p = experts[0]
    assert torch.equal(dialect_embedding(view(rows), viewed(p, view)), p.dequantize()[rows])


@views
def test_quantizing(view):
    x = tensor(20, 96)
    assert all(map(torch.equal, quantize(view(x)).tensors, quantize(x).tensors))
