"""The CPU kernel of a dialect KV cache: the reference's bytes, and attention close to float64.

The products of float32 and float16 queries are float32 sums; those of bfloat16 queries use weights
of bfloat16 where there is a matrix unit, so that each may be off by 2**-9 of itself.
"""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from dialect_kernels import cpu, reference_attention
from dialect_kernels.cpu import kv_cache as compiled
from dialect_kernels.kv_cache import KvCache, Scoring, slot_bytes
from tests.support.cached_attention import expected, make, rows_of_all_kinds

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=f"no CPU kernel: {cpu.why_not()}"),
    pytest.mark.usefixtures("poisoned_outputs"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Of the largest output; a half unit of the outputs' type is in it."""
INSTRUCTIONS = (
    cpu.INSTRUCTIONS[: cpu.INSTRUCTIONS.index(cpu.features()) + 1] if cpu.available() else ()
)
SEQUENCES = ((1, 1), (1, 130), (3, 40), (40, 70))
"""(queries, positions): the first token, decoding, a short continuation, a chunk."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_bytes_are_those_of_the_reference(dtype):
    for columns, rotated, means in product((32, 96, 128), (True, False), (True, False)):
        heads, tokens = 3, 8
        key = rows_of_all_kinds(heads * tokens, columns, dtype).view(heads, tokens, -1)
        key, value = key.transpose(0, 1), key.transpose(0, 1).flip(0)  # rows at any place
        mean = torch.randn(heads, columns) if means else None
        memory = torch.full((3, heads, 4, slot_bytes(columns)), 7, dtype=torch.uint8)
        slots = torch.tensor([11, 0, -1, 3, 4, 7, 9, -1])
        want = KvCache(memory, columns, rotated, mean, None if mean is None else 3 * mean)
        for threads, instructions in product((1, 3), INSTRUCTIONS):
            got = replace(want, slots=torch.full_like(memory, 7))
            compiled.store(got, key, value, slots, threads, instructions)
            want.slots.fill_(7)
            reference_attention.store(want, key, value, slots)
            assert torch.equal(got.slots, want.slots), (columns, instructions)


def test_a_cache_may_have_gaps_between_its_blocks():
    wide = torch.full((3, 2, 4, 80), 7, dtype=torch.uint8)
    cache = KvCache(wide[..., :70], 64)
    key = torch.randn(2, 2, 64)
    compiled.store(cache, key, key, torch.tensor([1, 6]))
    assert bool((wide[..., 70:] == 7).all())
    dense = KvCache(torch.full((3, 2, 4, 70), 7, dtype=torch.uint8), 64)
    reference_attention.store(dense, key, key, torch.tensor([1, 6]))
    assert torch.equal(cache.slots, dense.slots)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "group"), [(64, 1), (64, 4), (128, 3), (96, 8), (32, 20)])
def test_attention(head_size, group, dtype):
    draw = torch.Generator().manual_seed(group)
    slopes = -torch.rand(2 * group, generator=draw) * 0.2
    sinks = torch.randn(2 * group, generator=draw)
    scale = head_size**-0.5
    scorings = (
        Scoring(scale),
        Scoring(scale, soft_cap=2.0, window=30),
        Scoring(scale, slopes=slopes, sinks=sinks),
    )
    for means, scoring in product((False, True), scorings):
        causal = torch.tensor([True, True, False, True])
        case = make(head_size, group, SEQUENCES, dtype, means=means, causal=causal).stored()
        want = expected(case, scoring)
        bound = TOLERANCE[dtype] * float(want.abs().max())
        for instructions in INSTRUCTIONS:
            given = (case.cache, case.query, case.context, scoring)
            got = compiled.attend(*given, instructions=instructions, threads=2)
            assert got.dtype == dtype
            assert float((got.double() - want).abs().max()) < bound, (instructions, scoring)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_contexts_are_cut_at_the_same_places(dtype):
    """The bits do not depend on the number of threads or on other sequences of the call."""
    sequences = ((1, 2500), (2, 1100), (1, 1024))
    case = make(64, 3, sequences, dtype, block=32, seed=2).stored()
    scoring = Scoring(0.125, window=2000)
    want = expected(case, scoring)
    for instructions in INSTRUCTIONS:
        given = (case.cache, case.query, case.context, scoring)
        got = compiled.attend(*given, threads=1, instructions=instructions)
        bound = TOLERANCE[dtype] * float(want.abs().max())
        assert float((got.double() - want).abs().max()) < bound
        again = compiled.attend(*given, threads=3, instructions=instructions)
        assert torch.equal(got, again)
        alone = case.context._replace(
            query_start=torch.tensor([0, 2], dtype=torch.int32),
            lengths=case.context.lengths[1:2],
            block_table=case.context.block_table[1:2],
        )
        second = compiled.attend(
            case.cache, case.query[1:3], alone, scoring, instructions=instructions
        )
        assert torch.equal(second, got[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_nan_reaches_those_who_see_it_and_nobody_else(dtype):
    case = make(64, 2, ((4, 40),), dtype, heads=1)
    case.key[37, 0, 5] = math.nan
    case = case.stored()
    for instructions, window in product(INSTRUCTIONS, (0, 2)):
        given = (case.cache, case.query, case.context, Scoring(0.1, window=window))
        found = compiled.attend(*given, instructions=instructions).isnan()
        seeing = [False, True, True, True] if not window else [False, True, True, False]
        assert found.all(dim=-1).all(dim=-1).tolist() == seeing
        assert found.any(dim=-1).any(dim=-1).tolist() == seeing


def test_no_queries_and_no_sequences():
    case = make(64, 2, ((0, 20), (1, 3))).stored()
    found = compiled.attend(case.cache, case.query, case.context, Scoring(0.1))
    assert bool(found.isfinite().all())
    none = case.context._replace(
        query_start=case.context.query_start[:1],
        lengths=case.context.lengths[:0],
        block_table=case.context.block_table[:0],
    )
    assert compiled.attend(case.cache, case.query[:0], none, Scoring(0.1)).shape == (0, 4, 64)
    compiled.store(case.cache, case.key[:0], case.value[:0], case.slots[:0])


def test_queries_and_outputs_at_any_place():
    case = make(64, 2, ((2, 33), (1, 9)), torch.bfloat16).stored()
    want = compiled.attend(case.cache, case.query, case.context, Scoring(0.1))
    wide = torch.zeros(3, 7, 64, dtype=torch.bfloat16)
    wide[:, 1:5] = case.query
    out = torch.full((3, 6, 64), 9.0, dtype=torch.bfloat16)
    compiled.attend(case.cache, wide[:, 1:5], case.context, Scoring(0.1), out[:, 2:])
    assert torch.equal(out[:, 2:], want)
    assert bool((out[:, :2] == 9).all())
