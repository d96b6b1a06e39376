"""The activation quantizer in Triton's interpreter, every byte against the reference.

The interpreter runs the arithmetic twins of the inline PTX; tests/kernels/compiled compares the
two.
"""

import os

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, reference
from dialect_kernels.formatbook import BLOCK_SIZES

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from dialect_kernels.activation_quantizer import RowConfig, quantize_activation

BOOKS = (DIALECT_FP4, SEMANTIC_32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (0, 1, 2, 3, 8, 15, 16, 17, 31, 33, 64, 65, 127, 257)
NAN, INF = float("nan"), float("inf")

all_books = pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
all_blocks = pytest.mark.parametrize("block_size", BLOCK_SIZES)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh tensors hold NaN, or bytes of NaN, so that an element that is not written shows."""
    allocate = torch.empty

    def poisoned(*size, **options):
        fresh = allocate(*size, **options)
        return fresh.fill_(NAN if fresh.is_floating_point() else 0x7F)

    monkeypatch.setattr(torch, "empty", poisoned)


def expected(x, book, block_size):
    """(E4M3 bytes [T, Kp], scale [T]) from the reference's values and the spec's row exponent."""
    values = reference.round_activation(x, book, block_size)
    largest = x.to(torch.float32).abs().amax(dim=1)
    exponent = (torch.frexp(largest).exponent - 3).clamp(min=-120)  # frexp: mantissa in [0.5, 1)
    exponent = torch.where(largest == 0, -120, exponent)
    scale = torch.ldexp(torch.ones(len(x), dtype=torch.float64), exponent - 5)
    scale = torch.where(largest.isfinite(), scale, NAN)
    units = torch.where(largest.isfinite()[:, None], values.double() / scale[:, None], 0.0)
    q = units.to(torch.float32).to(torch.float8_e4m3fn)
    assert torch.equal(q.double(), units), "the values are E4M3 numbers"
    padding = -x.shape[1] % block_size
    q = torch.nn.functional.pad(q.view(torch.uint8), (0, padding))
    return q, scale.to(torch.float32)


def assert_rows(got, want):
    q, scale = got
    want_q, want_scale = want
    assert q.dtype == torch.float8_e4m3fn
    assert torch.equal(q.view(torch.uint8), want_q)
    assert scale.dtype == torch.float32
    assert torch.equal(scale.view(torch.int32), want_scale.view(torch.int32))


def tensor(rows, columns, seed=0):
    """Values that use every cell, all signs and several blocks' exponents."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.exp2(torch.randint(-6, 7, (rows, columns), generator=generator).float())


def adversarial(block_size):
    """Rows that a quantizer could get wrong, float32 [rows, 4 blocks]."""
    B = block_size
    steps = torch.arange(4 * B)
    rows = [
        torch.zeros(4 * B),
        -torch.zeros(4 * B),
        torch.full((4 * B,), 1e-45),
        steps * 1e-45,
        torch.where(steps == 0, 2.0**-118, steps * 2.0**-130),
        # one block each at gaps of 0, 13, 14 and 100 binades below the row's top
        tensor(1, B, 1)[0].clamp(-7, 7).repeat(4)
        * torch.exp2(torch.tensor([0.0, -13, -14, -100])).repeat_interleave(B),
        (steps % 33 - 16) / 4,  # every cell's edge: midpoints and levels
        (steps % 65 - 32) / 8,
        torch.where(steps % B == 0, 7.99, (steps % 32) / 4.0),  # cell 31 saturates
        torch.where(steps % B == 0, 4.0, 0.24999),
        torch.full((4 * B,), 3.3e38) * torch.where(steps % 2 == 0, 1.0, -1.0),
        torch.where(steps == 5, NAN, steps.float()),
        torch.where(steps == 2 * B, -INF, steps.float()),
        torch.where(steps == 4 * B - 1, INF, 0.0),
        torch.where(steps == 1, NAN, INF),
    ]
    return torch.stack([row.to(torch.float32) for row in rows])


@all_blocks
@all_books
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bytes_as_the_reference(dtype, book, block_size):
    x = tensor(4, 200).to(dtype)
    assert_rows(quantize_activation(x, book, block_size), expected(x, book, block_size))


@pytest.mark.slow
@all_books
def test_any_number_of_tokens(book):
    x = tensor(max(TOKENS), 40).to(torch.bfloat16)
    want_q, want_scale = expected(x, book, 16)
    for tokens in TOKENS if book is DIALECT_FP4 else (0, 1, 3, 17):
        got = quantize_activation(x[:tokens], book, 16)
        assert_rows(got, (want_q[:tokens], want_scale[:tokens]))


@all_blocks
@all_books
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_rows(dtype, book, block_size):
    x = adversarial(block_size).to(dtype)
    assert_rows(quantize_activation(x, book, block_size), expected(x, book, block_size))


@all_books
@pytest.mark.parametrize("columns", [0, 1, 31, 33, 129])
def test_columns_are_padded_to_whole_blocks(columns, book):
    x = tensor(2, columns).to(torch.bfloat16)
    if columns == 0:
        q, scale = quantize_activation(x, book, 32)
        assert q.shape == (2, 0)
        assert scale.tolist() == [2.0**-125] * 2
    else:
        assert_rows(quantize_activation(x, book, 32), expected(x, book, 32))


@all_books
def test_rows_longer_than_a_chunk(book):
    x = tensor(2, 700)
    x[:, -1] = 1e4  # the row's largest block is its last
    want = expected(x, book, 32)
    for chunk in (128, 256, 512, 1024):
        assert_rows(quantize_activation(x, book, 32, config=RowConfig(chunk, 4)), want)


def test_strided_tokens_are_read_as_they_look():
    x = tensor(6, 96).to(torch.bfloat16)
    for view in (x[::2], x[:, :64], x[:, ::3], x.T):
        assert_rows(quantize_activation(view, DIALECT_FP4, 32), expected(view, DIALECT_FP4, 32))


@all_blocks
def test_permuted_columns(block_size):
    x = tensor(2, 112)
    want_q, want_scale = expected(x, DIALECT_FP4, block_size)
    padded = torch.nn.functional.pad(want_q, (0, 128 - want_q.shape[1]))
    halves = padded.view(2, 4, 2, 16)
    permuted = torch.cat([halves[:, :, 0].flatten(1), halves[:, :, 1].flatten(1)], dim=1)
    assert_rows(
        quantize_activation(x, DIALECT_FP4, block_size, permuted=True), (permuted, want_scale)
    )
