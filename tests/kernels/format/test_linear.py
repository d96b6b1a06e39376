"""`dialect_linear`: bit for bit in accumulation `exact`, within its bound in `default`."""

from functools import partial

import numpy as np
import pytest
import torch

import dialect_kernels
from dialect_kernels import DIALECT_FP4, SEMANTIC_32, dialect_linear, ops, quantize, reference
from dialect_kernels.rotation import rotate_activation
from tests.support import brute_force as brute
from tests.support.format_checks import BLOCK_SIZES, as_float32, data, to_packed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_book = pytest.mark.parametrize("book", brute.BOOKS, ids=lambda book: book.name)
by_format = pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
rounding_format = pytest.mark.parametrize("activation_format", ["dialect", "fp8"])


def weight(book: brute.Book, rows: int, columns: int, block_size: int, seed: int) -> brute.Packed:
    x = as_float32(data("lognormal_channels", rows, columns, seed)) / 16
    return brute.quantize(x, book, block_size, "mse")


def rounded_to(y: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The one output rounding, without torch's cast."""
    if dtype == torch.float32:
        return torch.from_numpy(y)
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(y.astype(np.float16))
    return torch.from_numpy(brute.to_bf16(y).view(np.int16)).view(torch.bfloat16)


def assert_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


def exact(x, b: brute.Packed, bias, activation_format):
    results = [
        module.dialect_linear(x, to_packed(b), bias, activation_format, accumulation="exact")
        for module in (dialect_kernels, reference)
    ]
    assert_bits(results[0], results[1])
    return results[0]


def products(x: np.ndarray, b: brute.Packed, activation_format: str):
    """(sum, sum of magnitudes) of the products of the rounded operands, float64 [T, N]."""
    x = x.astype(np.float64)
    if activation_format == "dialect":
        x = brute.round_activation(x.astype(np.float32), b.book, b.block_size)
    elif activation_format == "fp8":
        rows = [brute.fp8_row(row) for row in x.astype(np.float32)]
        x = np.array([values * scale for values, scale in rows])
    w = b.values()
    return x @ w.T, np.abs(x) @ np.abs(w).T


@rounding_format
@by_book
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", ["gaussian", "one_channel"])
def test_exact_is_the_brute_force_bit_for_bit(kind, block_size, book, activation_format):
    b = weight(book, 5, 192, block_size, seed=1)
    x = data(kind, 3, 192, seed=2)
    bias = as_float32(data("gaussian", 1, 5, seed=3))[0]
    for dtype in DTYPES:
        tokens = (x / 64).to(dtype)
        y = brute.linear(as_float32(tokens), b, None, activation_format)
        assert_bits(exact(tokens, b, None, activation_format), rounded_to(y, dtype))
        y = brute.linear(as_float32(tokens), b, bias, activation_format)
        got = exact(tokens, b, torch.from_numpy(bias), activation_format)
        assert_bits(got, rounded_to(y, dtype))


@rounding_format
@by_book
@pytest.mark.parametrize("columns", [1, 31, 100])
def test_exact_with_padded_columns(columns, book, activation_format):
    b = weight(book, 4, columns, 32, seed=4)
    x = data("gaussian", 3, columns, seed=5)
    y = brute.linear(as_float32(x), b, None, activation_format)
    assert_bits(exact(x, b, None, activation_format), torch.from_numpy(y))


@rounding_format
def test_exact_adds_blocks_in_ascending_order(activation_format):
    """Blocks of very different size: another order gives other float32 bits."""
    rng = np.random.default_rng(6)
    blocks = rng.standard_normal((2, 6, 12, 16)) * np.exp2(rng.integers(-12, 1, (12, 1)))
    x, w = blocks.astype(np.float32).reshape(2, 6, 192)
    y = brute.linear(x, brute.quantize(w, block_size=16), None, activation_format)
    got = exact(torch.from_numpy(x), brute.quantize(w, block_size=16), None, activation_format)
    assert_bits(got, torch.from_numpy(y))
    x, w = blocks.astype(np.float32)[:, :, ::-1].reshape(2, 6, 192)
    descending = brute.linear(x, brute.quantize(w, block_size=16), None, activation_format)
    assert not np.array_equal(y, descending)


@pytest.mark.parametrize("exponent", [-60, 60])
@rounding_format
def test_exact_far_from_one(exponent, activation_format):
    x = data("gaussian", 2, 64, seed=8) * 2.0**exponent
    b = brute.quantize(as_float32(data("gaussian", 3, 64, seed=9) * 2.0 ** (-exponent / 2)))
    y = brute.linear(as_float32(x), b, None, activation_format)
    assert_bits(exact(x, b, None, activation_format), torch.from_numpy(y))


@by_format
@pytest.mark.parametrize(("token", "value"), [(120, -115), (-115, 120)])
def test_products_that_float32_holds_do_not_overflow_on_the_way(token, value, activation_format):
    x = torch.full((1, 64), 2.0**token)
    b = brute.quantize(np.full((1, 64), 2.0**value, np.float32))
    assert exact(x, b, None, activation_format).tolist() == [[64 * 32.0]]
    y = dialect_linear(x, to_packed(b), None, activation_format).item()
    assert abs(y - 64 * 32.0) <= 2.0**-7 * 64 * 32.0


@by_format
@by_book
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_stays_within_its_bound(dtype, book, activation_format):
    b = weight(book, 6, 1024, 32, seed=10)
    for kind in ("gaussian", "one_channel"):
        x = (data(kind, 4, 1024, seed=11) / 8).to(dtype)
        y = dialect_linear(x, to_packed(b), None, activation_format, accumulation="default")
        true, magnitude = products(as_float32(x), b, activation_format)
        output_rounding = torch.finfo(dtype).eps / 2 * np.abs(true) + torch.finfo(dtype).tiny
        error = np.abs(y.to(torch.float64).numpy() - true)
        assert (error <= 2.0**-7 * magnitude + output_rounding).all()


@by_book
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_none_in_exact_is_float32_good(dtype, book):
    """One float32 rounding for each block sum and each addition, and the output's."""
    b = weight(book, 6, 512, 32, seed=12)
    x = (data("gaussian", 4, 512, seed=13)).to(dtype)
    y = exact(x, b, None, "none").to(torch.float64).numpy()
    true, magnitude = products(as_float32(x), b, "none")
    bound = 2 * 16 * 2.0**-24 * magnitude + torch.finfo(dtype).eps / 2 * 1.01 * np.abs(true)
    assert (np.abs(y - true) <= bound).all()


@by_book
@pytest.mark.parametrize("accumulation", ["exact", "default"])
def test_none_is_exact_where_float32_is(accumulation, book):
    """Whole numbers, whose sums float32 holds: any order of any implementation gives these bits."""
    b = weight(book, 5, 96, 16, seed=14)
    b = brute.decode(b.codes, b.meta & ((1 << book.id_bits) - 1), np.full(5, 1, np.int8),
                     b.shape, book, 16)  # fmt: skip
    x = torch.from_numpy(np.random.default_rng(15).integers(-64, 65, (4, 96)).astype(np.float32))
    for dtype in DTYPES:
        y = dialect_linear(x.to(dtype), to_packed(b), None, "none", accumulation)
        true, _ = products(as_float32(x), b, "none")
        assert_bits(y, rounded_to(true.astype(np.float32), dtype))


def test_none_in_fp16_never_makes_a_plain_fp16_weight():
    # 2**17 is no float16, 2**17 * 2**-10 is
    b = brute.quantize(np.full((1, 32), 2.0**17, np.float32))
    x = torch.full((1, 32), 2.0**-10, dtype=torch.float16)
    for accumulation in ("exact", "default"):
        y = dialect_linear(x, to_packed(b), None, "none", accumulation)
        assert y.tolist() == [[32 * 2.0**7]]


@by_format
@pytest.mark.parametrize("accumulation", ["exact", "default"])
def test_bias_is_added_in_float32_before_the_one_rounding(accumulation, activation_format):
    # 256 + 1 + 2**-7 rounds to 258 in bfloat16 at once, but to 256 if the sum is rounded first
    b = brute.quantize(np.ones((1, 32), np.float32))
    x = torch.full((1, 32), 8.0, dtype=torch.bfloat16)
    bias = torch.tensor([1.0 + 2.0**-7], dtype=torch.bfloat16)
    y = dialect_linear(x, to_packed(b), bias, activation_format, accumulation)
    assert y.tolist() == [[258.0]]


@by_format
@pytest.mark.parametrize("accumulation", ["exact", "default"])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64)])
def test_one_to_four_dimensions(shape, accumulation, activation_format):
    p = to_packed(weight(brute.FP4, 5, 64, 32, seed=16))
    tokens = int(np.prod(shape[:-1]))
    x = data("gaussian", max(tokens, 1), 64, seed=17)[:tokens]
    flat = dialect_linear(x, p, None, activation_format, accumulation)
    y = dialect_linear(x.reshape(shape), p, None, activation_format, accumulation)
    assert y.shape == (*shape[:-1], 5)
    assert_bits(y.reshape(-1, 5), flat)


