"""A dialect KV cache in Triton's interpreter: the reference's bytes, attention close to float64.

Weights of values are rounded to bfloat16 before their product, unless queries are float32.
"""

import math
import os
from dataclasses import replace

import pytest
import torch

from dialect_kernels import reference_attention
from dialect_kernels.formatbook import LOWEST_EXPONENT
from dialect_kernels.kv_cache import KvCache, Scoring, slot_bytes
from tests.support.cached_attention import expected, make, rows_of_all_kinds

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from dialect_kernels import gpu
from dialect_kernels.gpu import cache_attention, warm_up_cache
from dialect_kernels.gpu.cache_attention import AttentionPlan, _plan_attention, attend
from dialect_kernels.gpu.cache_store import store

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-8}
"""Of the largest output; a half unit of the outputs' type is in it."""
SEQUENCES = ((1, 1), (1, 70), (3, 40), (7, 30))
"""(queries, positions): the first token, decoding, a short continuation, a chunk."""


@pytest.mark.parametrize(
    ("columns", "rotated", "means", "dtype"),
    [
        (32, True, True, torch.float32),
        (64, False, False, torch.bfloat16),
        (96, True, False, torch.float16),
        (96, False, True, torch.bfloat16),
        (128, True, False, torch.bfloat16),
        (128, True, True, torch.float16),
    ],
)
def test_stored_bytes_are_those_of_the_reference(columns, rotated, means, dtype):
    key = rows_of_all_kinds(16, columns, dtype).view(8, 2, columns)
    value = key.flip(0).transpose(1, 2).contiguous().transpose(1, 2)  # rows at any place
    mean = torch.randn(2, columns) if means else None
    memory = torch.full((3, 2, 4, slot_bytes(columns)), 7, dtype=torch.uint8)
    slots = torch.tensor([11, 0, -1, 3, 4, 7, 9, -1])
    want = KvCache(memory, columns, rotated, mean, None if mean is None else 3 * mean)
    got = replace(want, slots=torch.full_like(memory, 7))
    store(got, key, value, slots)
    reference_attention.store(want, key, value, slots)
    assert torch.equal(got.slots, want.slots)


def test_a_cache_may_lie_in_any_order_with_gaps():
    wide = torch.full((3, 4, 2, 80), 7, dtype=torch.uint8).transpose(1, 2)
    cache = KvCache(wide[..., :70], 64)
    key, slots = torch.randn(5, 2, 64), torch.tensor([1, 6, 2, 0, 11])
    store(cache, key, key.flip(0), slots)
    assert bool((wide[..., 70:] == 7).all())
    dense = KvCache(torch.full((3, 2, 4, 70), 7, dtype=torch.uint8), 64)
    reference_attention.store(dense, key, key.flip(0), slots)
    assert torch.equal(cache.slots, dense.slots)


def scorings(heads, head_size):
    draw = torch.Generator().manual_seed(heads)
    slopes = -torch.rand(heads, generator=draw) * 0.2
    sinks = torch.randn(heads, generator=draw)
    scale = head_size**-0.5
    return (
        Scoring(scale),
        Scoring(scale, soft_cap=2.0, window=30),
        Scoring(scale, slopes=slopes, sinks=sinks),
    )


@pytest.mark.parametrize(
    ("head_size", "group", "splits", "dtype", "kind", "means"),
    [
        (64, 1, 1, torch.bfloat16, 0, False),
        (64, 4, 1, torch.bfloat16, 0, True),
        (64, 4, 4, torch.bfloat16, 2, True),
        (64, 4, 1, torch.float32, 1, False),
        (96, 3, 2, torch.float16, 1, True),
        (128, 20, 1, torch.float16, 2, False),
        (32, 2, 2, torch.float32, 2, True),
        (256, 2, 2, torch.bfloat16, 0, True),
        (256, 20, 1, torch.bfloat16, 1, False),
        (288, 2, 1, torch.float16, 0, False),
        (512, 2, 2, torch.bfloat16, 1, True),
        (512, 4, 1, torch.float32, 2, False),
    ],
)
def test_attention(head_size, group, splits, dtype, kind, means):
    plan = AttentionPlan(max(16, 1 << (group - 1).bit_length()), 16, splits, 4)
    scoring = scorings(2 * group, head_size)[kind]
    causal = torch.tensor([True, True, False, True])
    case = make(head_size, group, SEQUENCES, dtype, means=means, causal=causal).stored()
    want = expected(case, scoring)
    got = attend(case.cache, case.query, case.context, scoring, plan=plan)
    assert got.dtype == dtype
    bound = TOLERANCE[dtype] * float(want.abs().max())
    assert float((got.double() - want).abs().max()) < bound


