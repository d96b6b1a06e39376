"""Decomposed and grouped tokens on CPU: the bytes of the reference, whatever runs them."""

from itertools import product

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedTensor, cpu, ops, reference
from dialect_kernels.cpu import calls
from dialect_kernels.formatbook import Formatbook

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=f"no CPU kernel: {cpu.why_not()}"),
    pytest.mark.usefixtures("poisoned_outputs"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INSTRUCTIONS = (
    cpu.INSTRUCTIONS[: cpu.INSTRUCTIONS.index(cpu.features()) + 1] if cpu.available() else ()
)
NOBODY = torch.empty(0, dtype=torch.int64)
WAYS = [
    {"instructions": instructions, "threads": threads}
    for instructions, threads in product(INSTRUCTIONS, (1, 2, 3))
]

by_book = pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda book: book.name)
by_block_size = pytest.mark.parametrize("block_size", [16, 32, 64])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(rows: int, columns: int, seed: int, spread: float = 1.5) -> torch.Tensor:
    """Gaussian with log-normal channels: several deltas and many dialects in every row."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp(spread * torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) * channels


def adversarial(columns: int) -> dict[str, torch.Tensor]:
    """Six tokens each on which a rounding that is nearly right goes wrong."""
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(-31, 32, (6, columns), generator=generator)
    powers = torch.randint(-40, 40, (6, columns), generator=generator)
    midpoints = integers / 4 * 2.0 ** torch.tensor([-12.0, 0, 3, 30, -60, 60])[:, None]
    ulps = torch.randint(-1, 2, (6, columns), generator=generator, dtype=torch.int32)
    huge_ratio = random(6, columns, 2)
    huge_ratio[:, : columns // 2] *= 2.0**14
    huge_ratio[::2, columns // 2 :] *= 2.0**-30
    zeros = random(6, columns, 3)
    zeros[::2, : columns // 2] = 0
    zeros[1] = -0.0
    cells = torch.tensor([23, 24, 13, 20, 28, 10])  # between the levels of one or more variants
    costly = ((cells + 0.5) / 4)[:, None].repeat(1, columns)
    costly[:, ::64] = 7.75
    not_finite = random(6, columns, 4)
    not_finite[0, 0], not_finite[2, -1], not_finite[5, 7] = torch.nan, torch.inf, -torch.inf
    return {
        "gaussian": random(6, columns, 5),
        "wide": torch.randn(6, columns, generator=generator) * 2.0**powers,
        "exact ties": midpoints,
        "one ulp beside ties": (midpoints.view(torch.int32) + ulps).view(torch.float32),
        "blocks far below the row": huge_ratio,
        "subnormals": random(6, columns, 6) * 2.0**-140,
        "around the lowest exponent": random(6, columns, 7) * 2.0**-119,
        "around the highest exponent": random(6, columns, 8, 0.1).clamp(-3.9, 3.9) * 2.0**126,
        "costs as large as they get": costly,
        "zeros": zeros,
        "not finite": not_finite,
    }


def any_variants(tokens: int, blocks: int, book: Formatbook) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(-1, book.variants, (tokens, blocks), generator=generator).to(torch.int8)


def assert_bits(got: torch.Tensor, want: torch.Tensor, case: object = "") -> None:
    """The same bits, except that any NaN is as good as another."""
    assert got.dtype == want.dtype, case
    assert got.shape == want.shape, case
    assert torch.equal(got.isnan(), want.isnan()), case
    number = torch.int32 if want.dtype == torch.float32 else torch.int16
    zeroed = [torch.where(y.isnan(), 0.0, y).view(number) for y in (got, want)]
    assert torch.equal(*zeroed), case


def products(
    x: torch.Tensor,
    salient: torch.Tensor,
    p: PackedTensor,
    group: torch.Tensor | None = None,
    **way: object,
) -> torch.Tensor:
    """float32 [T + S, N] from the kernel."""
    variants = None
    if group is not None:
        costs = calls.variant_costs(x, p.book, p.block_size, **way)
        variants = reference.group_variants(costs, group)
    return calls.decomposed_linear(x, p, variants, salient, **way)


def rounded(
    x: torch.Tensor,
    variants: torch.Tensor | None,
    book: Formatbook,
    block_size: int,
    **way: object,
) -> torch.Tensor:
    """The rounded values of tokens: their products with the identity matrix."""
    identity = reference.quantize(torch.eye(x.shape[1]), book, block_size)
    return calls.decomposed_linear(x, identity, variants, NOBODY, **way)


def expected(
    x: torch.Tensor, salient: torch.Tensor, p: PackedTensor, group: torch.Tensor | None = None
) -> torch.Tensor:
    """The same from the reference's public functions."""
    values = x.to(torch.float32)
    rounded = reference.round_activation(x, p.book, p.block_size, group)
    left_over = (values - rounded)[salient]
    return torch.cat(
        [
            reference.semantic_linear(values, p, group=group),
            reference.dialect_linear(left_over, p, accumulation="exact"),
        ]
    )


