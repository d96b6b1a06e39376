"""Products with packed weights in Triton's interpreter, against the reference and float64.

W4A4 in the mode `exact` must have the reference's bits. Elsewhere the bounds are those of the
format, section 3a, before the one rounding of the result.
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
    dialect_linear,
    quantize,
    reference,
    semantic_linear,
)
from dialect_kernels.formatbook import BLOCK_SIZES

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from dialect_kernels.gpu import linear
from dialect_kernels.gpu.gemm import arrivals
from dialect_kernels.gpu.linear import Route
from dialect_kernels.gpu.quantize_activations import quantize_activation
from dialect_kernels.gpu.quantize_fp8 import quantize_activation_fp8
from dialect_kernels.gpu.tuning import TABLES, GemmPlan

NAN = float("nan")
TOKENS = (0, 1, 2, 3, 8, 15, 16, 17, 31, 33, 64, 65, 127, 257)
SMALL = GemmPlan("fused", 16, 64, 64)

all_books = pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda b: b.name)
all_blocks = pytest.mark.parametrize("block_size", BLOCK_SIZES)


def tensor(rows, columns, seed=0):
    """float32 [rows, columns] with several exponents in a row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.exp2(torch.randint(-5, 6, (1, columns), generator=generator).float())


def weight(rows, columns, book=DIALECT_FP4, block_size=32):
    return quantize(tensor(rows, columns, seed=1) / 50, book, block_size)


def operands(x, p, activation_format):
    """What is multiplied, float64 [T, K] and [N, K]."""
    if activation_format == "dialect":
        x = reference.round_activation(x, p.book, p.block_size).double()
    elif activation_format == "fp8":
        q, scale = baselines.quantize_fp8(x)
        x = q.double() * scale.double()[:, None]
    return x.double(), p.dequantize().double()


def assert_within(y, x, p, activation_format, bias=None, bound=2.0**-18):
    """|error| <= bound * sum |a b|, and half a place of the result's type.

    The interpreter sums in float32, so what `default` allows (2**-7) is not used up.
    """
    a, b = operands(x, p, activation_format)
    want = a @ b.T + (0 if bias is None else bias.double())
    place = torch.finfo(y.dtype).eps
    allowed = bound * (a.abs() @ b.abs().T) + (place + 2.0**-22) * want.abs() + 1e-30
    if bias is not None:
        allowed = allowed + 2.0**-22 * bias.double().abs()
    assert y.isfinite().all()
    assert ((y.double() - want).abs() <= allowed).all()


def product(x, p, activation_format, accumulation="default", bias=None):
    assert linear.covers(x, p, activation_format, accumulation)
    return linear.dialect_linear(x, p, bias, activation_format, accumulation)


@all_blocks
@all_books
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_has_the_bits_of_the_reference(dtype, book, block_size):
    x, p = tensor(5, 200).to(dtype), weight(70, 200, book, block_size)
    bias = tensor(1, 70, seed=2)[0]
    for added in (None, bias):
        want = reference.dialect_linear(x, p, added, "dialect", "exact")
        assert torch.equal(product(x, p, "dialect", "exact", added), want)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # some sums are infinite
def test_exact_is_exact_for_extreme_scales():
    x, p = tensor(6, 64), weight(64, 64)
    p.row_exponent[:] = torch.arange(64) * 3 - 100
    for power in (-110, -60, 0, 60, 110):
        scaled = x * 2.0**power
        want = reference.dialect_linear(scaled, p, None, "dialect", "exact")
        assert torch.equal(product(scaled, p, "dialect", "exact"), want)


@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_any_number_of_tokens(activation_format):
    tokens, p = tensor(max(TOKENS), 96).to(torch.bfloat16), weight(40, 96)
    x, scale = tokens, None
    if activation_format == "dialect":
        x, scale = quantize_activation(tokens, operand_order=True)
    elif activation_format == "fp8":
        x, scale = quantize_activation_fp8(tokens, operand_order=True)
    for count in TOKENS[1:]:
        few = None if scale is None else scale[:count]
        how = linear.route(count, p.shape, activation_format, tokens.dtype, tokens.device)
        y = linear.multiply(x[:count], few, p, None, torch.bfloat16, how)
        assert y.shape == (count, 40)
        assert y.dtype == torch.bfloat16
        assert_within(y, tokens[:count], p, activation_format)


def test_a_token_has_the_same_bits_in_every_batch():
    x, p = tensor(max(TOKENS), 96), weight(40, 96)
    want = reference.dialect_linear(x, p, None, "dialect", "exact")
    q, scale = quantize_activation(x, dtype=torch.bfloat16)
    for count in TOKENS[1:]:
        how = linear.route(count, p.shape, "dialect", x.dtype, x.device, "exact")
        y = linear.multiply(q[:count], scale[:count], p, None, torch.float32, how)
        assert torch.equal(y, want[:count])


@all_blocks
@all_books
@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_default_within_its_bound(activation_format, book, block_size):
    x, p = tensor(3, 200).to(torch.bfloat16), weight(70, 200, book, block_size)
    assert_within(product(x, p, activation_format), x, p, activation_format)


