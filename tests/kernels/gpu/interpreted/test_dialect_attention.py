"""Attention with rounded queries and probabilities in Triton's interpreter (format, section 12).

The rounding is compared bit for bit, outputs with the reference: exponentials of different
libraries differ in their last bit, and one of them may then fall into another cell.
"""

import math
import os

import pytest
import torch

from dialect_kernels import reference_attention
from dialect_kernels.formatbook import SEMANTIC_32
from dialect_kernels.kv_cache import Scoring
from dialect_kernels.reference import round_activation
from tests.support.cached_attention import make

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

import triton
import triton.language as tl

from dialect_kernels.gpu.cache_attention import AttentionPlan, attend
from dialect_kernels.gpu.dialect_attention import _rounded_rows
from dialect_kernels.gpu.rounding import book_table

TOLERANCE = {torch.float32: 2.0**-9, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-8}
"""Of the largest output; a half unit of the outputs' type is in it."""


@triton.jit
def _round_kernel(p_x, p_book, p_words, p_scale, R: tl.constexpr, K: tl.constexpr):
    o_row = tl.arange(0, R)
    x = tl.load(p_x + o_row[:, None] * K + tl.arange(0, K)[None, :])
    words, scale = _rounded_rows(x, p_book, False)
    tl.store(p_words + o_row[:, None] * (K // 4) + tl.arange(0, K // 4)[None, :], words)
    tl.store(p_scale + o_row, scale)


def probabilities(rows, keys):
    """P of all kinds: of few and of many keys, absent ones, far below 1, and a row of nothing."""
    draw = torch.Generator().manual_seed(keys)
    p = torch.exp2(-20 * torch.rand(rows, keys, generator=draw))
    p[1] = 1.0
    p[2, 5:] = 0.0
    p[3] *= 2.0**-60
    p[4, 32:64] *= 2.0**-15  # below the window of 13
    p[5] = 0.0
    p[6] *= 2.0**-119
    p[7, -1] = math.nan
    return p


@pytest.mark.parametrize("keys", [32, 128, 256])
def test_given_rows_are_rounded_to_the_bytes_of_the_reference(keys):
    p = probabilities(16, keys)
    p[8:] *= torch.where(torch.arange(keys) % 3 == 0, -1.0, 1.0)  # rows of queries have signs
    words = torch.empty(16, keys // 4, dtype=torch.int32)
    scale = torch.empty(16)
    _round_kernel[(1,)](p, book_table(SEMANTIC_32, p.device), words, scale, 16, keys)
    got = words.view(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32) * scale[:, None]
    want = round_activation(p, SEMANTIC_32, 32)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert int(want.isnan().all(dim=1).sum()) == 1


def scorings(heads, head_size):
    draw = torch.Generator().manual_seed(heads)
    slopes = -torch.rand(heads, generator=draw) * 0.2
    sinks = torch.randn(heads, generator=draw)
    scale = head_size**-0.5
    return {
        "plain": Scoring(scale),
        "cap and window": Scoring(scale, soft_cap=2.0, window=30),
        "slopes and sinks": Scoring(scale, slopes=slopes, sinks=sinks),
    }


@pytest.mark.parametrize(
    ("head_size", "group", "splits", "eight_bits", "dtype", "kind", "means"),
    [
        (64, 2, 1, False, torch.float32, "plain", False),
        (64, 4, 2, True, torch.float32, "cap and window", True),
        (32, 3, 2, True, torch.bfloat16, "slopes and sinks", True),
        (96, 20, 1, False, torch.float16, "plain", True),
        (128, 2, 1, True, torch.bfloat16, "cap and window", False),
    ],
)
def test_attention(head_size, group, splits, eight_bits, dtype, kind, means):
    rows = max(16, 1 << (group - 1).bit_length())
    plan = AttentionPlan(rows, 128, splits, 4, eight_bits)
    scoring = scorings(2 * group, head_size)[kind]
    causal = torch.tensor([True, False, True])
    sequences = ((1, 150), (3, 40), (2, 130))
    case = make(head_size, group, sequences, dtype, means=means, causal=causal).stored()
    want = reference_attention.attend(
        case.cache, case.query.float(), case.context, scoring, dialect_attention=True
    )
    got = attend(case.cache, case.query, case.context, scoring, plan=plan, dialect_attention=True)
    assert got.dtype == dtype
    largest = float(want.abs().max())
    error = float((got.float() - want).abs().max())
    assert error < TOLERANCE[dtype] * largest
    unrounded = attend(case.cache, case.query, case.context, scoring)
    assert float((unrounded.float() - want).abs().max()) > 2 * error, "nothing was rounded"


@pytest.mark.parametrize("splits", [1, 2])
def test_a_row_of_nan_reaches_those_who_see_it_and_nobody_else(splits):
    case = make(64, 2, ((4, 140), (3, 140)), torch.bfloat16)
    case.key[138, 0, 3] = math.nan  # which the last two queries of the first sequence see
    case.value[140 + 138, 1, 60] = math.inf
    case = case.stored()
    plan = AttentionPlan(16, 128, splits, 4)
    got = attend(
        case.cache, case.query, case.context, Scoring(0.125), plan=plan, dialect_attention=True
    )
    nan = got.isnan().all(dim=2)
    assert torch.equal(nan, got.isnan().any(dim=2))
    want = torch.zeros(7, 4, dtype=torch.bool)
    want[2:4, :2] = True
    want[4 + 1 :, 2:] = True
    assert torch.equal(nan, want)


def test_a_query_of_nan_gives_nan_and_no_other_does():
    case = make(64, 2, ((2, 20),), torch.bfloat16).stored()
    case.query[1, 2, 7] = math.nan
    got = attend(case.cache, case.query, case.context, Scoring(0.125), dialect_attention=True)
    nan = got.isnan().all(dim=2)
    assert torch.equal(nan, got.isnan().any(dim=2))
    assert nan.nonzero().tolist() == [[1, 2]]
