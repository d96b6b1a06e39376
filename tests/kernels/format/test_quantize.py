"""`quantize` against the brute force: every byte, for all books, rules, block sizes, windows."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dialect_kernels
from dialect_kernels import DIALECT_FP4, SEMANTIC_32, ops, quantize, reference
from tests.support import brute_force as brute
from tests.support.format_checks import BLOCK_SIZES, BOOKS, RULES, as_float32, assert_same, data

KINDS = ("gaussian", "lognormal_channels", "student_t2", "wide", "grid")

by_rule = pytest.mark.parametrize(
    ("book", "rule"), RULES, ids=[f"{book.name}-{rule}" for book, rule in RULES]
)


def both(x: torch.Tensor, book=brute.FP4, block_size=32, rule="mse", window=None) -> None:
    expected = brute.quantize(as_float32(x), book, block_size, rule, window)
    assert_same(reference.quantize(x, BOOKS[book], block_size, rule, window), expected)
    assert_same(quantize(x, BOOKS[book], block_size, rule, window), expected)


@by_rule
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_as_the_brute_force(kind, book, rule, block_size):
    both(data(kind, 3, 128, seed=block_size), book, block_size, rule)


@by_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_inputs_are_computed_as_float32(dtype, book, rule):
    both(data("student_t2", 3, 64, seed=9).to(dtype), book, 32, rule)


@by_rule
@pytest.mark.parametrize("columns", [1, 15, 33, 100])
def test_columns_are_padded_to_whole_blocks(columns, book, rule):
    x = data("gaussian", 2, columns, seed=columns)
    both(x, book, 32, rule)
    p = quantize(x, BOOKS[book], 32, rule)
    assert p.shape == (2, columns)
    assert p.codes.shape == (2, -(-columns // 32) * 16)
    assert p.dequantize(torch.float32).shape == (2, columns)


@by_rule
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
def test_empty_inputs_give_empty_outputs(shape, book, rule):
    x = torch.zeros(shape)
    both(x, book, 32, rule)
    p = quantize(x, BOOKS[book], 32, rule)
    assert p.dequantize(torch.bfloat16).shape == shape
    e4m3, scale = p.to_e4m3()
    assert e4m3.shape == shape
    assert scale.shape == shape[:1]


@by_rule
def test_non_contiguous_input_is_read_as_it_looks(book, rule):
    x = data("gaussian", 64, 6, seed=2)
    for view in (x.T, x.T[::2], x.T[:, ::2], data("gaussian", 1, 64, seed=3).expand(4, 64)):
        assert not view.is_contiguous()
        both(view, book, 16, rule)


@by_rule
@pytest.mark.parametrize("window", range(14))
def test_every_window(window, book, rule):
    if window > book.stored_window:
        with pytest.raises(ValueError, match=f"window: {window} .*semantic_32.*0..7"):
            quantize(torch.zeros(1, 32), BOOKS[book], 32, rule, window)
        return
    # from one to twenty binades below the row's largest block, so that some are always clamped
    x = data("gaussian", 2, 20 * 16, seed=window)
    x *= torch.exp2(-torch.arange(20.0)).repeat_interleave(16)
    expected = brute.quantize(as_float32(x), book, 16, rule, window)
    assert expected.deltas.max() == window
    both(x, book, 16, rule, window)


@by_rule
def test_the_default_window_is_the_largest_the_meta_byte_holds(book, rule):
    x = data("wide", 2, 128, seed=4)
    p = quantize(x, BOOKS[book], 32, rule)
    assert torch.equal(p.meta, quantize(x, BOOKS[book], 32, rule, book.stored_window).meta)


TINY = 2.0**-149
HUGE = float(np.finfo(np.float32).max)
JUST_BELOW_8 = float(np.nextafter(np.float32(8), np.float32(0)))

SPECIAL = {
    "zeros": [0.0] * 32,
    "minus zero": [-0.0] * 32,
    "zeros of both signs and one value": [-0.0, 0.0, -1.0] + [-0.0] * 29,
    "all equal": [3.0] * 32,
    "all equal, negative": [-0.1] * 32,
    "all the smallest subnormal": [TINY] * 32,
    "subnormals": [i * TINY for i in range(-16, 16)],
    "largest subnormal": [2.0**-126 - TINY] * 32,
    "smallest normal": [2.0**-126, -(2.0**-126)] * 16,
    "cells 0 only, below the lowest exponent": [2.0**-123] * 32,
    "just above cells 0": [2.0**-122, -(2.0**-122), 2.0**-123] + [0.0] * 29,
    "lowest exponent exactly": [2.0**-118, 2.0**-119] * 16,
    "largest float32": [HUGE, -HUGE] * 16,
    "largest float32 and the smallest": [HUGE, TINY] * 16,
    "maximum just below a power of two": [JUST_BELOW_8, -1.0, 3.3] + [0.3] * 29,
    "maximum at a power of two": [8.0, -1.0, 3.3] + [0.3] * 29,
    "everything saturates": [JUST_BELOW_8] * 32,
    "half an ulp around 7.75": [7.75, 7.75 - 2**-21, 7.75 + 2**-21, -7.75] + [0.0] * 28,
    "one element": [0.0] * 31 + [-5.2],
    "all midpoints": [i / 4 for i in range(32)],
    "all cell centres": [(2 * i + 1) / 8 for i in range(32)],
    "quarter and below": [4.0, 0.25, -0.25, 0.25 - 2**-26, -0.25 + 2**-26] + [0.1] * 27,
}


@by_rule
@pytest.mark.parametrize("name", SPECIAL)
def test_special_blocks(name, book, rule):
    both(torch.tensor([SPECIAL[name]]), book, 32, rule)
    both(torch.tensor([SPECIAL[name]]), book, 16, rule)


@by_rule
def test_special_blocks_beside_each_other(book, rule):
    for window in (book.stored_window, 3, 0):
        row = torch.tensor([value for block in SPECIAL.values() for value in block])
        both(torch.stack([row, row.flip(0)]), book, 32, rule, window)


@by_rule
@pytest.mark.parametrize("exponent", [-126, -60, 0, 60, 127])
def test_zero_blocks_are_zeroed_memory_wherever_the_row_stands(exponent, book, rule):
    x = torch.zeros(2, 96)
    x[0, 40] = 2.0**exponent
    p = quantize(x, BOOKS[book], 32, rule)
    assert p.row_exponent.tolist() == [max(-120, exponent - 2), -120]
    zeros = [0, 1, 2] if exponent < -122 else [0, 2]  # 2**-126 is in cell 0 at exponent -120
    assert p.meta[0, zeros].tolist() == [0] * len(zeros)
    assert p.codes.view(2, 3, 16)[0, zeros].sum() == 0
    assert p.meta[1].sum() == p.codes[1].sum() == 0


@by_rule
def test_index_0_never_has_a_sign(book, rule):
    x = -data("wide", 16, 64, seed=11).abs()
    codes = quantize(x, BOOKS[book], 16, rule).codes
    assert not ((codes & 15) == 8).any()
    assert not ((codes >> 4) == 8).any()


def tied_blocks(count: int) -> torch.Tensor:
    """Blocks in which dialects 0 and 1 (…, 11, 15 and …, 9, 15) have equal errors and both win.

    The two differ in one level: an element m next to it costs 11(11 - 4m) or 9(9 - 4m), so pairs
    5 - d, 5 + d cancel exactly. What the rest adds is the same in both, but its squares are longer
    than a float64 and their sum is rounded at another place in each.
    """
    rng = np.random.default_rng(0)
    blocks = np.zeros((count, 32))
    d = rng.integers(1, 2**20, (count, 6)) * 2.0**-21  # whole float32 steps, below 1/2
    blocks[:, 0:6], blocks[:, 6:12] = 5 - d, 5 + d
    blocks[:, 12:20] = 7.5
    blocks[:, 20:] = rng.uniform(0.01, 0.24, (count, 12))  # index 0 in every dialect
    signs = rng.choice([-1, 1], (count, 32))
    return torch.from_numpy((rng.permuted(blocks, axis=1) * signs).astype(np.float32))


def plain_sum_of_squares(x: np.ndarray, book: brute.Book) -> int:
    """The dialect that float64 sums of squared errors pick: what the rule `mse` must not do."""
    exponent = int(np.frexp(np.abs(x).max())[1]) - 3
    scaled = np.abs(np.ldexp(x.astype(np.float64), -exponent))
    errors = []
    for grid in book.grids:
        values = np.array(grid)[brute.nearest_indices(grid, scaled)] / 2
        errors.append(float(((scaled - values) ** 2).sum()))
    return errors.index(min(errors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ties_of_the_exact_error_rule_take_the_lowest_id(dtype):
    x = tied_blocks(200).to(dtype)  # rounding is symmetric about 5: the pairs stay pairs
    dialects = quantize(x, DIALECT_FP4, 32, "mse").meta & 15
    tied = [brute.squared_errors(brute.FP4, row)[:2] for row in as_float32(x)[:40]]
    assert all(first == second for first, second in tied)
    assert dialects.unique().tolist() == [0]
    both(x[:40], brute.FP4, 32, "mse")


def test_those_ties_mislead_plain_sums_of_squares():
    x = as_float32(tied_blocks(200))
    misled = sum(plain_sum_of_squares(row, brute.FP4) != 0 for row in x)
    assert misled >= 10


def test_errors_one_float32_step_apart_are_told_apart():
    x = tied_blocks(20)
    for row in x:
        near = (row.abs() > 4.4) & (row.abs() < 5.6)
        at = int(near.nonzero()[0])
        for step, winner in ((1, 0), (-1, 1)):
            moved = row.clone()
            toward = row[at].sign() * (5.0 + step)
            moved[at] = torch.nextafter(row[at], toward)
            p = quantize(moved[None], DIALECT_FP4, 32, "mse")
            assert int(p.meta[0, 0] & 15) == winner
            assert_same(p, brute.quantize(as_float32(moved[None])))


def test_a_two_stage_tie_takes_the_even_dialect():
    # M = 15; one element in the cells of dialect 0 (20 to 25), one in those of dialect 1 (15 to 19)
    x = torch.tensor([[7.5, 5.5, 4.0] + [0.0] * 13])
    assert quantize(x, DIALECT_FP4, 16, "two_stage").meta.tolist() == [[0]]
    x[0, 3] = -4.1
    assert quantize(x, DIALECT_FP4, 16, "two_stage").meta.tolist() == [[1]]


def test_a_lut_tie_takes_the_smallest_variant():
    # only 0 and 15, which every variant of M = 15 has
    x = torch.tensor([[7.5, -7.5] + [0.0] * 14])
    assert quantize(x, SEMANTIC_32, 16, "lut").meta.tolist() == [[0]]


# Properties. Floats are whole numbers of 1/64 below 2**6 times a power of two: many ties, and room
# to scale without leaving float32.
blocks_of_16 = st.lists(st.integers(-4095, 4095), min_size=16, max_size=16)
matrices = st.lists(
    st.tuples(blocks_of_16, st.integers(-16, 0)), min_size=1, max_size=4
)  # one row: blocks and their powers of two
rules = st.sampled_from(RULES)
relaxed = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def row_of(blocks: list[tuple[list[int], int]]) -> torch.Tensor:
    values = [number / 64 * 2.0**power for block, power in blocks for number in block]
    return torch.tensor([values])


@given(matrices, rules)
@relaxed
def test_property_equal_to_the_brute_force(blocks, book_rule):
    both(row_of(blocks), book_rule[0], 16, book_rule[1])


@given(matrices, rules, st.integers(-90, 110))
@relaxed
def test_property_a_power_of_two_moves_the_row_exponent_only(blocks, book_rule, power):
    book, rule = book_rule
    x = row_of(blocks)
    p = quantize(x, BOOKS[book], 16, rule)
    scaled = quantize(x * 2.0**power, BOOKS[book], 16, rule)
    if x.any():
        assert torch.equal(scaled.codes, p.codes)
        assert torch.equal(scaled.meta, p.meta)
        assert int(scaled.row_exponent) == int(p.row_exponent) + power
    else:
        assert int(scaled.row_exponent) == -120


@given(matrices, rules)
@relaxed
def test_property_negation_flips_the_signs_of_nonzero_codes(blocks, book_rule):
    book, rule = book_rule
    x = row_of(blocks)
    p, n = quantize(x, BOOKS[book], 16, rule), quantize(-x, BOOKS[book], 16, rule)
    low, high = p.codes & 7, (p.codes >> 4) & 7
    flip = (low > 0).to(torch.uint8) << 3 | (high > 0).to(torch.uint8) << 7
    assert torch.equal(n.codes, p.codes ^ flip)
    assert torch.equal(n.meta, p.meta)
    assert torch.equal(n.row_exponent, p.row_exponent)


@given(matrices, rules, st.permutations(range(16)))
@relaxed
def test_property_a_permutation_inside_the_blocks_permutes_the_codes(blocks, book_rule, order):
    book, rule = book_rule
    x = row_of(blocks)
    moved = x.view(-1, 16)[:, list(order)].reshape(1, -1)
    p, q = quantize(x, BOOKS[book], 16, rule), quantize(moved, BOOKS[book], 16, rule)
    assert torch.equal(q.meta, p.meta)
    assert torch.equal(q.row_exponent, p.row_exponent)
    values = p.dequantize().view(-1, 16)[:, list(order)].reshape(1, -1)
    assert torch.equal(q.dequantize(), values)


@given(matrices, rules, st.permutations(range(4)))
@relaxed
def test_property_blocks_do_not_see_each_other_but_for_the_exponent(blocks, book_rule, order):
    book, rule = book_rule
    order = [i for i in order if i < len(blocks)]
    p = quantize(row_of(blocks), BOOKS[book], 16, rule)
    q = quantize(row_of([blocks[i] for i in order]), BOOKS[book], 16, rule)
    assert torch.equal(q.meta, p.meta[:, order])
    assert torch.equal(q.codes.view(-1, 8), p.codes.view(-1, 8)[order])
    assert torch.equal(q.row_exponent, p.row_exponent)


@given(st.lists(matrices, min_size=2, max_size=4), rules)
@relaxed
def test_property_rows_do_not_see_each_other(rows, book_rule):
    book, rule = book_rule
    width = max(map(len, rows)) * 16
    alone = [torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in map(row_of, rows)]
    p = quantize(torch.cat(alone), BOOKS[book], 16, rule)
    for i, row in enumerate(alone):
        q = quantize(row, BOOKS[book], 16, rule)
        assert torch.equal(q.codes[0], p.codes[i])
        assert torch.equal(q.meta[0], p.meta[i])
        assert q.row_exponent[0] == p.row_exponent[i]


@given(matrices, rules)
@relaxed
def test_property_zero_columns_at_the_end_change_nothing(blocks, book_rule):
    book, rule = book_rule
    x = row_of(blocks)
    p = quantize(x, BOOKS[book], 16, rule)
    q = quantize(torch.nn.functional.pad(x, (0, 16)), BOOKS[book], 16, rule)
    assert torch.equal(q.codes[:, :-8], p.codes)
    assert torch.equal(q.meta[:, :-1], p.meta)
    assert q.codes[:, -8:].sum() == q.meta[:, -1] == 0


@given(st.integers(1, 70), st.integers(0, 2**32 - 1), rules, st.sampled_from(BLOCK_SIZES))
@relaxed
def test_property_any_float32_bits(columns, seed, book_rule, block_size):
    book, rule = book_rule
    bits = np.random.default_rng(seed).integers(0, 2**32, (2, columns), dtype=np.uint32)
    x = bits.view(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(0))
    both(torch.from_numpy(x), book, block_size, rule)


MODULES = [dialect_kernels, reference]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_inf_are_refused_with_name_and_first_position(dtype, value, module):
    x = torch.ones(4, 40, dtype=dtype)
    x[2, 33] = x[2, 39] = x[3, 0] = value
    with pytest.raises(ValueError, match=r"model\.layers\.0\.weight: .*(nan|inf) at \[2, 33\]"):
        module.quantize(x, name="model.layers.0.weight")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 32, dtype=torch.float64)}, "w: .*float64.*float32, bfloat16"),
        ({"x": torch.ones(2, 32, dtype=torch.int8)}, "w: .*int8.*float32, bfloat16"),
        ({"x": torch.ones(32)}, r"w: .*\[32\].*2-D"),
        ({"x": torch.ones(1, 2, 32)}, r"w: .*\[1, 2, 32\].*2-D"),
        ({"block_size": 8}, "block_size: 8; allowed are 16, 32 and 64"),
        ({"block_size": 48}, "block_size: 48; allowed are 16, 32 and 64"),
        ({"rule": "lut"}, "rule: 'lut' with book 'dialect_fp4'; allowed are 'mse' and 'two_stage'"),
        (
            {"rule": "two_stage", "book": SEMANTIC_32},
            "rule: 'two_stage' with book 'semantic_32'; allowed are 'mse' and 'lut'",
        ),
        ({"rule": "best"}, "rule: 'best'"),
        ({"window": 14}, "window: 14 with book 'dialect_fp4'; allowed are 0..13"),
        ({"window": -1}, "window: -1"),
        ({"window": 8, "book": SEMANTIC_32}, "window: 8 with book 'semantic_32'.*0..7"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused_in_one_sentence(arguments, message, module):
    with pytest.raises(ValueError, match=message) as error:
        module.quantize(**{"x": torch.ones(2, 32), "name": "w", **arguments})
    assert "\n" not in str(error.value)


def test_the_input_is_left_alone():
    x = data("gaussian", 4, 64, seed=1)
    before = x.clone()
    quantize(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts_and_values_come_with_the_bytes(dtype):
    torch.manual_seed(3)
    x = (torch.randn(7, 100) * torch.exp2(torch.randint(-14, 9, (7, 100)).float())).to(dtype)
    for book, window in ((DIALECT_FP4, None), (DIALECT_FP4, 3), (SEMANTIC_32, None)):
        packed, below = ops.quantize_counted(x, book, 16, window=window, finite=True)
        want = reference.quantize(x, book, 16, window=window)
        for field in ("codes", "meta", "row_exponent"):
            assert torch.equal(getattr(packed, field), getattr(want, field))
        used = book.largest_stored_delta if window is None else window
        assert torch.equal(below, reference.blocks_below_window(x, 16, used))
        assert below.sum() > 0
        for out in (torch.float32, torch.bfloat16, torch.float16):
            got = ops.dequantize(packed, out)
            assert torch.equal(got.view(torch.uint8), want.dequantize(out).view(torch.uint8))


def test_only_a_caller_that_has_looked_skips_the_search_for_nan():
    x = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    with pytest.raises(ValueError, match=r"w: nan at \[0, 1\]"):
        ops.quantize_counted(x, name="w")
    packed, _ = ops.quantize_counted(x, name="w", finite=True)
    assert packed.shape == (2, 2)