@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (63, 64), (65, 129), (130, 256)])
def test_edges_of_the_weight(shape, activation_format):
    p = weight(*shape)
    x, bias = tensor(2, shape[1]).to(torch.float16), tensor(1, shape[0], seed=3)[0]
    for added in (None, bias, bias.to(torch.bfloat16)):
        y = product(x, p, activation_format, bias=added)
        assert y.dtype == torch.float16
        assert_within(y, x, p, activation_format, added)


@pytest.mark.parametrize("splits", [2, 3, 5])
def test_split_columns(splits):
    x, p, bias = tensor(18, 256), weight(65, 256), tensor(1, 65, seed=3)[0]
    plan = GemmPlan("fused", 16, 64, 64, splits)
    cases = {
        "dialect": (Route(plan, True), Route(plan, False)),
        "fp8": (Route(plan, True),),
        "none": (Route(plan, False),),
    }
    for activation_format, routes in cases.items():
        for how in routes:
            tokens, scale = x.to(torch.bfloat16), None
            zeros = arrivals(18, 65, plan, x.device)
            assert zeros.shape == (4,), "one counter for each tile"
            if activation_format == "none":
                zeros.zero_()
            else:
                tokens, scale = linear.quantize_tokens(x, p, activation_format, how, zeros=zeros)
            y = linear.multiply(tokens, scale, p, bias, torch.float32, how, zeros)
            given = tokens if scale is None else x
            assert_within(y, given, p, activation_format, bias)
            assert zeros.tolist() == [splits] * 4
            again = linear.multiply(tokens, scale, p, bias, torch.float32, how)
            assert torch.equal(again, y), "counters are made where none are given"


@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_decoding_to_memory_for_the_library(activation_format, monkeypatch):
    monkeypatch.setattr(linear, "choose", lambda *facts: GemmPlan("scratch"))
    for features, columns in ((40, 200), (64, 96)):
        p = weight(features, columns)
        bias = tensor(1, features, seed=3)[0]
        for dtype in (torch.bfloat16, torch.float16):
            x = tensor(5, columns).to(dtype)
            for added in (None, bias, bias.to(torch.bfloat16)):
                y = product(x, p, activation_format, bias=added)
                assert y.dtype == dtype
                assert y.is_contiguous()
                assert_within(y, x, p, activation_format, added, bound=2.0**-8)


