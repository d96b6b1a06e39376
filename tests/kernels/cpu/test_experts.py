"""Products with experts on the CPU: the bits of one product for each expert, for any distribution.

The product of one expert is compared with the reference elsewhere; here, too, where it is cheap.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from itertools import pairwise, product

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedExperts, PackedTensor, cpu, reference
from dialect_kernels.cpu import calls

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=f"no CPU kernel: {cpu.why_not()}"),
    pytest.mark.usefixtures("poisoned_outputs"),
]

BOOKS = {16: SEMANTIC_32, 32: DIALECT_FP4, 64: SEMANTIC_32}
FORMATS = ["dialect", "fp8", "none"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INSTRUCTIONS = (
    cpu.INSTRUCTIONS[: cpu.INSTRUCTIONS.index(cpu.features()) + 1] if cpu.available() else ()
)
COUNTS = (1, 0, 2, 7, 8, 9, 0, 15, 16, 17, 33, 64, 65, 97)
"""Rows of each expert: every way in which few and many tokens are multiplied, and tiles' edges."""

by_format = pytest.mark.parametrize("activation_format", FORMATS)


def random(rows: int, columns: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp(spread * torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) * channels


def experts_of(
    count: int, rows: int, columns: int, block_size: int = 32, rotation: str = "none"
) -> PackedExperts:
    book = BOOKS[block_size]
    return PackedExperts.stack(
        [
            reference.quantize(random(rows, columns, seed=i), book, block_size, rotation=rotation)
            for i in range(count)
        ]
    )


def offsets_of(counts: tuple[int, ...], first: int = 0) -> torch.Tensor:
    return torch.tensor([first, *counts]).cumsum(0)


def shuffled_rows(total: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Tokens in no order, most of them several times."""
    return torch.randint(tokens, (total,), generator=torch.Generator().manual_seed(seed))


def assert_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same bits, except that any NaN is as good as another."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    number = torch.int32 if want.dtype == torch.float32 else torch.int16
    assert torch.equal(*(torch.where(y.isnan(), 0.0, y).view(number) for y in (got, want)))


def one_by_one(
    x: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    experts: PackedExperts,
    bias: torch.Tensor | None,
    *options: str,
    instructions: str | None = None,
) -> torch.Tensor:
    """The same by products with one weight."""
    rows = torch.arange(len(x)) if rows is None else rows
    y = torch.zeros(len(rows), experts.shape[1], dtype=x.dtype)
    for expert, (first, end) in enumerate(pairwise(offsets.tolist())):
        added = None if bias is None else bias[expert]
        tokens = x[rows[first:end]]
        y[first:end] = calls.linear(
            tokens, experts[expert], added, *options, instructions=instructions
        )
    return y


@by_format
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("accumulation", ["exact", "default"])
def test_every_distribution_has_the_bits_of_single_products(
    block_size, activation_format, accumulation
):
    offsets = offsets_of(COUNTS, first=2)
    total = int(offsets[-1]) + 3
    rows = shuffled_rows(total, 60)
    options = (activation_format, accumulation)
    for i, ((features, columns), dtype) in enumerate(product([(7, 48), (35, 544)], DTYPES)):
        experts = experts_of(len(COUNTS), features, columns, block_size)
        x = random(60, columns, seed=1000 + i).to(dtype)
        bias = random(len(COUNTS), features, seed=2000 + i).to(dtype) if i % 2 else None
        for instructions in INSTRUCTIONS:
            got = calls.grouped_linear(
                x, rows, offsets, experts, bias, *options, instructions=instructions
            )
            want = one_by_one(x, rows, offsets, experts, bias, *options, instructions=instructions)
            assert_bits(got, want)
            assert not got[:2].any()
            assert not got[-3:].any()


@by_format
@pytest.mark.parametrize("rotation", ["none", "hadamard_32"])
def test_the_reference_row_by_row(activation_format, rotation):
    experts = experts_of(5, 24, 96, rotation=rotation)
    x = random(9, 96, seed=50).to(torch.bfloat16)
    bias = random(5, 24, seed=51)
    counts = (3, 0, 1, 10, 2)
    offsets, rows = offsets_of(counts), shuffled_rows(16, 9)
    expert_of_row = [e for e, count in enumerate(counts) for _ in range(count)]
    for threads, instructions in product([1, 2, 3], INSTRUCTIONS):
        got = calls.grouped_linear(
            x,
            rows,
            offsets,
            experts,
            bias,
            activation_format,
            threads=threads,
            instructions=instructions,
        )
        for row, expert in enumerate(expert_of_row):
            token = x[rows[row]][None]
            want = reference.dialect_linear(token, experts[expert], bias[expert], activation_format)
            assert_bits(got[row], want[0])


@by_format
def test_any_number_of_threads_and_more_rows_than_a_tile(activation_format):
    """And more tokens than the panels of one expert take together."""
    counts = (600, 1, 0, 530, 40)
    experts = experts_of(len(counts), 300, 64)
    x = random(400, 64, seed=3).to(torch.bfloat16)
    offsets, rows = offsets_of(counts), shuffled_rows(sum(counts), 400)
    for accumulation in ("exact", "default"):
        want = one_by_one(x, rows, offsets, experts, None, activation_format, accumulation)
        for threads in (1, 2, 3):
            got = calls.grouped_linear(
                x, rows, offsets, experts, None, activation_format, accumulation, threads=threads
            )
            assert_bits(got, want)


@by_format
def test_row_i_of_token_i(activation_format):
    counts = (3, 0, 40, 9)
    experts, x = experts_of(4, 40, 64), random(52, 64, seed=4)
    offsets = offsets_of(counts)
    for accumulation in ("exact", "default"):
        options = (activation_format, accumulation)
        got = calls.grouped_linear(x, None, offsets, experts, None, *options)
        assert_bits(got, one_by_one(x, None, offsets, experts, None, *options))


@by_format
@pytest.mark.parametrize("accumulation", ["exact", "default"])
def test_what_is_not_finite_is_alone(activation_format, accumulation):
    """Tokens with NaN and Inf, huge and tiny ones, rows and weights that are NaN or extreme."""
    counts = (2, 70, 0, 20, 5)
    experts = experts_of(5, 33, 64)
    exponents = experts.together.row_exponent
    exponents[33 + 4], exponents[4 * 33] = -128, -128
    exponents[3 * 33 + 7] = 90  # not to be multiplied in integers
    offsets, rows = offsets_of(counts), shuffled_rows(97, 30)
    x = random(30, 64, seed=5)
    x[3, 5], x[11, 0], x[17, 63] = torch.nan, torch.inf, -torch.inf
    x[20] *= 2.0**-120
    x[21, :32] = 2.0**-140
    options = (activation_format, accumulation)
    for dtype, instructions in product(DTYPES, INSTRUCTIONS):
        given = x.to(dtype)
        got = calls.grouped_linear(
            given, rows, offsets, experts, None, *options, instructions=instructions
        )
        want = one_by_one(given, rows, offsets, experts, None, *options, instructions=instructions)
        assert_bits(got, want)


@by_format
def test_any_byte_is_safe(activation_format):
    generator = torch.Generator().manual_seed(6)

    def bytes_(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    together = PackedTensor(
        bytes_(60, 64), bytes_(60, 4), bytes_(60).view(torch.int8), (60, 128), DIALECT_FP4, 32
    )
    experts, x = PackedExperts(together, 3), random(20, 128, seed=7).to(torch.bfloat16)
    offsets = torch.tensor([0, 1, 3, 20])
    for instructions in INSTRUCTIONS:
        options = {"instructions": instructions}
        got = calls.grouped_linear(x, None, offsets, experts, None, activation_format, **options)
        want = one_by_one(x, None, offsets, experts, None, activation_format, **options)
        assert_bits(got, want)


@by_format
def test_a_hundred_runs_are_identical(activation_format):
    counts = (1, 80, 5)
    experts, x = experts_of(3, 96, 128), random(50, 128, seed=8).to(torch.bfloat16)
    offsets, rows = offsets_of(counts), shuffled_rows(86, 50)
    arguments = (x, rows, offsets, experts, None, activation_format, "default")
    first = calls.grouped_linear(*arguments, threads=2)
    for _ in range(100):
        assert torch.equal(calls.grouped_linear(*arguments, threads=2), first)


def test_tensors_of_any_stride():
    experts, x = experts_of(3, 20, 64), random(64, 12, seed=9).t()
    bias = random(20, 3, seed=10).t()
    offsets, rows = (
        torch.stack([numbers, numbers], 1)[:, 0]
        for numbers in (torch.tensor([0, 4, 9, 12]), torch.arange(12))
    )
    want = calls.grouped_linear(
        x.contiguous(), None, offsets.contiguous(), experts, bias.contiguous(), "dialect"
    )
    assert_bits(calls.grouped_linear(x, rows, offsets, experts, bias, "dialect"), want)
    in_double = calls.grouped_linear(x, rows, offsets, experts, bias.double(), "dialect")
    assert_bits(in_double, want)


def test_nothing_to_compute():
    none = torch.zeros(4, dtype=torch.int64)
    experts = experts_of(3, 20, 64)
    for activation_format in FORMATS:
        options = (None, activation_format, "default")
        assert not calls.grouped_linear(random(5, 64, 1), None, none, experts, *options).any()
        empty = calls.grouped_linear(torch.zeros(0, 64), None, none, experts, *options)
        assert empty.shape == (0, 20)
        all_rows = torch.tensor([0, 1, 1, 4])
        no_columns = calls.grouped_linear(
            torch.zeros(4, 0), None, all_rows, experts_of(3, 20, 0), *options
        )
        assert torch.equal(no_columns, torch.zeros(4, 20))
        no_features = experts_of(3, 0, 64)
        y = calls.grouped_linear(random(4, 64, 1), None, all_rows, no_features, *options)
        assert y.shape == (4, 0)


def test_rows_and_offsets_outside_their_ranges_are_refused():
    """Nothing is read or written there, even where nobody has checked them before."""
    experts, x = experts_of(3, 20, 64), random(4, 64, seed=11)
    good, rows = torch.tensor([0, 1, 2, 4]), torch.tensor([0, 3, 1, 2])
    calls.grouped_linear(x, rows, good, experts, None, "dialect")
    wrong = [
        (rows, torch.tensor([-1, 1, 2, 4])),
        (rows, torch.tensor([0, 2, 1, 4])),
        (rows, torch.tensor([0, 1, 2, 5])),
        (torch.tensor([0, 4, 1, 2]), good),
        (torch.tensor([0, -1, 1, 2]), good),
    ]
    for named, offsets in wrong:
        with pytest.raises(ValueError, match="rows or offsets lie outside their ranges"):
            calls.grouped_linear(x, named, offsets, experts, None, "dialect")
    with pytest.raises(ValueError, match=r"offsets: torch.int64 \[3\] on cpu; it must be"):
        calls.grouped_linear(x, rows, good[:3], experts, None, "dialect")
    with pytest.raises(ValueError, match=r"rows: torch.int32 \[4\] on cpu; it must be"):
        calls.grouped_linear(x, rows.int(), good, experts, None, "dialect")
    with pytest.raises(ValueError, match=r"bias: has shape \[20\] on cpu; it must be \[3, 20\]"):
        calls.grouped_linear(x, rows, good, experts, torch.zeros(20), "dialect")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
@by_format
def test_experts_without_rows_are_not_read(activation_format):
    """In a child process whose system ends it if it reads their codes."""
    count, features, columns, used = 8, 64, 1024, (2, 5)
    size = features * columns // 2
    assert size % mmap.PAGESIZE == 0
    memory = mmap.mmap(-1, count * size)
    together = PackedTensor(
        torch.frombuffer(memory, dtype=torch.uint8).view(count * features, -1),
        torch.zeros(count * features, columns // 32, dtype=torch.uint8),
        torch.zeros(count * features, dtype=torch.int8),
        (count * features, columns),
        DIALECT_FP4,
        32,
    )
    experts = PackedExperts(together, count)
    x = random(40, columns, seed=12).to(torch.bfloat16)
    offsets = torch.tensor([0, 0, 0, 1, 1, 1, 40, 40, 40])
    protect = ctypes.CDLL(None).mprotect
    child = os.fork()
    if child == 0:
        for expert in set(range(count)) - set(used):
            at = experts[expert].codes.data_ptr()
            if protect(ctypes.c_void_p(at), ctypes.c_size_t(size), 0):
                os._exit(2)
        for accumulation in ("exact", "default"):
            calls.grouped_linear(x, None, offsets, experts, None, activation_format, accumulation)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
