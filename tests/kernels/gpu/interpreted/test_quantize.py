"""The activation quantizer in Triton's interpreter, every byte against the reference.

The interpreter runs the arithmetic twins of the inline PTX; tests/kernels/gpu/compiled compares the
two.
"""

import os

import pytest
import torch

from dialect_kernels import (
    DIALECT_FP4,
    SEMANTIC_32,
    PackedTensor,
    baselines,
    cpu,
    quantize,
    reference,
)
from dialect_kernels.formatbook import BLOCK_SIZES
from tests.support.quantizer_cases import (
    DTYPES,
    NAN,
    adversarial,
    all_pairs,
    as_fp8,
    decompose,
    operand_order,
    reference_fp8,
    round_groups,
    row_exponents,
    same_rows,
    tensor,
)

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from dialect_kernels.gpu.layout import RowConfig
from dialect_kernels.gpu.quantize_activations import quantize_activation
from dialect_kernels.gpu.quantize_fp8 import quantize_activation_fp8
from dialect_kernels.gpu.quantize_packed import quantize_weight

BOOKS = (DIALECT_FP4, SEMANTIC_32)
TOKENS = (0, 1, 2, 3, 17, 65)  # a program each

all_books = pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
all_blocks = pytest.mark.parametrize("block_size", BLOCK_SIZES)


def assert_rows(got, want):
    assert got[0].dtype == torch.float8_e4m3fn
    assert got[1].dtype == torch.float32
    assert same_rows(got, want)


@all_blocks
@all_books
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bytes_as_the_reference(dtype, book, block_size):
    x = tensor(4, 200).to(dtype)
    assert_rows(quantize_activation(x, book, block_size), reference_fp8(x, book, block_size))


@all_books
def test_any_number_of_tokens(book):
    x = tensor(max(TOKENS), 40).to(torch.bfloat16)
    want_q, want_scale = reference_fp8(x, book, 16)
    for tokens in TOKENS:
        got = quantize_activation(x[:tokens], book, 16)
        assert_rows(got, (want_q[:tokens], want_scale[:tokens]))


@all_blocks
@all_books
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_rows(dtype, book, block_size):
    x = adversarial(block_size).to(dtype)
    assert_rows(quantize_activation(x, book, block_size), reference_fp8(x, book, block_size))


@all_books
@pytest.mark.parametrize("columns", [0, 1, 31, 33, 129])
def test_columns_are_padded_to_whole_blocks(columns, book):
    x = tensor(2, columns).to(torch.bfloat16)
    if columns == 0:
        q, scale = quantize_activation(x, book, 32)
        assert q.shape == (2, 0)
        assert scale.tolist() == [2.0**-125] * 2
    else:
        assert_rows(quantize_activation(x, book, 32), reference_fp8(x, book, 32))


@all_books
def test_rows_longer_than_a_chunk(book):
    x = tensor(2, 700)
    x[:, -1] = 1e4  # the row's largest block is its last
    want = reference_fp8(x, book, 32)
    for chunk in (128, 256, 512, 1024):
        assert_rows(quantize_activation(x, book, 32, config=RowConfig(chunk, 4)), want)


def test_strided_tokens_are_read_as_they_look():
    x = tensor(6, 96).to(torch.bfloat16)
    for view in (x[::2], x[:, :64], x[:, ::3], x.T):
        assert_rows(
            quantize_activation(view, DIALECT_FP4, 32), reference_fp8(view, DIALECT_FP4, 32)
        )


@all_blocks
def test_columns_in_the_order_of_operands(block_size):
    x = tensor(2, 112)
    q, scale = reference_fp8(x, DIALECT_FP4, block_size)
    got = quantize_activation(x, DIALECT_FP4, block_size, operand_order=True)
    assert_rows(got, (operand_order(q), scale))
    q, scale = quantize_activation_fp8(x, block_size)
    got = quantize_activation_fp8(x, block_size, operand_order=True)
    assert_rows(got, (operand_order(q.view(torch.uint8)), scale))


def test_operands_without_fp8():
    x = torch.cat([adversarial(16)[:, :64], tensor(4, 64)])
    finite = x.isfinite().all(dim=1)
    for quantizer in (quantize_activation, quantize_activation_fp8):
        want, want_scale = quantizer(x)
        q, scale = quantizer(x, dtype=torch.bfloat16)
        assert q.dtype == torch.bfloat16
        assert torch.equal(q[finite].float(), want[finite].float())
        assert torch.equal(scale.view(torch.int32), want_scale.view(torch.int32))
        assert q.isfinite().all(), "a NaN scale beside them makes every product NaN"