@by_dtype
@by_block_size
@by_book
def test_products_are_those_of_the_reference(book, block_size, dtype):
    """Residuals of some tokens, not in order; groups where the book has them."""
    salient = torch.tensor([5, 0, 2, 3])
    groups = [None]
    if book is SEMANTIC_32:
        groups.append(torch.tensor([0, 0, -1, 9, 0, 9]))
    p = reference.quantize(random(19, 160, seed=10), book, block_size)
    for name, data in adversarial(160).items():
        x = data.to(dtype)
        for group in groups:
            want = expected(x, salient, p, group)
            for way in WAYS:
                assert_bits(products(x, salient, p, group, **way), want, (name, way))


@by_block_size
@by_book
def test_every_edge(book, block_size):
    """Rows and columns that are no multiple of anything; more tokens than one tile."""
    for i, (rows, columns, tokens) in enumerate(
        [(1, 1, 1), (7, 31, 3), (8, 33, 2), (9, 95, 100), (33, 128, 97), (3, 0, 2), (0, 32, 2)]
    ):
        p = reference.quantize(random(rows, columns, seed=20 + i), book, block_size)
        x = random(tokens, columns, seed=30 + i).to(DTYPES[i % 3])
        for salient in (torch.arange(tokens - 1, -1, -1), torch.empty(0, dtype=torch.int64)):
            group = torch.arange(tokens) // 3 if book is SEMANTIC_32 else None
            want = expected(x, salient, p, group)
            for way in WAYS:
                assert_bits(products(x, salient, p, group, **way), want, (rows, columns, way))
    no_token = torch.empty(0, 64)
    p = reference.quantize(random(9, 64, seed=40), book, block_size)
    assert products(no_token, NOBODY, p).shape == (0, 9)


@by_dtype
@by_block_size
@by_book
def test_rounded_values_are_those_of_the_reference(book, block_size, dtype):
    for name, data in adversarial(130).items():
        x = data.to(dtype)
        want = reference.round_activation(x, book, block_size)
        for way in WAYS:
            got = rounded(x, None, book, block_size, **way)
            assert_bits(got, want, (name, way))


@by_block_size
def test_rounded_values_of_groups_are_those_of_the_reference(block_size):
    group = torch.tensor([0, 0, -1, 9, 0, 9])
    for (name, x), way in product(adversarial(130).items(), WAYS):
        costs = calls.variant_costs(x, SEMANTIC_32, block_size, **way)
        variants = reference.group_variants(costs, group)
        got = rounded(x, variants, SEMANTIC_32, block_size, **way)
        want = reference.round_activation(x, SEMANTIC_32, block_size, group)
        assert_bits(got, want, (name, way))