@by_format
def test_non_contiguous_tokens(activation_format):
    p = to_packed(weight(brute.FP4, 5, 64, 32, seed=18))
    x = data("gaussian", 64, 6, seed=19)
    for view in (x.T, x.T[::2], data("gaussian", 6, 128, seed=20)[:, ::2]):
        y = dialect_linear(view, p, None, activation_format, accumulation="exact")
        tidy = dialect_linear(view.contiguous(), p, None, activation_format, accumulation="exact")
        assert_bits(y, tidy)


@by_format
@pytest.mark.parametrize("accumulation", ["exact", "default"])
def test_empty_weights(accumulation, activation_format):
    no_rows = quantize(torch.zeros(0, 32))
    assert dialect_linear(torch.ones(3, 32), no_rows, None, activation_format).shape == (3, 0)
    no_columns = quantize(torch.zeros(4, 0))
    bias = torch.arange(4.0)
    y = dialect_linear(torch.ones(3, 0), no_columns, bias, activation_format, accumulation)
    assert_bits(y, bias.expand(3, 4))


@by_format
def test_exact_does_not_depend_on_the_batch_or_the_threads(activation_format):
    p = to_packed(weight(brute.FP4, 33, 256, 32, seed=21))
    x = data("student_t2", 40, 256, seed=22).to(torch.bfloat16)
    whole = dialect_linear(x, p, None, activation_format, accumulation="exact")
    for tokens in (1, 2, 7, 16, 33):
        part = dialect_linear(x[-tokens:], p, None, activation_format, accumulation="exact")
        assert_bits(part, whole[-tokens:])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        again = dialect_linear(x, p, None, activation_format, accumulation="exact")
    finally:
        torch.set_num_threads(threads)
    assert_bits(again, whole)


