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
from tests.support.cached_attention import expected, in_dialects, make, rows_of_all_kinds

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


def test_a_query_of_nan_gives_nan_and_no_other_does():
    case = make(64, 2, ((4, 40),), torch.bfloat16).stored()
    case.query[2, 1, 7] = math.inf
    for instructions in INSTRUCTIONS:
        given = (case.cache, case.query, case.context, Scoring(0.1))
        found = compiled.attend(*given, instructions=instructions, dialect_attention=True)
        wanted = torch.zeros(4, 4, dtype=torch.bool)
        wanted[2, 1] = True
        assert torch.equal(found.isnan().all(-1), wanted)
        assert torch.equal(found.isnan().any(-1), wanted)


@pytest.mark.parametrize("rounded", [False, True])
def test_blocks_before_a_window_are_not_read(rounded):
    """An engine has freed them; a chunk of rounded weights begins before the window."""
    case = make(64, 2, ((1, 300),), torch.bfloat16).stored()
    given = (case.cache, case.query, case.context, Scoring(0.1, window=30))
    want = compiled.attend(*given, dialect_attention=rounded)
    case.context.block_table[0, : 270 // 16] = 1 << 30
    assert torch.equal(compiled.attend(*given, dialect_attention=rounded), want)


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
        options = {"instructions": instructions, "dialect_attention": True}
        got = compiled.attend(*given, threads=1, **options)
        assert torch.equal(compiled.attend(*given, threads=3, **options), got)
        second = compiled.attend(case.cache, case.query[1:3], alone, scoring, **options)
        assert torch.equal(second, got[1:3])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("rows", ["key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_nan_reaches_those_who_see_it_and_nobody_else(dtype, rows, rounded):
    case = make(64, 2, ((4, 40),), dtype, heads=1)
    getattr(case, rows)[37, 0, 5] = math.nan
    case = case.stored()
    for instructions, window in product(INSTRUCTIONS, (0, 2)):
        given = (case.cache, case.query, case.context, Scoring(0.1, window=window))
        options = {"instructions": instructions, "dialect_attention": rounded}
        found = compiled.attend(*given, **options).isnan()
        seeing = [False, True, True, True] if not window else [False, True, True, False]
        assert found.all(dim=-1).all(dim=-1).tolist() == seeing
        assert found.any(dim=-1).any(dim=-1).tolist() == seeing


@pytest.mark.parametrize(
    ("head_size", "group", "dtype"),
    [
        (64, 1, torch.float32),
        (64, 4, torch.bfloat16),
        (128, 3, torch.float32),
        (96, 8, torch.float16),
        (32, 20, torch.float32),
        (256, 2, torch.bfloat16),
        (512, 2, torch.float32),
    ],
)
def test_attention_in_dialects(head_size, group, dtype):
    """A weight next to a threshold may take the other step, which few rows of queries show."""
    draw = torch.Generator().manual_seed(group)
    slopes = -torch.rand(2 * group, generator=draw) * 0.2
    sinks = torch.randn(2 * group, generator=draw)
    scale = head_size**-0.5
    scorings = (
        Scoring(scale, soft_cap=2.0, window=30),
        Scoring(scale, slopes=slopes, sinks=sinks, window=150),
    )
    for means, scoring in product((False, True), scorings):
        causal = torch.tensor([True, True, False, True])
        sequences = ((1, 1), (1, 130), (3, 40), (40, 170))
        case = make(head_size, group, sequences, dtype, means=means, causal=causal).stored()
        given = (case.cache, case.query, case.context, scoring)
        want = reference_attention.attend(*given, dialect_attention=True).double()
        for instructions in INSTRUCTIONS:
            options = {"instructions": instructions, "threads": 2}
            got = compiled.attend(*given, dialect_attention=True, **options)
            error, plain = (
                (found.double() - want).abs().amax(-1) / want.abs().max()
                for found in (got, compiled.attend(*given, **options))
            )
            off = error > 2 * TOLERANCE[dtype]
            assert off.double().mean() < 0.02, (instructions, scoring, float(error.max()))
            assert error.max() < 2.0**-4
            assert (plain > 2 * TOLERANCE[dtype]).double().mean() > 0.5


@pytest.mark.parametrize("window", [0, 140])
def test_weights_are_rounded_to_the_numbers_of_the_reference(window):
    """Every value is one number in a column of its own, so that the output holds the weights.

    Those that a relative error of 2**-19 brings over a threshold are left out.
    """
    case = make(256, 6, ((1, 250),), heads=1, rotated=False, seed=1)
    exponent = torch.randint(-3, 4, (250,))
    exponent[[7, 200]] = torch.tensor([-16, 9])
    case.value[:] = 0
    case.value[:, 0, :250] = torch.diag(2.0**exponent)
    case = case.stored()
    key, value = (x[:, 0] for x in reference_attention.read(case.cache, case.slots))
    value = value.diagonal()
    assert torch.equal(value, 2.0**exponent)
    score = in_dialects(case.query[0]) @ key.double().T * math.log2(math.e) / 16
    seen = torch.arange(250).expand(6, -1) >= (250 - window if window else 0)
    weight = torch.exp2(score - score.where(seen, -math.inf).amax(1, keepdim=True).ceil())
    place = case.slots // 16, torch.zeros_like(case.slots), case.slots % 16
    r = case.cache.slots[place][:, -1].contiguous().view(torch.int8).expand(6, -1)
    (less, _), (want, most), (more, _) = (
        reference_attention._round_probabilities((weight * factor).float(), r, seen)
        for factor in (1 - 2.0**-19, 1.0, 1 + 2.0**-19)
    )
    sure = (less == want) & (more == want)
    assert sure.double().mean() > 0.99
    want = want.double() * 2.0 ** (most[:, torch.arange(250) // 128].double() - r) * value
    for instructions in INSTRUCTIONS:
        got = compiled.attend(
            case.cache,
            case.query,
            case.context,
            Scoring(1 / 16, window=window),
            instructions=instructions,
            dialect_attention=True,
        )[0, :, :250].double() * weight.where(seen, 0.0).sum(1, keepdim=True)
        assert torch.equal((got == 0)[sure], (want == 0)[sure])
        torch.testing.assert_close(got[sure], want[sure], rtol=2e-6, atol=0)


def test_no_queries_and_no_sequences():
    case = make(64, 2, ((0, 20), (1, 3))).stored()
    for rounded in (False, True):
        given = (case.cache, case.query, case.context, Scoring(0.1))
        found = compiled.attend(*given, dialect_attention=rounded)
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