@by_dtype
@by_block_size
def test_costs_are_those_of_the_reference(block_size, dtype):
    for name, data in adversarial(130).items():
        x = data.to(dtype)
        finite = x.isfinite().all(1)
        want = torch.zeros(6, -(-130 // block_size), 4, dtype=torch.int32)
        want[finite] = reference.variant_costs(x[finite], SEMANTIC_32, block_size)
        for way in WAYS:
            got = calls.variant_costs(x, SEMANTIC_32, block_size, **way)
            assert torch.equal(got, want), (name, way)


@by_block_size
@by_book
def test_any_variant_can_be_chosen(book, block_size):
    """Not only those that a group would choose: every dialect of a block's range can be had."""
    x = random(40, 192, seed=50)
    variants = any_variants(40, 192 // block_size, book)
    free = rounded(x, torch.full_like(variants, -1), book, block_size)
    assert_bits(free, reference.round_activation(x, book, block_size))
    first = rounded(x, variants, book, block_size, threads=1, instructions="scalar")
    assert not torch.equal(first, free)
    for way in WAYS:
        assert_bits(rounded(x, variants, book, block_size, **way), first, way)
    for b in range(192 // block_size):
        for variant in range(book.variants):
            one = torch.full_like(variants, -1)
            one[:, b] = variant
            part = slice(b * block_size, (b + 1) * block_size)
            alone = rounded(x, one, book, block_size)
            chosen = variants[:, b] == variant
            assert torch.equal(alone[chosen, part], first[chosen, part])


@by_book
def test_one_by_one_is_the_batch(book):
    p = reference.quantize(random(40, 320, seed=60), book)
    x = random(120, 320, seed=61).to(torch.bfloat16)
    salient = torch.arange(119, -1, -7)
    batch = products(x, salient, p, threads=3)
    rows = [products(row[None], NOBODY, p) for row in x]
    rows += [products(x[t : t + 1], torch.tensor([0]), p)[1:] for t in salient]
    assert_bits(torch.cat(rows), batch)


def test_groups_in_parts_are_the_batch():
    """Whole groups may be computed apart: a token depends on its own group and nothing else."""
    p = reference.quantize(random(24, 256, seed=62), SEMANTIC_32)
    x = random(60, 256, seed=63)
    group = torch.arange(60) % 7 - 1
    batch = ops.semantic_linear(x, p, None, torch.arange(0, 60, 5), group)
    for number in range(7):
        part = (group == number - 1).nonzero()[:, 0]
        salient = (part % 5 == 0).nonzero()[:, 0]
        assert_bits(ops.semantic_linear(x[part], p, None, salient, group[part]), batch[part])


@by_book
def test_a_hundred_runs_are_identical(book):
    p = reference.quantize(random(64, 256, seed=64), book)
    x = random(12, 256, seed=65)
    salient = torch.tensor([1, 5, 11])
    group = torch.arange(12) % 3 if book is SEMANTIC_32 else None
    first = products(x, salient, p, group, threads=3)
    for _ in range(100):
        assert_bits(products(x, salient, p, group, threads=3), first)


@by_dtype
@by_book
def test_the_op_is_the_reference(book, dtype):
    """Two samples, padding, a token named twice, bias, one output rounding."""
    p = reference.quantize(random(21, 96, seed=70), book)
    x = random(10, 96, seed=71).view(2, 5, 96).to(dtype)
    bias = random(1, 21, seed=72)[0].to(dtype)
    salient = torch.tensor([[4, 1, 4], [-1, 0, -1]])
    groups = [None]
    if book is SEMANTIC_32:
        groups.append(torch.tensor([[0, 0, 1, -1, 1], [1, 1, 0, 0, 0]], dtype=torch.int32))
    for arguments in product((None, bias), (None, salient), groups):
        want = reference.semantic_linear(x, p, *arguments)
        assert_bits(ops.semantic_linear(x, p, *arguments), want)


def op_arguments(x, p, bias, salient, group):
    return (x, *p.op_arguments(bias), salient, group)


def cases():
    p = reference.quantize(random(8, 64, seed=80), SEMANTIC_32)
    x = random(6, 64, seed=81)
    salient, group = torch.tensor([[0, -1], [2, 1]]), torch.tensor([[0, 0, -1], [1, 1, 0]])
    yield op_arguments(x, p, None, None, None)
    yield op_arguments(x.bfloat16(), p, torch.ones(8), salient[0], None)
    yield op_arguments(x.view(2, 3, 64), p, torch.ones(8), salient, group)


@pytest.mark.parametrize("arguments", list(cases()) if cpu.available() else [], ids=range(3))
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.blockdialect.semantic_linear.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_without_a_graph_break(dynamic):
    def layer(x, *rest):
        return torch.relu(torch.ops.blockdialect.semantic_linear(x * 2, *rest)) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for arguments in cases():
        assert_bits(compiled(*arguments), layer(*arguments))


def test_bad_arguments_are_refused():
    p = reference.quantize(random(8, 64, seed=90), SEMANTIC_32)
    x, salient = random(2, 64, seed=91), torch.tensor([0])
    variants = torch.zeros(2, 2, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"x: has shape \[2, 63\]; it must be \[T, 64\]"):
        calls.decomposed_linear(x[:, :63], p, None, salient)
    with pytest.raises(ValueError, match=r"salient: holds tokens outside 0\.\.1"):
        calls.decomposed_linear(x, p, None, torch.tensor([2]))
    with pytest.raises(
        ValueError, match=r"salient: torch.int32 \[1\] on cpu; it must be torch.int64 \[S\]"
    ):
        calls.decomposed_linear(x, p, None, salient.int())
    with pytest.raises(ValueError, match=r"salient: torch.int64 \[1, 1\] .* \[S\]"):
        calls.decomposed_linear(x, p, None, salient[None])
    with pytest.raises(ValueError, match=r"variants: torch.int8 \[2, 1\] .*torch.int8 \[2, 2\]"):
        calls.decomposed_linear(x, p, variants[:, :1], salient)
    with pytest.raises(ValueError, match=r"variants: torch.int32 \[2, 2\] .*torch.int8"):
        calls.decomposed_linear(x, p, variants.int(), salient)
    with pytest.raises(ValueError, match=r"variants: holds 4\.\.4; allowed are -1\.\.3"):
        calls.decomposed_linear(x, p, variants + 4, salient)
    with pytest.raises(ValueError, match=r"variants: holds -2\.\.-2; allowed are -1\.\.3"):
        calls.decomposed_linear(x, p, variants - 2, salient)
    for way in (x.double(), x.to("meta")):
        with pytest.raises(
            ValueError, match=r"x: .*; it must be float32, bfloat16 or float16 on cpu"
        ):
            calls.decomposed_linear(way, p, None, salient)
        with pytest.raises(
            ValueError, match=r"x: .*; it must be float32, bfloat16 or float16 on cpu"
        ):
            calls.linear(way, p, None, "dialect")
    with pytest.raises(ValueError, match="instructions: 'sse'"):
        calls.variant_costs(x, p.book, 32, instructions="sse")