@rounding_format
@pytest.mark.parametrize("accumulation", ["exact", "default"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_row(dtype, value, accumulation, activation_format):
    b = weight(brute.FP4, 4, 64, 32, seed=23)
    p, bias = to_packed(b), torch.ones(4)
    x = data("gaussian", 5, 64, seed=24).to(dtype)
    clean = dialect_linear(x, p, bias, activation_format, accumulation)
    x[1, 0] = x[4, 63] = value
    y = dialect_linear(x, p, bias, activation_format, accumulation)
    assert y[[1, 4]].isnan().all()
    assert_bits(y[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("accumulation", ["exact", "default"])
def test_none_is_plain_ieee_with_nan_and_inf(accumulation):
    w = torch.zeros(3, 32)
    w[0], w[1] = 1.0, -1.0  # the third row is zero: Inf * 0 is NaN
    x = torch.ones(3, 32)
    x[1, 3], x[2, 3] = float("inf"), float("nan")
    y = dialect_linear(x, quantize(w), None, "none", accumulation)
    assert y[0].tolist() == [32.0, -32.0, 0.0]
    assert y[1, :2].tolist() == [float("inf"), -float("inf")]
    assert y[1, 2].isnan()
    assert y[2].isnan().all()


@by_format
@pytest.mark.parametrize("accumulation", ["exact", "default"])
def test_output_overflow_is_infinite_not_an_ordinary_number(accumulation, activation_format):
    p = quantize(torch.full((1, 32), 60000.0, dtype=torch.float16))
    x = torch.full((1, 32), 60000.0, dtype=torch.float16)
    y = dialect_linear(x, p, None, activation_format, accumulation)
    assert y.tolist() == [[float("inf")]]


@by_format
@pytest.mark.parametrize("accumulation", ["exact", "default"])
def test_zero_tokens_give_the_bias(accumulation, activation_format):
    p = to_packed(weight(brute.SEM, 4, 64, 32, seed=25))
    bias = torch.tensor([1.0, -2.0, 0.5, 0.0])
    y = dialect_linear(torch.zeros(2, 64), p, bias, activation_format, accumulation)
    assert_bits(y, bias.expand(2, 4))


@pytest.mark.parametrize("module", [dialect_kernels, reference], ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 63)}, r"x: has shape \[2, 63\].*64 columns"),
        ({"x": torch.tensor(1.0)}, r"x: has shape \[\].*64 columns"),
        ({"x": torch.ones(2, 64, dtype=torch.float64)}, "x: has dtype torch.float64"),
        ({"bias": torch.ones(3)}, r"bias: has shape \[3\]; it must be \[4\]"),
        ({"bias": torch.ones(1, 4)}, r"bias: has shape \[1, 4\]; it must be \[4\]"),
        ({"bias": torch.ones(4, device="meta")}, "bias: is on meta, x on cpu; move them to one"),
        ({"activation_format": "fp4"}, "activation_format: 'fp4'; allowed are 'dialect', 'fp8'"),
        ({"accumulation": "fast"}, "accumulation: 'fast'; allowed are 'default' and 'exact'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(changes, message, module):
    with pytest.raises(ValueError, match=message) as error:
        module.dialect_linear(
            **{"x": torch.ones(2, 64), "p": quantize(torch.ones(4, 64)), **changes}
        )
    assert "\n" not in str(error.value)


def test_weights_written_in_place_are_seen():
    """The torch path caches decoded weights; new bytes in the same tensors must count."""
    p = quantize(torch.ones(2, 32))
    x = torch.ones(1, 32)
    assert dialect_linear(x, p, None, "none").tolist() == [[32.0, 32.0]]
    p.codes.copy_(quantize(-torch.ones(2, 32)).codes)
    assert dialect_linear(x, p, None, "none").tolist() == [[-32.0, -32.0]]
    p.row_exponent.add_(1)
    assert dialect_linear(x, p, None, "none").tolist() == [[-64.0, -64.0]]


@by_format
@pytest.mark.parametrize("accumulation", ["exact", "default"])
def test_it_can_be_traced(accumulation, activation_format):
    p = quantize(data("gaussian", 8, 64, seed=26), SEMANTIC_32)
    x = data("gaussian", 2, 64, seed=27)

    def op(x, codes, meta, row_exponent):
        return torch.ops.blockdialect.linear(
            x, codes, meta, row_exponent, None, 64, "semantic_32", 32,
            activation_format, accumulation,
        )  # fmt: skip

    torch.library.opcheck(
        torch.ops.blockdialect.linear.default,
        (x, p.codes, p.meta, p.row_exponent, None, 64, "semantic_32", 32,
         activation_format, accumulation),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    y = op(x, p.codes, p.meta, p.row_exponent)
    assert_bits(y, dialect_linear(x, p, None, activation_format, accumulation))


def test_inputs_are_left_alone():
    p = quantize(data("gaussian", 4, 64, seed=28), DIALECT_FP4)
    x, bias = data("gaussian", 2, 64, seed=29), torch.ones(4)
    before = x.clone()
    for activation_format in ("dialect", "fp8", "none"):
        dialect_linear(x, p, bias, activation_format)
    assert torch.equal(x, before)
    assert torch.equal(bias, torch.ones(4))


@pytest.mark.parametrize("rotation", ["none", "hadamard_32"])
def test_gradients_are_those_of_the_decoded_weight(rotation):
    torch.manual_seed(0)
    p = quantize(torch.randn(8, 64), rotation=rotation)
    x, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 64), (8,)))
    upstream = torch.randn(2, 3, 8)
    decoded = rotate_activation(p.dequantize(), rotation)
    for product in (partial(ops.dialect_linear, accumulation="exact"), ops.semantic_linear):
        y = product(x, p, bias)
        found = torch.autograd.grad(y, (x, bias), upstream)
        torch.testing.assert_close(found[0], upstream @ decoded)
        torch.testing.assert_close(found[1], upstream.sum((0, 1)))
        with torch.no_grad():
            assert torch.equal(product(x, p, bias), y)
            assert not product(x, p, bias).requires_grad