@pytest.mark.parametrize("count", [1, 1024, 3000])
def test_memory_that_is_cleared_beside(count):
    x = tensor(3, 64)
    for quantizer in (quantize_activation, quantize_activation_fp8):
        zeros = torch.full((count + 7,), -1, dtype=torch.int32)
        quantizer(x, zeros=zeros[:count])
        assert zeros[:count].eq(0).all()
        assert zeros[count:].eq(-1).all()


def decomposed(x, book, block_size, salient, group=None):
    """(E4M3 bytes [T + S, Kp], scale [T + S]) by the brute force."""
    first = round_groups(x, book, block_size, group)
    residual = decompose(x, first, salient)
    second = round_groups(residual, book, block_size)
    rows = as_fp8(first, row_exponents(x), block_size)
    residual_rows = as_fp8(second, row_exponents(residual), block_size)
    residual_rows[1][(salient < 0) | (salient >= len(x))] = 1.0
    return tuple(torch.cat(pair) for pair in zip(rows, residual_rows, strict=True))


def test_the_brute_force_rounds_as_the_reference():
    x = tensor(6, 200)
    values = round_groups(x, SEMANTIC_32, 32)
    assert torch.equal(values, reference.round_activation(x, SEMANTIC_32, 32))


@all_books
@all_blocks
def test_residual_rows_of_salient_tokens(block_size, book):
    x = tensor(5, 160).to(torch.bfloat16)
    x[3] = 0
    salient = torch.tensor([4, -1, 0, 3, 7])
    first = reference.round_activation(x, book, block_size)
    residual = decompose(x, first, salient)
    want = [
        torch.cat(pair)
        for pair in zip(
            reference_fp8(x, book, block_size),
            reference_fp8(residual, book, block_size),
            strict=True,
        )
    ]
    want[1][[6, 9]] = 1.0  # unused places
    for dtype in (torch.int32, torch.int64):
        assert_rows(quantize_activation(x, book, block_size, salient=salient.to(dtype)), want)


def test_a_decomposed_token_is_nearly_exact():
    x = tensor(4, 128)
    q, scale = quantize_activation(x, SEMANTIC_32, 32, salient=torch.arange(4))
    values = q.float() * scale[:, None]
    error = (values[:4] + values[4:] - x).square().sum() / x.square().sum()
    assert error < 5e-4


def test_residuals_of_tokens_with_nan_are_nan():
    x = tensor(3, 64)
    x[1, 7] = NAN
    q, scale = quantize_activation(x, DIALECT_FP4, 32, salient=torch.tensor([1, 2]))
    assert scale.isnan().tolist() == [False, True, False, True, False]
    assert not q.view(torch.uint8)[[1, 3]].any()


@pytest.mark.parametrize("chunk", [128, 256])
@all_blocks
def test_tokens_of_a_group_share_their_variants(block_size, chunk):
    x = tensor(9, 200, seed=3).to(torch.bfloat16)
    group = torch.tensor([5, -1, 5, 0, 0, -1, 5, 8, 0], dtype=torch.int32)
    salient = torch.tensor([0, 3, -1, 1])
    want = decomposed(x, SEMANTIC_32, block_size, salient, group)
    free = decomposed(x, SEMANTIC_32, block_size, salient)
    assert not torch.equal(want[0], free[0]), "the groups change something"
    got = quantize_activation(
        x, SEMANTIC_32, block_size, salient=salient, group=group, config=RowConfig(chunk, 1)
    )
    assert_rows(got, want)
    alone = quantize_activation(x, SEMANTIC_32, block_size, group=group)
    assert_rows(alone, (want[0][:9], want[1][:9]))


