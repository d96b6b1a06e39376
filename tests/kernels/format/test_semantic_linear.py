"""Salient tokens and shared variants against the brute force, bit for bit (sections 5 and 6)."""

import numpy as np
import pytest
import torch

import dialect_kernels
from dialect_kernels import SEMANTIC_32, cpu, quantize, reference
from tests.support import brute_force as brute
from tests.support import brute_semantic
from tests.support.format_checks import BLOCK_SIZES, BOOKS, as_float32, data, to_packed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODULES = [reference, dialect_kernels] if cpu.available() else [reference]
by_book = pytest.mark.parametrize("book", brute.BOOKS, ids=lambda book: book.name)
by_block_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)
NAN, INF = float("nan"), float("inf")


def weight(book: brute.Book, rows: int, columns: int, block_size: int = 32) -> brute.Packed:
    x = as_float32(data("lognormal_channels", rows, columns, seed=rows + columns)) / 16
    return brute.quantize(x, book, block_size, "mse")


def rounded_to(y: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The one output rounding, without torch's cast."""
    if dtype == torch.float32:
        return torch.from_numpy(y)
    if dtype == torch.float16:
        return torch.from_numpy(y.astype(np.float16))
    return torch.from_numpy(brute.to_bf16(y).view(np.int16)).view(torch.bfloat16)


def assert_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


def tokens_of(salient: torch.Tensor | None) -> set[int]:
    return set() if salient is None else {t for t in salient.tolist() if t >= 0}


def check(
    x: torch.Tensor,
    b: brute.Packed,
    bias: np.ndarray | None = None,
    salient: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every implementation gives the brute force's bits; samples are independent."""
    samples = x if x.dim() == 3 else x[None]
    of_sample = [
        [None] * len(samples) if argument is None else argument if x.dim() == 3 else [argument]
        for argument in (salient, group)
    ]
    want = np.stack(
        [
            brute_semantic.linear(
                as_float32(sample), b, bias, tokens_of(s), None if g is None else g.tolist()
            )
            for sample, s, g in zip(samples, *of_sample, strict=True)
        ]
    )
    want = rounded_to(want.reshape(*x.shape[:-1], b.shape[0]), x.dtype)
    for module in MODULES:
        torch_bias = None if bias is None else torch.from_numpy(bias)
        y = module.semantic_linear(x, to_packed(b), torch_bias, salient, group)
        assert_bits(y, want)
    return want


@by_book
@by_block_size
@pytest.mark.parametrize("kind", ["gaussian", "one_channel", "grid"])
def test_decomposed_tokens(kind, block_size, book):
    b = weight(book, 5, 128, block_size)
    bias = as_float32(data("gaussian", 1, 5, seed=1))[0]
    for dtype in DTYPES:
        x = data(kind, 4, 128, seed=2).to(dtype)
        plain = check(x, b)
        y = check(x, b, bias, torch.tensor([2, 0]))
        assert not torch.equal(y[0], (plain + torch.from_numpy(bias))[0])
        check(x, b, None, torch.tensor([2, 0]))


@by_block_size
@pytest.mark.parametrize("kind", ["gaussian", "one_channel", "grid", "wide"])
def test_groups_share_a_variant_in_every_block(kind, block_size):
    b = weight(brute.SEM, 4, 128, block_size)
    group = torch.tensor([7, -1, 0, 7, 7, 0], dtype=torch.int32)
    for dtype in DTYPES:
        x = data(kind, 6, 128, seed=3).to(dtype)
        check(x, b, None, None, group)
        rounded = reference.round_activation(x, SEMANTIC_32, block_size, group)
        tokens = brute_semantic.round_sample(as_float32(x), brute.SEM, block_size, group.tolist())
        assert rounded.tolist() == [[float(v) for v in token.values()] for token in tokens]


def test_groups_matter():
    """The cases above would mean little if sharing changed nothing."""
    x = data("gaussian", 6, 128, seed=3)
    shared = reference.round_activation(x, SEMANTIC_32, 32, torch.tensor([7, -1, 0, 7, 7, 0]))
    free = reference.round_activation(x, SEMANTIC_32, 32)
    assert torch.equal(shared[1], free[1])
    assert not torch.equal(shared[0], free[0])


def sub_formatbook(block: np.ndarray, row: np.ndarray) -> set[int]:
    """Variants whose grid holds every value of a rounded block whose exponent is the row's."""
    exponent = brute.block_exponent([abs(brute.whole(v)) for v in row])
    cells = [brute.cell(abs(brute.whole(v)), exponent) for v in row]
    first = 4 * (15 - brute.block_maximum(cells))
    halves = {int(abs(v) * 2.0 ** (1 - exponent)) for v in block.tolist()}
    return {v for v in range(4) if halves <= set(brute.SEM.grids[first + v])}


def test_members_keep_their_own_range_and_share_the_shape():
    """Tokens of very different size and maximum: the exponents differ, one variant holds all."""
    x = (
        data("gaussian", 8, 64, seed=4)
        * torch.tensor([2.0**-30, 1, 3, 5, 0.7, 2.0**60, 9, 1])[:, None]
    )
    rounded = reference.round_activation(x, SEMANTIC_32, 64, torch.zeros(8, dtype=torch.int64))
    possible = [sub_formatbook(q, row) for q, row in zip(rounded, as_float32(x), strict=True)]
    assert set.intersection(*possible)
    free = reference.round_activation(x, SEMANTIC_32, 64)
    assert not set.intersection(
        *[sub_formatbook(q, row) for q, row in zip(free, as_float32(x), strict=True)]
    )


def tied_pair() -> tuple[np.ndarray, list[list[int]]]:
    """Two tokens of one block whose summed costs tie between variants that are not variant 0."""
    rng = np.random.default_rng(5)
    for _ in range(20000):
        x = np.zeros((2, 16), np.float32)
        x[:, :6] = rng.integers(0, 32, (2, 6)) / 4
        blocks = [brute_semantic.cut(row, 16)[0][0] for row in x]
        costs = [[brute_semantic.variant_cost(block, v) for v in range(4)] for block in blocks]
        sums = [sum(pair) for pair in zip(*costs, strict=True)]
        best = [v for v in range(4) if sums[v] == min(sums)]
        alone = {cost.index(min(cost)) for cost in costs}
        if len(best) > 1 and best[0] > 0 and best[0] not in alone:
            return x, costs
    raise AssertionError("no tie was found")


def test_ties_go_to_the_smallest_variant():
    x, costs = tied_pair()
    sums = [sum(pair) for pair in zip(*costs, strict=True)]
    group = torch.tensor([4, 4])
    rounded = reference.round_activation(torch.from_numpy(x), SEMANTIC_32, 16, group)
    smallest = [
        brute_semantic.round_token(row, brute.SEM, 16, [sums.index(min(sums))]) for row in x
    ]
    assert rounded.tolist() == [[float(v) for v in token.values()] for token in smallest]
    check(torch.from_numpy(x), weight(brute.SEM, 3, 16, 16), None, None, group)


def test_every_token_counts_alike():
    """Huge or tiny, a member's cost is in LUT units: scaling it changes nobody's variant."""
    x = data("gaussian", 5, 64, seed=6)
    group = torch.tensor([0, 0, 0, 0, 0])
    plain = reference.round_activation(x, SEMANTIC_32, 32, group)
    scale = torch.tensor([1, 2.0**40, 2.0**-40, 1, 2.0**10])[:, None]
    assert torch.equal(reference.round_activation(x * scale, SEMANTIC_32, 32, group), plain * scale)


def test_zero_blocks_in_groups():
    x = data("gaussian", 4, 96, seed=7)
    x[0, 32:64] = 0
    x[1] = 0
    x[2, :32] *= 2.0**-30  # below the window, and all cells 0
    check(x, weight(brute.SEM, 3, 96), None, torch.tensor([0, 1]), torch.tensor([0, 0, 0, 0]))


@by_block_size
def test_blocks_below_the_window(block_size):
    """Their cells are those of the window's edge, for the residual and for the group's sum."""
    x = data("gaussian", 4, 192, seed=8)
    x[:, block_size:] *= 2.0**-14
    x[:2, :block_size] *= 2.0**3
    check(
        x, weight(brute.SEM, 3, 192, block_size), None, torch.tensor([1, 2]), torch.zeros(4).int()
    )


@by_book
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_together_in_two_samples(dtype, book):
    """-1 pads, a token named twice counts once, numbers of two samples are different groups."""
    b = weight(book, 7, 72, 16)
    x = data("student_t2", 10, 72, seed=9).view(2, 5, 72).to(dtype)
    bias = as_float32(data("gaussian", 1, 7, seed=10))[0]
    salient = torch.tensor([[3, -1, 3, 1], [-1, -1, 0, 4]])
    group = None
    if book is brute.SEM:
        group = torch.tensor([[2, -1, 2, 2, 0], [2, 2, 0, 0, 2]], dtype=torch.int32)
    y = check(x, b, bias, salient, group)
    for sample in range(2):
        alone = check(x[sample], b, bias, salient[sample], None if group is None else group[sample])
        assert_bits(alone, y[sample])


def test_residuals_are_not_grouped():
    """A salient token's first rounding follows its group, its second one decides alone."""
    b = weight(brute.SEM, 6, 64)
    x = data("gaussian", 4, 64, seed=11)
    group = torch.tensor([0, 0, 0, 0])
    q1 = reference.round_activation(x, SEMANTIC_32, 32, group)
    alone = reference.round_activation(x - q1, SEMANTIC_32, 32)
    grouped = reference.round_activation(x - q1, SEMANTIC_32, 32, group)
    assert not torch.equal(alone, grouped)
    check(x, b, None, torch.arange(4), group)


@by_book
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (31, 3), (33, 9), (100, 17), (0, 4)])
def test_odd_sizes(rows, columns, book):
    x = data("gaussian", 3, columns, seed=12) if columns else torch.zeros(3, 0)
    group = torch.tensor([1, 1, -1]) if book is brute.SEM else None
    b = (
        weight(book, rows, columns)
        if columns
        else brute.quantize(np.zeros((4, 0), np.float32), book)
    )
    check(x, b, None, torch.tensor([1]), group)


