"""Rule gptq inside a block: the bits of plain torch on every processor."""

import math
from itertools import product

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, cpu, ops, reference
from dialect_kernels.arithmetic import power_of_two
from dialect_kernels.backend import BlockGrid
from dialect_kernels.cpu import calls

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"no CPU kernel: {cpu.why_not()}")

INSTRUCTIONS = (
    cpu.INSTRUCTIONS[: cpu.INSTRUCTIONS.index(cpu.features()) + 1] if cpu.available() else ()
)


def case(book, block_size, rows, seed):
    """A block, a factor and grids, some of which are too small or for blocks that stay zero."""
    draw = torch.Generator().manual_seed(seed)
    block = torch.randn(block_size, rows, generator=draw)
    block[:, : rows // 3] *= torch.randn(rows // 3, generator=draw).exp() * 1e-3
    factor = torch.randn(block_size, block_size, generator=draw).triu(1) * 0.3
    factor += torch.diag(torch.rand(block_size, generator=draw) + 0.5)
    dialect = torch.randint(len(book), (rows,), dtype=torch.int32, generator=draw)
    exponent = torch.randint(-4, 1, (rows,), dtype=torch.int32, generator=draw)
    unit = power_of_two(exponent - 1).masked_fill(torch.arange(rows) % 5 == 4, 0)
    return block, factor, BlockGrid(dialect, power_of_two(2 - exponent), unit)


def results(function, block, factor, grid, book, **options):
    block, errors = block.clone(), torch.full_like(block, math.nan)
    codes = function(block, factor, grid, book, errors, **options)
    return codes, block, errors


def as_one_of_many(given):
    block, factor, grid = given
    return block[None], factor[None], grid


def test_several_weights_are_rounded_like_each_by_itself():
    cases = [case(SEMANTIC_32, 32, 20, seed) for seed in range(3)]
    expected = [results(reference.feed_back, *given, SEMANTIC_32) for given in cases]
    block, factor = (torch.stack([given[part] for given in cases]) for part in range(2))
    grid = BlockGrid(*map(torch.cat, zip(*(given[2] for given in cases), strict=True)))
    for function in (ops.feed_back, reference.feed_back):
        found = results(function, block, factor, grid, SEMANTIC_32)
        for part, wanted in zip(found, zip(*expected, strict=True), strict=True):
            assert torch.equal(part, torch.stack(wanted))


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda book: book.name)
def test_the_bits_of_the_reference(book, block_size):
    for seed, rows in enumerate((1, 15, 16, 17, 100)):
        given = case(book, block_size, rows, seed)
        expected = results(reference.feed_back, *given, book)
        assert bool(expected[2].isfinite().all())
        chosen = [{"threads": t, "instructions": i} for t, i in product([1, 3], INSTRUCTIONS)]
        found = [results(calls.feed_back, *given, book, **options) for options in chosen]
        found.append([part[0] for part in results(ops.feed_back, *as_one_of_many(given), book)])
        for one in found:
            assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))


def test_factors_inside_a_larger_matrix_and_no_rows():
    block, factor, grid = case(SEMANTIC_32, 32, 20, 9)
    wide = torch.cat([factor, factor], dim=1)
    expected = results(calls.feed_back, block, factor, grid, SEMANTIC_32)
    found = results(calls.feed_back, block, wide[:, 32:], grid, SEMANTIC_32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    empty = BlockGrid(*(part[:0] for part in grid))
    assert calls.feed_back(block[:, :0], factor, empty, SEMANTIC_32, block[:, :0]).shape == (32, 0)


def test_numbers_that_are_not_finite_stay_in_their_row():
    block, factor, grid = case(DIALECT_FP4, 32, 20, 10)
    expected = results(calls.feed_back, block, factor, grid, DIALECT_FP4)
    block[5, 3], block[7, 18] = math.nan, math.inf
    found = results(calls.feed_back, block, factor, grid, DIALECT_FP4)
    others = [row for row in range(20) if row not in (3, 18)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[:, others], other[:, others])
    assert not bool(found[1][:, [3, 18]].isfinite().all(dim=0).any())


def test_shapes_that_do_not_fit_are_refused():
    block, factor, grid = case(DIALECT_FP4, 32, 20, 11)
    for wrong in (factor[:16], factor[:, :16]):
        with pytest.raises(ValueError, match="factor and errors do not fit"):
            calls.feed_back(block, wrong, grid, DIALECT_FP4, block.clone())
    with pytest.raises(ValueError, match="block_size: 20"):
        calls.feed_back(block[:20], factor, grid, DIALECT_FP4, block[:20].clone())
