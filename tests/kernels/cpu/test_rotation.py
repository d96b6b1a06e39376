"""The CPU kernel rotates as the reference does: the same bits with every instruction set."""

from itertools import product

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, cpu, ops, reference
from dialect_kernels.cpu import calls
from dialect_kernels.rotation import rotate_activation, rotate_weight
from tests.support.rotated import ROTATED, assert_bits, hard_rows, unrotated

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"no CPU kernel: {cpu.why_not()}")

BOOKS = [DIALECT_FP4, SEMANTIC_32]
BLOCK_SIZES = [16, 32, 64]
FORMATS = ["dialect", "fp8", "none"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INSTRUCTIONS = (
    cpu.INSTRUCTIONS[: cpu.INSTRUCTIONS.index(cpu.features()) + 1] if cpu.available() else ()
)

by_book = pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
by_block_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)
by_format = pytest.mark.parametrize("activation_format", FORMATS)


def random(rows: int, columns: int, seed: int, spread: float = 1.5) -> torch.Tensor:
    """Gaussian with log-normal channels."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp(spread * torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) * channels


@by_book
@by_block_size
def test_weights(block_size, book):
    rules = {"mse", book.online_rule}
    for dtype, columns, rule in product(DTYPES, (0, 32, 96, 256), rules):
        w = hard_rows(columns).to(dtype) if columns else torch.zeros(3, 0, dtype=dtype)
        w = w[rotate_weight(w).isfinite().all(dim=1)]
        window = book.largest_stored_delta
        want = reference.quantize(w, book, block_size, rule, rotation=ROTATED)
        below = reference.blocks_below_window(rotate_weight(w), block_size, window)
        for instructions, threads in product(INSTRUCTIONS, (1, 3)):
            got, counted = calls.quantize(
                w, book, block_size, rule, window, ROTATED, threads, instructions
            )
            assert (got.rotation, got.shape) == (ROTATED, want.shape)
            assert all(torch.equal(a, b) for a, b in zip(got.tensors, want.tensors, strict=True))
            assert torch.equal(counted, below)


def test_a_weight_that_overflows_is_marked():
    w = torch.ones(3, 64)
    w[1] = 2.0**124
    got = calls.quantize(w, DIALECT_FP4, 32, "mse", 13, ROTATED).packed
    assert got.row_exponent.tolist() == [3, -128, 3]
    assert not got.codes[1].any()


@by_format
@by_block_size
@by_book
def test_products(book, block_size, activation_format):
    """Few and many rows and tokens: every path of every instruction set."""
    for i, (rows, columns, dtype) in enumerate(product((1, 8, 33), (32, 96, 256), DTYPES)):
        w = random(rows, columns, seed=i)
        p = reference.quantize(w, book, block_size, rotation=ROTATED)
        x = torch.cat([random(20, columns, seed=1000 + i), hard_rows(columns, i)]).to(dtype)
        bias = random(1, rows, seed=2000 + i)[0].to(dtype) if i % 2 else None
        want = reference.dialect_linear(x, p, bias, activation_format)
        plain = reference.dialect_linear(x, unrotated(p), bias, activation_format)
        assert not torch.equal(want[:20], plain[:20])
        for tokens, instructions in product((1, 2, 7, len(x)), INSTRUCTIONS):
            got = calls.linear(x[-tokens:], p, bias, activation_format, instructions=instructions)
            assert_bits(got, want[-tokens:])


@by_block_size
def test_blocks_that_do_not_fit_into_digits(block_size):
    """Format `none` in bfloat16: single blocks of a rotated token are multiplied in float64."""
    x = random(9, 256, seed=3, spread=0.3)
    x[:, 64:96] = torch.where(torch.arange(32) % 8 == 0, 1e6, 0.0)
    x[4, 64] += 3.0
    x[5, 160:192] = 2.0 ** -torch.arange(32.0)
    p = reference.quantize(random(24, 256, seed=4), SEMANTIC_32, block_size, rotation=ROTATED)
    for dtype, instructions in product(DTYPES, INSTRUCTIONS):
        got = calls.linear(x.to(dtype), p, None, "none", instructions=instructions)
        assert_bits(got, reference.dialect_linear(x.to(dtype), p, None, "none"))


@by_block_size
@by_book
def test_salient_and_grouped_tokens(book, block_size):
    w = random(21, 160, seed=5)
    p = reference.quantize(w, book, block_size, rotation=ROTATED)
    for dtype in DTYPES:
        x = torch.cat([random(9, 160, seed=6), hard_rows(160)]).to(dtype)
        turned, salient = rotate_activation(x), torch.tensor([3, 0, 12, 20])
        variants = None
        if book is SEMANTIC_32:
            group = torch.arange(len(x)) % 3 - 1
            costs = calls.variant_costs(x, book, block_size, ROTATED)
            assert torch.equal(costs, calls.variant_costs(turned, book, block_size))
            variants = reference.group_variants(costs, group)
        for instructions in INSTRUCTIONS:
            got = calls.decomposed_linear(x, p, variants, salient, instructions=instructions)
            want = calls.decomposed_linear(turned, unrotated(p), variants, salient)
            assert_bits(got, want)
        bias = torch.randn(21)
        want = reference.semantic_linear(x, p, bias, salient)
        assert_bits(ops.semantic_linear(x, p, bias, salient), want)


@by_format
def test_results_do_not_depend_on_the_batch_or_the_threads(activation_format):
    p = reference.quantize(random(150, 320, seed=1), SEMANTIC_32, rotation=ROTATED)
    x = random(200, 320, seed=2).to(torch.bfloat16)
    batched = calls.linear(x, p, None, activation_format, threads=1)
    one_by_one = torch.cat([calls.linear(row[None], p, None, activation_format) for row in x])
    assert_bits(one_by_one, batched)
    for threads, instructions in product((2, 4), INSTRUCTIONS):
        options = {"threads": threads, "instructions": instructions}
        assert_bits(calls.linear(x, p, None, activation_format, **options), batched)


def test_the_back_end_computes_rotated_products(monkeypatch):
    for name in ("pack_rounded", "dialect_linear", "semantic_linear"):
        monkeypatch.setattr(reference, name, None)
    x = random(3, 64, seed=1)
    p = ops.quantize(random(8, 64, seed=2), SEMANTIC_32, rotation=ROTATED)
    assert p.rotation == ROTATED
    for activation_format in FORMATS:
        assert ops.dialect_linear(x, p, None, activation_format).isfinite().all()
    group = torch.tensor([0, 0, -1])
    assert ops.semantic_linear(x, p, None, torch.tensor([0]), group).isfinite().all()