@by_book
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_tokens_samples_or_salient_ones(dtype, book):
    b = weight(book, 4, 48, 16)
    p, nobody = to_packed(b), torch.empty(0, dtype=torch.int64)
    x = data("gaussian", 3, 48, seed=13).to(dtype)
    check(x, b, None, nobody)
    check(x, b, None, torch.tensor([-1, -1]))
    check(x[None], b, None, nobody[None])
    grouped = {"group": torch.empty(0, dtype=torch.int64)} if book is brute.SEM else {}
    for module in MODULES:
        y = module.semantic_linear(x[:0], p, None, nobody, **grouped)
        assert (y.shape, y.dtype) == ((0, 4), dtype)
        y = module.semantic_linear(x[None, :0], p, None, torch.tensor([[-1, -1]]))
        assert y.shape == (1, 0, 4)
        y = module.semantic_linear(x[None][:0], p, None, torch.empty(0, 2, dtype=torch.int64))
        assert y.shape == (0, 3, 4)


@by_book
def test_without_options_it_is_dialect_linear(book):
    b = weight(book, 4, 64)
    x = data("student_t2", 6, 64, seed=14)
    want = reference.dialect_linear(x, to_packed(b), None, "dialect", "exact")
    assert_bits(check(x, b), want)


@by_book
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_stay_in_their_row_and_out_of_their_group(value, book):
    b = weight(book, 4, 64)
    x = data("gaussian", 6, 64, seed=15)
    group = torch.tensor([3, 3, 3, -1, 3, 5]) if book is brute.SEM else None
    x[1, 0] = x[3, 63] = x[5, 5] = value
    y = check(x, b, np.ones(4, np.float32), torch.tensor([0, 1, 3]), group)
    assert y[[1, 3, 5]].isnan().all()
    assert not y[[0, 2, 4]].isnan().any()