@pytest.mark.parametrize("causal", [False, True])
def test_causal_or_not_for_all_sequences(causal):
    case = make(64, 2, ((5, 33), (17, 17)), causal=causal, rotated=False).stored()
    scoring = Scoring(0.125, window=9)
    want = expected(case, scoring)
    got = attend(case.cache, case.query, case.context, scoring)
    assert float((got.double() - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("splits", [1, 2])
def test_a_row_of_nan_reaches_those_who_see_it_and_nobody_else(splits):
    case = make(64, 2, ((8, 40), (4, 40)), torch.bfloat16)
    case.key[36, 0, 3] = math.nan  # 36 - 32 queries have positions before it
    case.value[40 + 38, 1, 60] = math.inf
    case = case.stored()
    plan = AttentionPlan(16, 16, splits, 4)
    got = attend(case.cache, case.query, case.context, Scoring(0.125), plan=plan)
    nan = got.isnan().all(dim=2)
    assert torch.equal(nan, got.isnan().any(dim=2))
    want = torch.zeros(12, 4, dtype=torch.bool)
    want[4:8, :2] = True
    want[8 + 2 :, 2:] = True
    assert torch.equal(nan, want)


def test_queries_and_outputs_at_any_place():
    case = make(64, 2, ((3, 20), (1, 50)), torch.bfloat16).stored()
    want = attend(case.cache, case.query, case.context, Scoring(0.125))
    wide = torch.full((4, 3, 4, 64), 5.0, dtype=torch.bfloat16)
    wide[:, 1] = case.query
    out = torch.full((4, 6, 64), 9.0, dtype=torch.bfloat16)
    got = attend(case.cache, wide[:, 1], case.context, Scoring(0.125), out[:, 1:5])
    assert torch.equal(got, want)
    assert torch.equal(out[:, 1:5], want)
    assert bool((out[:, [0, 5]] == 9.0).all())
    column = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    got = torch.empty_like(want).transpose(1, 2).contiguous().transpose(1, 2)
    attend(case.cache, column, case.context, Scoring(0.125), got)
    assert torch.equal(got, want)


def test_no_queries_and_sequences_without_any():
    case = make(64, 2, ((0, 20), (2, 20), (0, 3))).stored()
    want = expected(case, Scoring(0.125))
    got = attend(case.cache, case.query, case.context, Scoring(0.125))
    assert float((got.double() - want).abs().max()) < 1e-5
    empty = make(64, 2, ((0, 20),)).stored()
    assert attend(empty.cache, empty.query, empty.context, Scoring(0.125)).shape == (0, 4, 64)


def test_contexts_are_split_where_sequences_are_few():
    assert _plan_attention(1, 1, 8, 4, 128, 132) == AttentionPlan(16, 32, 16, 4)
    assert _plan_attention(16, 16, 8, 4, 64, 132) == AttentionPlan(16, 32, 2, 1)
    assert _plan_attention(4096, 1, 8, 4, 128, 132) == AttentionPlan(64, 16, 1, 4)
    assert _plan_attention(1, 1, 1, 71, 64, 132).rows == 128
    assert _plan_attention(4096, 1, 8, 4, 256, 132) == AttentionPlan(32, 16, 1, 4)
    assert _plan_attention(4096, 1, 8, 4, 512, 132) == AttentionPlan(16, 16, 1, 4)
    assert _plan_attention(16, 16, 8, 32, 512, 132) == AttentionPlan(32, 16, 2, 8)


def test_warming_up_takes_every_kernel_there_is(monkeypatch):
    launched = set()
    monkeypatch.setattr(
        cache_attention,
        "launch",
        lambda kernel, grid, arguments, constants, **options: launched.add(
            (kernel.fn.__name__, constants.get("BM"), constants.get("SPLIT"))
        ),
    )
    cache = KvCache(torch.zeros(1, 2, 16, 70, dtype=torch.uint8), 64)
    warm_up_cache(cache, 8, torch.bfloat16, Scoring(0.125))
    kinds = {("_attend_kernel", rows, split) for rows in (16, 64) for split in (False, True)}
    assert launched == kinds | {("_add_splits_kernel", None, None)}
    assert cache.slots[0, :, 0, -2:].view(torch.int8).eq(LOWEST_EXPONENT).all(), "rows of zeros"


def test_slots_at_odd_addresses_are_refused():
    case = make(64, 2, ((1, 20),))
    odd = torch.zeros(*case.cache.slots.shape[:3], 71, dtype=torch.uint8)[..., :70]
    cache = replace(case.cache, slots=odd)
    with pytest.raises(ValueError, match=r"slots: begin at .* must be even"):
        gpu.store(cache, case.key, case.value, case.slots)
    with pytest.raises(ValueError, match=r"slots: begin at .* must be even"):
        gpu.attend(cache, case.query, case.context, Scoring(0.125), None)
