"""The Triton kernels on views of other tensors: the bits of what lies in one piece."""

import os

import pytest
import torch

from dialect_kernels import SEMANTIC_32, PackedExperts, PackedTensor, gpu, quantize

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from dialect_kernels.gpu import layout
from dialect_kernels.gpu.quantize_activations import quantize_activation
from dialect_kernels.gpu.quantize_fp8 import quantize_activation_fp8
from dialect_kernels.gpu.quantize_packed import quantize_weight
from dialect_kernels.gpu.rotation import rotate_tokens
from tests.support.views import apart, shifted, transposed

views = pytest.mark.parametrize("view", [apart, shifted, transposed])
every_other = pytest.mark.parametrize("view", [apart, shifted])


def tensor(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def of_vector(view):
    """The view of a tensor of one dimension."""
    return apart if view is transposed else view


def viewed(p, view):
    codes, meta, exponent = p.tensors
    stored = (view(codes), view(meta), of_vector(view)(exponent))
    return PackedTensor(*stored, p.shape, p.book, p.block_size, p.rotation)


def equal(found, want):
    """The same bits, NaN included."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(found, want, strict=True)
    )


@views
def test_quantizers(view):
    x = tensor(5, 96)
    salient, group = torch.tensor([1, 4]), (torch.arange(5) % 3 - 1).int()
    of_rows = of_vector(view)
    given = {"salient": of_rows(salient), "group": of_rows(group)}
    found = quantize_activation(view(x), SEMANTIC_32, **given)
    assert equal(found, quantize_activation(x, SEMANTIC_32, salient=salient, group=group))
    assert equal(quantize_activation_fp8(view(x)), quantize_activation_fp8(x))
    arguments = (SEMANTIC_32, 32, "lut", 7)
    found, want = quantize_weight(view(x), *arguments), quantize_weight(x, *arguments)
    assert equal(found.tensors, want.tensors)
    assert equal([rotate_tokens(view(x))], [rotate_tokens(x)])


@every_other
@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_products(activation_format, view):
    p, x, bias = quantize(tensor(48, 96)), tensor(3, 96).bfloat16(), tensor(48)
    want = gpu.dialect_linear(x, p, bias, activation_format, "default")
    given = (view(x), viewed(p, view), of_vector(view)(bias))
    assert equal([gpu.dialect_linear(*given, activation_format, "default")], [want])


@every_other
def test_decomposed_tokens_and_rows(view):
    p, x, bias = quantize(tensor(48, 96), SEMANTIC_32), tensor(6, 96), tensor(48)
    salient, group = torch.tensor([2, 5]), (torch.arange(6) % 3 - 1).int()
    want = gpu.semantic_linear(x, p, bias, salient, group)
    of_rows = of_vector(view)
    given = (view(x), viewed(p, view), of_rows(bias), of_rows(salient), of_rows(group))
    assert equal([gpu.semantic_linear(*given)], [want])
    want = gpu.embedding(salient, p, torch.float16)
    assert equal([gpu.embedding(of_rows(salient), given[1], torch.float16)], [want])


@views
def test_experts(view):
    experts = PackedExperts.stack([quantize(tensor(48, 96) + i) for i in range(3)])
    x, bias, rows = tensor(7, 96), tensor(3, 48), torch.tensor([0, 6, 3, 3])
    offsets, formats = torch.tensor([0, 1, 1, 4]), ("dialect", "default")
    want = gpu.grouped_linear(x, rows, offsets, experts, bias, *formats)
    given = PackedExperts(viewed(experts.together, view), 3)
    of_rows = of_vector(view)
    numbers = (of_rows(rows), of_rows(offsets))
    assert equal([gpu.grouped_linear(view(x), *numbers, given, view(bias), *formats)], [want])


def test_what_can_be_read_is_not_copied():
    x = torch.empty(64, 128, dtype=torch.bfloat16)
    for part in (x, x[:3], x[:, :96], x[:, 16:80], x[5:6, :32], x[1::2]):
        assert layout.readable_rows(part) is part
    for part in (x[:, 1:97], x.T, x[:, ::2], x[:, :97][:, 1:]):
        copy = layout.readable_rows(part)
        assert copy is not part
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