def test_a_huge_token_with_nan_does_not_decide_for_its_group():
    """Its finite channels would cost like any other's; the whole token is left out."""
    x = data("gaussian", 5, 64, seed=16)
    group = torch.zeros(5, dtype=torch.int64)
    x[2:, 63] = NAN
    rounded = reference.round_activation(x, SEMANTIC_32, 32, group)
    pair = reference.round_activation(x[:2], SEMANTIC_32, 32, group[:2])
    assert torch.equal(rounded[:2], pair)
    assert rounded[2:].isnan().all()


@by_book
@pytest.mark.parametrize("exponent", [-149, -126, -118, 60, 124])
def test_far_from_one(exponent, book):
    """Residuals among subnormals, and below the lowest exponent."""
    x = (data("gaussian", 3, 64, seed=17).clamp(-3, 3).double() * 2.0**exponent).float()
    scale = 2.0 ** (-exponent / 2)
    b = brute.quantize(as_float32(data("gaussian", 3, 64, seed=18) * scale), book, 32, "mse")
    group = torch.tensor([0, 0, 0]) if book is brute.SEM else None
    check(x, b, None, torch.tensor([0, 2]), group)


@pytest.mark.parametrize("value", [2.0**66, -(2.0**66)])
def test_a_product_that_overflows_is_infinite_unless_its_residual_says_otherwise(value):
    """inf + a finite residual stays inf; two infinities of different sign are NaN, as in IEEE."""
    b = brute.quantize(np.full((1, 32), 2.0**66, np.float32), brute.SEM)
    x = torch.full((2, 32), value)
    x[1] *= 1.1
    with np.errstate(over="ignore", invalid="ignore"):
        check(x, b, None, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "integer", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
)
def test_any_integer_type_numbers_groups(integer):
    """The largest numbers of a type in two samples are different groups still."""
    top = min(torch.iinfo(integer).max, 2**31 - 1)
    group = torch.tensor([[top, top, 0], [top, 0, top]], dtype=integer)
    x = data("gaussian", 6, 64, seed=19).view(2, 3, 64)
    check(x, weight(brute.SEM, 3, 64), None, None, group)