def test_tokens_with_nan_do_not_touch_their_group():
    x = tensor(4, 64, seed=5)
    group = torch.zeros(4, dtype=torch.int32)
    want = as_fp8(round_groups(x[:3], SEMANTIC_32, 16, group[:3]), row_exponents(x[:3]), 16)
    x[3, 0] = NAN
    q, scale = quantize_activation(x, SEMANTIC_32, 16, group=group)
    assert_rows((q[:3], scale[:3]), want)
    assert scale[3].isnan()
    assert not q[3].view(torch.uint8).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_tokens(dtype):
    hard = torch.nn.functional.pad(adversarial(32), (0, 8), value=-17.3)
    x = torch.cat([tensor(6, 136), hard, torch.zeros(1, 136)])
    x[:6, 0] = torch.tensor([1e-45, 1e-42, 448.0, 3.3e38, -0.0, 1.0])
    # halfway between E4M3 numbers once divided by the scale 1, in the normal and subnormal range
    halves = torch.cat([torch.arange(8, 17) + 0.5, (torch.arange(9) + 0.5) / 512])
    x[-1, :19] = torch.cat([torch.tensor([448.0]), halves])
    x = x.to(dtype)
    q, scale = baselines.quantize_fp8(x)
    padded = torch.nn.functional.pad(q.view(torch.uint8), (0, 24))
    assert_rows(quantize_activation_fp8(x), (padded, scale))
    assert_rows(quantize_activation_fp8(x, config=RowConfig(128, 1)), (padded, scale))
    empty_q, empty_scale = quantize_activation_fp8(x[:, :0])
    assert (empty_q.shape, empty_scale.tolist()) == ((len(x), 0), [1.0] * len(x))


def assert_packed(got: PackedTensor, want: PackedTensor):
    assert torch.equal(got.row_exponent, want.row_exponent)
    assert torch.equal(got.meta, want.meta)
    assert torch.equal(got.codes, want.codes)


@all_pairs
def test_weights_by_exact_error(dtype, block_size, book):
    x = torch.cat([tensor(2, 4 * block_size), adversarial(block_size)[:11]]).to(dtype)
    x = x[x.isfinite().all(dim=1)]
    got = quantize_weight(x, book, block_size, "mse", book.largest_stored_delta)
    assert_packed(got, reference.quantize(x, book, block_size))


@all_books
def test_exact_ties_take_the_lowest_id(book):
    # magnitudes on levels and midpoints that several dialects share
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-16, 17, (2, 512), generator=generator) / 4.0
    x[:, ::16] = torch.randint(16, 32, (2, 32), generator=generator) / 4.0
    for dtype in (torch.float32, torch.bfloat16):
        got = quantize_weight(x.to(dtype), book, 16, "mse", book.largest_stored_delta)
        assert_packed(got, reference.quantize(x.to(dtype), book, 16))


@pytest.mark.parametrize(("book", "rule"), [(b, r) for b in BOOKS for r in b.rules])
@pytest.mark.parametrize("window", [0, 1, 7])
def test_every_rule_and_smaller_windows(window, book, rule):
    x = tensor(3, 200)
    got = quantize_weight(x, book, 32, rule, window, config=RowConfig(128, 1))
    assert_packed(got, reference.quantize(x, book, 32, rule, window))


@all_books
def test_weights_that_are_refused(book, monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    x = torch.zeros(2, 32)
    x[1, 2] = NAN
    with pytest.raises(ValueError, match=r"w: nan at \[1, 2\]"):
        quantize(x, book, 32, name="w")


def test_empty_weights():
    for shape in ((0, 64), (3, 0)):
        got = quantize_weight(torch.zeros(shape), DIALECT_FP4, 32, "mse", 13)
        assert_packed(got, reference.quantize(torch.zeros(shape)))


def test_arguments_that_are_refused():
    x = torch.zeros(4, 64)
    group = torch.zeros(4, dtype=torch.int32)
    for arguments, sentence in (
        ({"x": x.double()}, "x: has dtype torch.float64; allowed are"),
        ({"x": x[0]}, r"x: has shape \[64\]; it must be 2-D"),
        ({"block_size": 8}, "block_size: 8; allowed are 16, 32 and 64"),
        ({"dtype": torch.float16}, "dtype: torch.float16; allowed are float8_e4m3fn and bfloat16"),
        ({"salient": torch.zeros(2)}, r"salient: torch.float32 \[2\]; it must be int32 or int64"),
        ({"group": group.long()}, r"group: torch.int64 \[4\]; it must be torch.int32 \[4\]"),
        ({"group": group[:3]}, r"group: torch.int32 \[3\]; it must be torch.int32 \[4\]"),
        ({"group": group, "book": DIALECT_FP4}, "group: not defined for book 'dialect_fp4'"),
    ):
        options = {"x": x, "book": SEMANTIC_32, "block_size": 32} | arguments
        with pytest.raises(ValueError, match=sentence):
            quantize_activation(**options)
