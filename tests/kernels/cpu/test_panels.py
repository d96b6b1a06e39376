"""Products of many tokens in the mode ``default``, panel by panel, against float64.

The bound is that of float32 sums of exact products, whatever their order: ``K * 2**-24`` of the sum
of magnitudes, and half a unit of the output's type.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedTensor, cpu, ops, reference
from dialect_kernels.baselines import quantize_fp8
from dialect_kernels.cpu import calls
from dialect_kernels.rotation import rotate_activation

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=f"no kernel: {cpu.why_not()}"),
    pytest.mark.usefixtures("poisoned_outputs"),
]

BOOKS = {16: SEMANTIC_32, 32: DIALECT_FP4, 64: SEMANTIC_32}
FORMATS = ["dialect", "fp8", "none"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INSTRUCTIONS = (
    cpu.INSTRUCTIONS[1 : cpu.INSTRUCTIONS.index(cpu.features()) + 1] if cpu.available() else ()
)
FEWEST = {"dialect": 4, "fp8": 2, "none": 2}
"""From so many tokens on, panels are used with AMX; with other instructions from more on."""

by_format = pytest.mark.parametrize("activation_format", FORMATS)


def random(rows: int, columns: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp(spread * torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) * channels


def factors(x: torch.Tensor, p: PackedTensor, activation_format: str) -> tuple[torch.Tensor, ...]:
    """What is multiplied: tokens and weight, float64."""
    rounded = rotate_activation(x, p.rotation)
    if activation_format == "dialect":
        rounded = reference.round_activation(rounded, p.book, p.block_size)
    elif activation_format == "fp8":
        q, scale = quantize_fp8(rounded)
        rounded = q.double() * scale.double()[:, None]
    else:
        rounded = rounded.to(x.dtype)
    return rounded.double(), p.dequantize().double()


def assert_close(
    got: torch.Tensor,
    x: torch.Tensor,
    p: PackedTensor,
    activation_format: str,
    bias: torch.Tensor | None = None,
) -> None:
    a, b = factors(x, p, activation_format)
    want, magnitude = a @ b.T, a.abs() @ b.abs().T
    if bias is not None:
        want, magnitude = want + bias.double(), magnitude + bias.double().abs()
    allowed = (x.shape[1] + 4) * 2**-24 * magnitude
    allowed = allowed + want.abs() * torch.finfo(got.dtype).eps / 2 + torch.finfo(got.dtype).tiny
    assert got.dtype == x.dtype
    assert torch.equal(got.isfinite(), want.abs() <= torch.finfo(got.dtype).max)
    beyond = ((got.double() - want).abs() > allowed) & got.isfinite()
    assert not bool(beyond.any()), beyond.nonzero()[0].tolist()


@by_format
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_every_edge_is_within_the_bound(block_size, activation_format):
    tokens = [FEWEST[activation_format], 16, 17, 33, 64, 95]
    shapes = [(1, 32), (15, 48), (16, 512), (17, 544), (33, 80), (130, 1040)]
    for i, ((rows, columns), dtype) in enumerate(product(shapes, DTYPES)):
        p = reference.quantize(random(rows, columns, seed=i), BOOKS[block_size], block_size)
        x = random(max(tokens), columns, seed=1000 + i).to(dtype)
        bias = random(1, rows, seed=2000 + i)[0].to(dtype) if i % 2 else None
        for count, instructions in product(tokens, INSTRUCTIONS):
            got = calls.linear(
                x[:count], p, bias, activation_format, "default", instructions=instructions
            )
            assert_close(got, x[:count], p, activation_format, bias)


@pytest.mark.skipif("avx512" not in INSTRUCTIONS, reason="needs AVX-512")
@pytest.mark.parametrize("dtype", DTYPES)
def test_avx512_has_the_bits_of_avx2(dtype):
    """Both add columns in their order and scale in float64; tiles have every ragged edge."""
    for rows, columns, tokens in [(1, 32, 40), (17, 80, 33), (130, 1040, 95), (33, 64, 70)]:
        p = reference.quantize(random(rows, columns, seed=rows))
        x = random(tokens, columns, seed=tokens)
        x[2, 3], x[7, 0], x[9, 1] = torch.nan, torch.inf, -torch.inf
        x[5] *= 2.0**10 if dtype == torch.float16 else 2.0**100
        x[6] *= 2.0**-14  # float16 has subnormal results, too
        x, biases = x.to(dtype), (None, random(1, rows, seed=1)[0])
        for bias, activation_format in product(biases, ("fp8", "none")):
            want, got = (
                calls.linear(x, p, bias, activation_format, "default", instructions=instructions)
                for instructions in ("avx2", "avx512")
            )
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@by_format
def test_more_tokens_than_a_tile_and_more_rows_than_a_panel(activation_format):
    p = reference.quantize(random(300, 96, seed=1))
    x = random(1030, 96, seed=2).to(torch.bfloat16)
    for threads, instructions in product([1, 3], INSTRUCTIONS):
        got = calls.linear(
            x, p, None, activation_format, "default", threads=threads, instructions=instructions
        )
        assert_close(got, x, p, activation_format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_the_rounded_tokens_have_the_bits_of_the_reference(block_size, dtype):
    """Multiplied with a weight whose diagonal is ones."""
    book, columns = BOOKS[block_size], 112
    p = reference.quantize(torch.eye(columns), book, block_size)
    assert torch.equal(p.dequantize(), torch.eye(columns))
    for spread in (0.5, 2.0, 6.0):
        x = random(75, columns, seed=int(spread), spread=spread)
        x[0], x[1], x[2, ::2], x[3, 1::2], x[4, :64] = 0.0, -0.0, 0.0, -0.0, -0.0
        x[5], x[6], x[7] = x[5] * 2.0**-120, x[6].sign() * 7.0, (x[7] * 2).round()
        given = x.to(dtype)
        given[~given.isfinite()] = 1.0
        want = reference.round_activation(given, book, block_size).to(dtype)
        for instructions in INSTRUCTIONS:
            got = calls.linear(given, p, None, "dialect", "default", instructions=instructions)
            assert torch.equal(got, want), (spread, instructions)


@by_format
def test_rotated_layers(activation_format):
    p = reference.quantize(random(40, 128, seed=1), SEMANTIC_32, rotation="hadamard_32")
    x = random(70, 128, seed=2).to(torch.bfloat16)
    got = calls.linear(x, p, None, activation_format, "default")
    assert_close(got, x, p, activation_format)


@by_format
def test_a_token_that_is_not_finite_is_alone(activation_format):
    """And numbers whose products float32 cannot hold are not lost."""
    p = reference.quantize(random(40, 64, seed=1))
    x = random(70, 64, seed=2)
    x[3, 5], x[17, 0], x[40, 63] = torch.nan, torch.inf, -torch.inf
    x[50] *= 2.0**-120
    x[60, :32] = 2.0**-140
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        exact = calls.linear(given, p, None, activation_format)
        for instructions in INSTRUCTIONS:
            got = calls.linear(
                given, p, None, activation_format, "default", instructions=instructions
            )
            assert torch.equal(got.isnan(), exact.isnan())
            assert torch.equal(got.isinf(), exact.isinf())
            for token in (50, 60):
                assert_close(got[token : token + 1], given[token : token + 1], p, activation_format)


@by_format
def test_a_row_of_the_weight_that_is_nan_is_alone(activation_format):
    p = reference.quantize(random(40, 64, seed=1))
    p.row_exponent[7] = -128
    x = random(70, 64, seed=2).to(torch.bfloat16)
    for instructions in INSTRUCTIONS:
        got = calls.linear(x, p, None, activation_format, "default", instructions=instructions)
        assert bool(got[:, 7].isnan().all())
        assert int(got.isnan().sum()) == len(x)


@by_format
def test_a_hundred_runs_are_identical(activation_format):
    p = reference.quantize(random(200, 256, seed=1))
    x = random(100, 256, seed=2).to(torch.bfloat16)
    first = calls.linear(x, p, None, activation_format, "default", threads=2)
    for _ in range(100):
        again = calls.linear(x, p, None, activation_format, "default", threads=2)
        assert torch.equal(again, first)


@by_format
def test_the_op_takes_the_mode(activation_format):
    """``exact`` has the reference's bits for any number of tokens."""
    p = reference.quantize(random(48, 512, seed=1))
    x = random(200, 512, seed=2).to(torch.bfloat16)
    exact = ops.dialect_linear(x, p, None, activation_format, "exact")
    assert torch.equal(exact[:4], reference.dialect_linear(x[:4], p, None, activation_format))
    assert torch.equal(exact, calls.linear(x, p, None, activation_format))
    assert_close(ops.dialect_linear(x, p, None, activation_format), x, p, activation_format)


def test_few_tokens_have_the_bits_of_exact_and_many_need_not():
    """In ``none``, whose float32 sums are hardly ever exact."""
    p = reference.quantize(random(64, 2048, seed=1))
    x = random(64, 2048, seed=2)
    for instructions in INSTRUCTIONS:
        for tokens in (FEWEST["none"] - 1, 64):
            exact = calls.linear(x[:tokens], p, None, "none", instructions=instructions)
            got = calls.linear(x[:tokens], p, None, "none", "default", instructions=instructions)
            assert torch.equal(got, exact) == (tokens < 64), (instructions, tokens)