def test_views_and_strides():
    b = weight(brute.SEM, 4, 64)
    wide = data("gaussian", 12, 128, seed=20).view(3, 4, 128)
    x = wide.transpose(0, 1)[:, :, ::2]
    salient = torch.tensor([[0, 2], [1, -1], [0, 1], [2, 2]])
    group = torch.tensor([[0, 0, 1, 1], [1, 0, -1, 0], [0, 0, 1, 0]]).T
    check(x, b, None, salient.T.contiguous().T, group)


def test_inputs_are_left_alone():
    p = quantize(data("gaussian", 4, 64, seed=21), SEMANTIC_32)
    x, bias = data("gaussian", 3, 64, seed=22), torch.ones(4)
    salient, group = torch.tensor([2, -1, 2]), torch.tensor([1, 1, -1])
    given = (x, bias, salient, group)
    before = [tensor.clone() for tensor in given]
    for module in MODULES:
        module.semantic_linear(x, p, bias, salient, group)
    assert all(map(torch.equal, given, before))


@by_book
def test_a_decomposed_token_is_much_closer(book):
    x = data("gaussian", 8, 1024, seed=23)
    eye = quantize(torch.eye(1024), BOOKS[book])
    y = dialect_kernels.semantic_linear(x, eye, None, torch.arange(4))
    error = (y - x).square().sum(1) / x.square().sum(1)
    assert (error[:4] < 3e-4).all()
    assert (error[4:] > 5e-3).all()


