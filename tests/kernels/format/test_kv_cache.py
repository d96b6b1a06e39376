"""A dialect KV cache by its definition: bytes of slots, rows of NaN, attention in plain torch."""

import math

import pytest
import torch

from dialect_kernels import SEMANTIC_32, reference
from dialect_kernels.cached_attention import attend, store
from dialect_kernels.kv_cache import Context, KvCache, Scoring, slot_bytes
from dialect_kernels.reference_attention import _round_probabilities, read
from dialect_kernels.reference_attention import attend as attend_by_reference
from dialect_kernels.reference_attention import store as store_by_reference
from tests.support.cached_attention import expected, expected_in_dialects, in_dialects, make

HADAMARD = torch.ones(1, 1)
for _ in range(5):
    HADAMARD = torch.cat([torch.cat([HADAMARD, HADAMARD], 1), torch.cat([HADAMARD, -HADAMARD], 1)])


def empty(head_size, heads=1, **options):
    memory = torch.full((2, heads, 4, slot_bytes(head_size)), 7, dtype=torch.uint8)
    return KvCache(memory, head_size, **options)


def test_bytes_of_a_slot():
    assert [slot_bytes(d) for d in (32, 64, 128)] == [36, 70, 138]
    with pytest.raises(ValueError, match="head_size: 80; a dialect cache needs a multiple of 32"):
        slot_bytes(80)


@pytest.mark.parametrize("save", [store_by_reference, store])
@pytest.mark.parametrize("rotated", [True, False])
def test_a_slot_holds_rows_of_the_32_dialect_book(rotated, save):
    """Codes, codes, meta, meta, R, R; small integers, whose sums are exact in any order."""
    draw = torch.Generator().manual_seed(0)
    key, value = (torch.randint(-50, 51, (1, 1, 64), generator=draw).float() for _ in range(2))
    cache = empty(64, rotated=rotated)
    save(cache, key, value, torch.tensor([6]))
    parts = []
    for row in (key[0], value[0]):
        if rotated:
            row = (row.view(2, 32) @ HADAMARD).view(1, 64)
        parts.append(reference.quantize(row, SEMANTIC_32, 32, "lut", 7))
    wanted = [p.codes[0] for p in parts] + [p.meta[0] for p in parts]
    wanted += [p.row_exponent.view(torch.uint8) for p in parts]
    assert torch.equal(cache.slots[1, 0, 2], torch.cat(wanted))
    cache.slots[1, 0, 2] = 7
    assert bool((cache.slots == 7).all())  # nothing else was written


@pytest.mark.parametrize("save", [store_by_reference, store])
def test_means_are_subtracted_before(save):
    draw = torch.Generator().manual_seed(1)
    key, value, mean = (torch.randn(1, 1, 64, generator=draw) for _ in range(3))
    with_mean, without = empty(64, key_mean=mean[0], value_mean=2 * mean[0]), empty(64)
    save(with_mean, key, value, torch.tensor([0]))
    save(without, key - mean, value - 2 * mean, torch.tensor([0]))
    assert torch.equal(with_mean.slots, without.slots)


@pytest.mark.parametrize("save", [store_by_reference, store])
@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0**125])
def test_a_row_that_is_not_finite_reads_as_nan(value, save):
    """The last one overflows in the butterfly."""
    key = torch.ones(2, 1, 64)
    key[0] = value
    cache = empty(64)
    save(cache, key, torch.ones(2, 1, 64), torch.tensor([1, 2]))
    assert not cache.slots[0, 0, 1, :32].any()
    assert not cache.slots[0, 0, 1, 64:66].any()
    assert int(cache.slots[0, 0, 1, 68].view(torch.int8)) == -128
    keys, values = read(cache, torch.tensor([1, 2]))
    assert bool(keys[0].isnan().all())
    assert bool(keys[1].isfinite().all())
    assert bool(values.isfinite().all())


@pytest.mark.parametrize("save", [store_by_reference, store])
def test_tokens_without_a_slot_are_left_out(save):
    cache = empty(32)
    save(cache, torch.randn(3, 1, 32), torch.randn(3, 1, 32), torch.tensor([-1, 5, -1]))
    assert (cache.slots != 7).any(dim=-1).nonzero().tolist() == [[1, 0, 1]]


