"""The quantizers on a real GPU: inline PTX against the reference, byte for byte.

What the interpreter cannot show. Matrices of 16384 x 16384 are compared with the CPU kernel, which
has the reference's bytes and is fast enough.
"""

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, baselines, cpu, quantize, reference
from dialect_kernels.formatbook import BLOCK_SIZES
from tests.support.quantizer_cases import (
    adversarial,
    decompose,
    reference_fp8,
    round_groups,
    tensor,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LARGE = 16384

all_books = pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda b: b.name)
all_blocks = pytest.mark.parametrize("block_size", BLOCK_SIZES)
all_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


def activation(x, *arguments, **options):
    """``quantize_activation`` on the GPU, as bytes and scales on the CPU."""
    from dialect_kernels.gpu.quantize_activations import quantize_activation

    on_gpu = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in options.items()}
    q, scale = quantize_activation(x.to(DEVICE), *arguments, **on_gpu)
    return q.view(torch.uint8).cpu(), scale.cpu()


def assert_same(got, want):
    assert torch.equal(got[0], want[0].view(torch.uint8))
    assert torch.equal(got[1].view(torch.int32), want[1].view(torch.int32))


def large(dtype, seed):
    """Random numbers with outlier columns and blocks far below the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(LARGE, LARGE, generator=generator)
    x *= torch.exp2(torch.randint(-9, 10, (1, LARGE), generator=generator).float())
    return x.to(dtype)


@all_blocks
@all_books
@all_dtypes
def test_tokens(dtype, book, block_size):
    for x in (adversarial(block_size), tensor(33, 4096), tensor(5, 9000, 1)):
        x = x.to(dtype)
        assert_same(activation(x, book, block_size), reference_fp8(x, book, block_size))


@all_dtypes
def test_fp8_tokens(dtype):
    from dialect_kernels.gpu.quantize_fp8 import quantize_activation_fp8

    for x in (adversarial(32), tensor(33, 4096), tensor(5, 9024, 1)):
        x = x.to(dtype)
        q, scale = quantize_activation_fp8(x.to(DEVICE))
        want, want_scale = baselines.quantize_fp8(x)
        finite = x.isfinite().all(dim=1)
        assert torch.equal(q.view(torch.uint8).cpu()[finite], want.view(torch.uint8)[finite])
        assert torch.equal(scale.cpu()[finite], want_scale[finite])
        assert scale.cpu()[~finite].isnan().all()


@all_blocks
def test_decomposed_and_grouped_tokens(block_size):
    x = tensor(70, 1024)
    salient, group = torch.arange(0, 70, 9), (torch.arange(70) % 7 - 1).to(torch.int32)
    first = round_groups(x, SEMANTIC_32, block_size, group)
    left_over = round_groups(decompose(x, first, salient), SEMANTIC_32, block_size)
    q, scale = activation(x, SEMANTIC_32, block_size, salient=salient, group=group)
    values = q.view(torch.float8_e4m3fn).double() * scale.double()[:, None]
    assert torch.equal(values, torch.cat([first, left_over]).double())


@all_blocks
@all_books
@all_dtypes
def test_weights_by_exact_error(dtype, book, block_size):
    for x in (adversarial(block_size)[:11], tensor(65, 4096), tensor(3, 9000, 1)):
        x = x.to(dtype)
        x = x[x.isfinite().all(dim=1)]
        got = quantize(x.to(DEVICE), book, block_size)
        want = reference.quantize(x, book, block_size)
        for name in ("codes", "meta", "row_exponent"):
            assert torch.equal(getattr(got, name).cpu(), getattr(want, name))


@all_books
def test_a_large_weight(book):
    x = large(torch.bfloat16, seed=1)
    got = quantize(x.to(DEVICE), book)
    want = cpu.quantize(x, book, 32, "mse", book.largest_stored_delta, "none")
    for name in ("codes", "meta", "row_exponent"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name))


@all_books
def test_many_tokens(book):
    x = large(torch.bfloat16, seed=2)
    q, scale = activation(x, book, 32)
    some = torch.arange(LARGE - 1, -1, -61)  # the last row among them
    values = q.view(torch.float8_e4m3fn)[some].float() * scale[some, None]
    assert torch.equal(values, reference.round_activation(x[some], book, 32))


def test_the_fp8_accumulator_holds_a_block():
    """13 bits: what the mode `exact` would need to run on FP8, and less than a float32 has."""
    from benchmarks.lib.probes import fp8_accumulator_bits

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    bits = fp8_accumulator_bits(DEVICE)
    print(bits)
    assert bits["within"] >= 13