@pytest.mark.parametrize("batched", [False, True])
def test_without_the_compiled_kernel_results_are_close(batched, monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    p = quantize(data("gaussian", 6, 96, seed=24), SEMANTIC_32)
    x = data("student_t2", 4, 96, seed=25)
    salient, group = torch.tensor([1, -1, 1, 3]), torch.tensor([0, 0, -1, 0])
    if batched:
        x, salient, group = x.view(2, 2, 96), torch.tensor([[1], [-1]]), group.view(2, 2)
    y = dialect_kernels.semantic_linear(x, p, torch.ones(6), salient, group)
    want = reference.semantic_linear(x, p, torch.ones(6), salient, group)
    magnitude = x.abs() @ p.dequantize(torch.float32).abs().T
    assert y.shape == want.shape
    assert ((y - want).abs() <= 2.0**-20 * magnitude).all()


X, P = torch.ones(3, 64), quantize(torch.ones(4, 64), SEMANTIC_32)
BATCH = torch.ones(2, 3, 64)
BAD = [
    ({"x": torch.ones(3, 63)}, r"x: has shape \[3, 63\].*64 columns"),
    ({"x": torch.ones(64)}, r"x: has shape \[64\]; it must be \[B, T, K\] or \[T, K\]"),
    ({"x": torch.ones(1, 1, 3, 64)}, r"x: has shape \[1, 1, 3, 64\]; it must be \[B, T, K\]"),
    ({"x": torch.ones(3, 64).double()}, "x: has dtype torch.float64; allowed are float32"),
    ({"x": torch.ones(3, 64).int()}, "x: has dtype torch.int32; allowed are float32"),
    ({"bias": torch.ones(3)}, r"bias: has shape \[3\]; it must be \[4\]"),
    (
        {"salient": torch.tensor([3])},
        r"salient: holds 3\.\.3; x has 3 tokens, so allowed are -1 .* to 2",
    ),
    (
        {"salient": torch.tensor([0, -2])},
        r"salient: holds -2\.\.0; x has 3 tokens, so allowed are -1",
    ),
    ({"salient": torch.tensor([0]).int()}, r"salient: torch.int32 \[1\]; .* torch.int64 \[S\]"),
    ({"salient": torch.tensor(0)}, r"salient: torch.int64 \[\]; .* torch.int64 \[S\]"),
    ({"salient": torch.ones(3, dtype=torch.bool)}, r"salient: torch.bool \[3\]; .*int64 \[S\]"),
    ({"x": BATCH, "salient": torch.tensor([0])}, r"salient: torch.int64 \[1\]; .*int64 \[B, S\]"),
    ({"x": BATCH, "salient": torch.tensor([[0]])}, "salient: is for 1 samples, x holds 2"),
    ({"x": X[:0], "salient": torch.tensor([0])}, r"salient: holds 0\.\.0; x has 0 tokens"),
    ({"group": torch.zeros(3)}, r"group: torch.float32 \[3\]; it must be integers \[3\]"),
    ({"group": torch.ones(3).bool()}, r"group: torch.bool \[3\]; it must be integers \[3\]"),
    ({"group": torch.zeros(2).int()}, r"group: torch.int32 \[2\]; it must be integers \[3\]"),
    ({"x": BATCH, "group": torch.zeros(3).int()}, r"group: .*\[3\]; it must be integers \[2, 3\]"),
    ({"group": torch.tensor([0, 0, -2])}, r"group: holds -2\.\.0; allowed are -1\.\.2147483647"),
    ({"group": torch.tensor([0, 0, 2**31])}, r"group: holds 0\.\.2147483648; allowed are -1\.\."),
    (
        {"p": quantize(torch.ones(4, 64)), "group": torch.zeros(3).int()},
        "group: tokens cannot share variants of book 'dialect_fp4'; use the 32-dialect book",
    ),
    ({"salient": torch.tensor([0], device="meta")}, "salient: is on meta, x on cpu; move them"),
    ({"group": torch.zeros(3, device="meta").int()}, "group: is on meta, x on cpu; move them"),
    ({"bias": torch.ones(4, device="meta")}, "bias: is on meta, x on cpu; move them"),
]


@pytest.mark.parametrize("module", [dialect_kernels, reference], ids=lambda m: m.__name__)
@pytest.mark.parametrize(("changes", "message"), BAD, ids=range(len(BAD)))
def test_wrong_arguments_are_refused_in_one_sentence(changes, message, module):
    with pytest.raises(ValueError, match=message) as error:
        module.semantic_linear(**{"x": X, "p": P, **changes})
    assert "\n" not in str(error.value)


def test_x_and_the_weight_must_be_on_one_device():
    with pytest.raises(ValueError, match="x: is on meta, the weight on cpu; move them"):
        dialect_kernels.semantic_linear(X.to("meta"), P)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (torch.zeros(2).int(), r"group: torch.int32 \[2\]; it must be integers \[3\]"),
        (torch.tensor([0, -5, 0]), r"group: holds -5\.\.0"),
    ],
)
def test_round_activation_refuses_bad_groups(group, message):
    with pytest.raises(ValueError, match=message):
        reference.round_activation(X, SEMANTIC_32, 32, group)
    with pytest.raises(ValueError, match="book 'dialect_fp4'"):
        reference.round_activation(X, group=torch.zeros(3).int())