@pytest.mark.parametrize("accumulation", ["default", "exact"])
def test_devices_without_fp8(accumulation, monkeypatch):
    monkeypatch.setattr(linear, "_device", lambda device: linear._Device("ampere", 4, (8, 0)))
    x, p = tensor(3, 136), weight(40, 136)
    for activation_format in ("dialect", "fp8") if accumulation == "default" else ("dialect",):
        y = product(x, p, activation_format, accumulation)
        assert_within(y, x, p, activation_format)
    monkeypatch.setattr(linear, "choose", lambda *facts: GemmPlan("scratch"))
    assert_within(product(x, p, "dialect"), x, p, "dialect", bound=2.0**-7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, for Inf - Inf
@pytest.mark.parametrize("bias", [None, torch.ones(40)])
@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_tokens_and_weights_that_are_not_finite(activation_format, bias):
    x, p = tensor(5, 64).to(torch.bfloat16), weight(40, 64)
    x[1, 3], x[3, 5] = NAN, float("inf")
    p.row_exponent[7] = -128
    y = product(x, p, activation_format, bias=bias)
    want = reference.dialect_linear(x, p, bias, activation_format)
    assert torch.equal(y.isnan(), want.isnan())
    assert y[1].isnan().all()
    assert y[:, 7].isnan().all()
    assert torch.equal(y.isinf(), want.isinf())
    if activation_format == "dialect":
        exact = product(x, p, activation_format, "exact", bias)
        assert torch.equal(exact.nan_to_num(), want.nan_to_num())


def test_huge_weights_times_tiny_tokens():
    x, p = tensor(2, 64) * 2.0**-110, weight(40, 64)
    p.row_exponent[:] = 110
    for activation_format in ("dialect", "fp8"):
        assert_within(product(x, p, activation_format), x, p, activation_format)


def test_tokens_of_any_stride():
    x = tensor(6, 128).to(torch.bfloat16)
    p = weight(40, 64)
    for view in (x[:, :64], x[::2, 64:], x[:, ::2], x[:3, :64].T.contiguous().T):
        assert torch.equal(product(view, p, "none"), product(view.contiguous(), p, "none"))


def test_every_tile_of_the_tables():
    x, p = tensor(3, 544), weight(40, 544)
    eight_bits = TABLES["fp8"] + TABLES["fp8_in_warps"][-1:]
    sixteen_bits = TABLES["sixteen_bits"] + linear.EXACT_PLANS
    for plans, how in ((eight_bits, True), (sixteen_bits, False)):
        for _, plan in plans:
            given = linear.quantize_tokens(x, p, "dialect", Route(plan, how))
            y = linear.multiply(*given, p, None, torch.float32, Route(plan, how))
            assert_within(y, x, p, "dialect")


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_meta_bytes_that_are_read_in_words(block_size):
    """A step of four blocks: every meta byte must reach its own block, in rows of several steps."""
    x, p = tensor(3, 768), weight(70, 768, block_size=block_size)
    for eight_bits in (True, False):
        how = Route(GemmPlan("fused", 16, 64, 4 * block_size), eight_bits)
        given = linear.quantize_tokens(x, p, "dialect", how)
        assert_within(linear.multiply(*given, p, None, torch.float32, how), x, p, "dialect")


def test_what_is_left_to_torch():
    x, p = tensor(2, 64), weight(40, 64)
    assert not linear.covers(x, p, "none", "default"), "float32 has more bits than the MMA"
    assert not linear.covers(x, p, "fp8", "exact")
    assert not linear.covers(x.to(torch.bfloat16), p, "none", "exact")
    assert linear.covers(x.to(torch.bfloat16), p, "none", "default")
    empty = PackedTensor(p.codes[:, :0], p.meta[:, :0], p.row_exponent, (40, 0), p.book, 32)
    assert not linear.covers(x[:, :0], empty, "dialect", "default")


def test_nothing_to_compute():
    p = weight(40, 64)
    for activation_format in ("dialect", "fp8", "none"):
        y = product(torch.zeros(0, 64, dtype=torch.bfloat16), p, activation_format)
        assert y.shape == (0, 40)
    none = PackedTensor(p.codes[:0], p.meta[:0], p.row_exponent[:0], (0, 64), p.book, 32)
    assert product(torch.zeros(3, 64), none, "dialect").shape == (3, 0)


def test_the_op_runs_the_kernels(monkeypatch):
    x, p, bias = tensor(6, 72).view(2, 3, 72), weight(40, 72), tensor(1, 40, seed=3)[0]
    monkeypatch.setattr(cpu, "available", lambda: False)
    want = reference.dialect_linear(x, p, bias)
    monkeypatch.setattr(reference, "dialect_linear", None)  # neither this one
    monkeypatch.setattr(PackedTensor, "dequantize", None)  # nor the path of plain torch
    assert torch.equal(dialect_linear(x, p, bias, accumulation="exact"), want)
    close = dialect_linear(x, p, bias)
    assert close.shape == (2, 3, 40)
    assert (close - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_op_quantizes_weights_with_the_kernel(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    w = tensor(5, 72)
    want = reference.quantize(w, SEMANTIC_32, 16)
    monkeypatch.setattr(reference, "pack_rounded", None)
    got = quantize(w, SEMANTIC_32, 16)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.meta, want.meta)
    assert torch.equal(got.row_exponent, want.row_exponent)


@pytest.mark.parametrize("given", ["dialect", "fp8", "none", "semantic"])
def test_several_weights_read_one_quantized_input(given, monkeypatch):
    """The bits of each weight's own product, whatever its plan; 16-bit tokens are not rounded."""
    each = [(weight(n, 200, SEMANTIC_32), tensor(1, n, seed=n)[0]) for n in (40, 8)]
    x = tensor(4, 200).to(torch.bfloat16)
    rows = torch.tensor([2, -1]) if given == "semantic" else None
    group = torch.tensor([0, 1, -1, 1], dtype=torch.int32) if given == "semantic" else None
    form = "dialect" if given == "semantic" else given
    if given == "semantic":
        want = [linear.semantic_linear(x, p, bias, rows, group) for p, bias in each]
    else:
        want = [linear.dialect_linear(x, p, bias, form, "default") for p, bias in each]
    quantized, quantize_tokens = [], linear.quantize_tokens

    def counted(*arguments, **options):
        quantized.append(1)
        return quantize_tokens(*arguments, **options)

    monkeypatch.setattr(linear, "quantize_tokens", counted)
    found = linear.linears(x, each, form, rows, group)
    assert len(quantized) == (given != "none")
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


@pytest.mark.parametrize("batched", [True, False])
def test_the_semantic_op_runs_the_kernels(batched, monkeypatch):
    p, bias = weight(40, 200, SEMANTIC_32), tensor(1, 40, seed=3)[0]
    x = tensor(8, 200).view(2, 4, 200) if batched else tensor(4, 200)
    salient = torch.tensor([[1, -1, 3], [0, 1, 1]])
    group = torch.tensor([[500, -1, 500, 7], [0, 0, -1, 500]])
    if not batched:
        salient, group = salient[0], group[0]
    monkeypatch.setattr(cpu, "available", lambda: False)
    cases = [(salient, group), (salient, None), (None, group), (None, None)]
    want = [reference.semantic_linear(x, p, bias, *case) for case in cases]
    assert not torch.equal(want[0], want[1]), "the groups change something"
    monkeypatch.setattr(PackedTensor, "dequantize", None)  # the path of plain torch
    for case, wanted in zip(cases, want, strict=True):
        got = semantic_linear(x, p, bias, *case)
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