SCORINGS = {
    "plain": Scoring(0.2),
    "window": Scoring(0.2, window=5),
    "cap": Scoring(0.2, soft_cap=3.0),
    "alibi": Scoring(0.2, slopes=torch.tensor([-0.3, 0.1, -0.02, 0.0])),
    "sinks": Scoring(0.2, soft_cap=3.0, sinks=torch.tensor([0.5, -3.0, 9.0, 0.0])),
}


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("name", SCORINGS)
def test_attention_by_its_definition(name, means):
    causal = torch.tensor([True, False, True, True])
    sequences = ((1, 1), (3, 20), (2, 2), (1, 37))
    case = make(64, 2, sequences, means=means, causal=causal).stored()
    found = attend_by_reference(case.cache, case.query, case.context, SCORINGS[name])
    torch.testing.assert_close(found.double(), expected(case, SCORINGS[name]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("name", ["plain", "window", "cap", "sinks"])
def test_attention_in_dialects_by_its_definition(name, means):
    """Weights that float32's exponentials bring to the other side of a step would show."""
    case = make(64, 2, ((1, 1), (3, 20), (2, 2), (1, 300), (2, 130)), means=means).stored()
    given = (case.cache, case.query, case.context, SCORINGS[name])
    found = attend_by_reference(*given, dialect_attention=True).double()
    wanted = expected_in_dialects(case, SCORINGS[name])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert float((attend_by_reference(*given) - wanted).abs().max()) > 0.02


def test_probabilities_are_rounded_over_the_exponents_of_their_values():
    """Chunks of 128, blocks of 32, one row exponent for each; what is not seen is 0."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.exp2(-20 * torch.rand(5, 300, generator=draw))
    exponents = torch.randint(-9, 5, (5, 300), generator=draw)
    seen = torch.rand(5, 300, generator=draw) < 0.9
    weights[~seen], exponents[~seen] = math.nan, 100
    exponents[0, :128] = -128  # rows of NaN
    found, most = _round_probabilities(weights, exponents, seen)
    assert most[0, 0] == -128
    for row in range(1, 5):
        for chunk in range(3):
            part = slice(128 * chunk, 128 * chunk + 128)
            own, r = seen[row, part], exponents[row, part]
            largest = int(r[own].max())
            assert most[row, chunk] == largest
            x = torch.where(own, weights[row, part] * 2.0 ** (r - largest), 0.0)
            padded = torch.nn.functional.pad(x, (0, 128 - len(x)))[None]
            wanted = in_dialects(padded)[0, : len(x)]
            assert torch.equal(found[row, part].double(), wanted)
    weights[2, 130], seen[2, 130] = math.nan, True
    found, _ = _round_probabilities(weights, exponents, seen)
    assert found[2].isnan().nonzero().flatten().tolist() == list(range(128, 256))


def test_what_does_not_fit_is_refused():
    cache = empty(64, heads=2)
    rows, slots = torch.zeros(3, 2, 64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"key: torch.float32 \[3, 1, 64\]; it must be"):
        store(cache, rows[:, :1], rows, slots)
    with pytest.raises(ValueError, match=r"value: torch\.float32, 2 tokens"):
        store(cache, rows, rows[:2], slots)
    with pytest.raises(ValueError, match=r"slots: torch.int32"):
        store(cache, rows, rows, slots.int())
    with pytest.raises(ValueError, match=r"slots: torch.int8 .* every slot contiguous"):
        KvCache(cache.slots.to(torch.int8), 64)
    with pytest.raises(ValueError, match=r"key_mean: torch.float32 \[64\]"):
        KvCache(cache.slots, 64, True, torch.zeros(64))
    whole = torch.tensor([0, 3], dtype=torch.int32)
    context = Context(whole, whole[1:], torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"query: torch.float32 \[3, 3, 64\]"):
        attend(cache, torch.zeros(3, 3, 64), context, Scoring(1.0))
    with pytest.raises(ValueError, match=r"lengths: torch\.int64"):
        attend(cache, rows, context._replace(lengths=whole[1:].long()), Scoring(1.0))
    with pytest.raises(ValueError, match=r"sinks: torch.float32 \[1\]"):
        attend(cache, rows, context, Scoring(1.0, sinks=torch.zeros(1)))
