"""Products by the library's GEMM on decoded weights: in parts, with residuals, rounded once."""

import os
from itertools import pairwise

import pytest
import torch

from dialect_kernels import SEMANTIC_32, quantize, reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from dialect_kernels.gpu import library, linear
from dialect_kernels.gpu.library import Library, library_product
from dialect_kernels.gpu.linear import Route, quantize_tokens
from dialect_kernels.gpu.tuning import GemmPlan

EIGHT = Library(eight_bits=True)
SCRATCH = Route(GemmPlan("scratch"), eight_bits=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands(dtype=torch.float32, features=200, tokens=5):
    p = quantize(tensor(features, 64, seed=1) / 10, SEMANTIC_32)
    x, bias = tensor(tokens, 64).to(dtype), tensor(features, seed=2).to(dtype)
    return x, p, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_rounded_once(biased, dtype):
    x, p, bias = operands(dtype)
    given = quantize_tokens(x, p, "dialect", SCRATCH)
    y = library_product(*given, p, bias if biased else None, dtype, EIGHT)
    want = reference.round_activation(x, p.book).double() @ p.dequantize().double().T
    want = want + bias.double() if biased else want
    assert (y.double() - want).abs().max() <= 0.51 * torch.finfo(dtype).eps * 4 * want.abs().max()
    if dtype != torch.float32:
        assert (y != want.float().to(dtype)).float().mean() < 0.02, "ties and little else"


@pytest.mark.parametrize("eight_bits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_give_the_bits_of_the_whole(dtype, eight_bits, monkeypatch):
    x, p, bias = operands(dtype)
    how = Library(eight_bits)
    given = quantize_tokens(x, p, "dialect", SCRATCH._replace(eight_bits=eight_bits))
    want = library_product(*given, p, bias, dtype, how)
    seen = []
    decode = library.decode_e4m3 if eight_bits else library.decode_bf16

    def noted(part, into):
        seen.append(part.shape[0])
        return decode(part, into)

    monkeypatch.setattr(library, decode.__name__, noted)
    monkeypatch.setattr(library, "_FEATURES", 32)
    monkeypatch.setattr(library, "_SMALL_CACHE", 1)
    small = how._replace(cache=64 * 64 * (1 if eight_bits else 2) * 16 // 7 + 16)
    assert torch.equal(library_product(*given, p, bias, dtype, small), want)
    assert seen == [64, 64, 64, 8]
    seen.clear()
    monkeypatch.setattr(library, "_LARGEST_RESULT", 4 * 5 * 100)
    assert torch.equal(library_product(*given, p, bias, dtype, how), want)
    assert len(seen) == (1 if dtype == torch.bfloat16 else 2)


@pytest.mark.parametrize("eight_bits", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_decoded_gives_the_bits_of_decoding(dtype, eight_bits, monkeypatch):
    """Whole, and in parts of a float32 result, the last of which is smaller than a program's."""
    x, p, bias = operands(dtype)
    how = Library(eight_bits, cache=60 << 20)
    given = quantize_tokens(x, p, "dialect", SCRATCH._replace(eight_bits=eight_bits))
    want = library_product(*given, p, bias, dtype, how)
    kept = library.decode_weight(p, eight_bits)
    for name in ("decode_e4m3", "decode_bf16"):
        monkeypatch.setattr(library, name, lambda *_: pytest.fail("decoded again"))
    assert torch.equal(library_product(*given, p, bias, dtype, how, decoded=kept), want)
    monkeypatch.setattr(library, "_FEATURES", 32)
    monkeypatch.setattr(library, "_LARGEST_RESULT", 4 * 5 * 100)
    parts = list(library._parts(5, p, dtype, how, decoded=True))
    assert len(parts) == (1 if dtype == torch.bfloat16 else 2)
    assert torch.equal(library_product(*given, p, bias, dtype, how, decoded=kept), want)


@pytest.mark.parametrize("rotation", ["none", "hadamard_32"])
@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_a_layer_reads_what_is_kept_decoded(activation_format, rotation, monkeypatch):
    """From 65 tokens on; the memory is written again for other weights of the shape."""
    x = tensor(66, 64).to(torch.bfloat16)
    old, p = (
        quantize(tensor(40, 64, seed=seed) / 10, SEMANTIC_32, rotation=rotation) for seed in (8, 9)
    )
    arguments = (None, activation_format, "default")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "choose", lambda *_: GemmPlan("scratch"))
        want = linear.dialect_linear(x, p, *arguments)
    first = linear.decode_ahead(old, activation_format, torch.bfloat16)
    assert first.weight.element_size() == (2 if activation_format == "none" else 1)
    kept = linear.decode_ahead(p, activation_format, torch.bfloat16, first)
    assert kept.weight.data_ptr() == first.weight.data_ptr()
    called = []
    product = linear.library_product

    def noted(*arguments, **options):
        called.append(options["decoded"])
        return product(*arguments, **options)

    monkeypatch.setattr(linear, "library_product", noted)
    assert torch.equal(linear.dialect_linear(x, p, *arguments, kept), want)
    few = linear.dialect_linear(x[:64], p, *arguments, kept)
    assert called == [kept]
    assert torch.equal(few, linear.dialect_linear(x[:64], p, *arguments))


def test_what_nothing_would_read_is_not_decoded():
    _, p, _ = operands()
    assert linear.decode_ahead(p, "none", torch.float16) is None
    assert linear.decode_ahead(p, "none", torch.float32) is None
    assert linear.decode_ahead(p, "fp8", torch.float16).scale is not None
    assert linear.decode_ahead(p.slice_rows(0, 0), "fp8", torch.bfloat16) is None


def test_the_cache_counts_for_few_tokens_only():
    p = quantize(tensor(64, 4096))
    how = Library(True, cache=60 << 20)
    big = type("Weight", (), {"shape": (28672, 4096), "codes": torch.empty(0, 2048)})()
    for rows, most in ((513, 28 << 20), (1024, 28 << 20), (1025, 28672 * 4096)):
        parts = list(library._parts(rows, big, torch.bfloat16, how))
        assert parts[0][0] == 0
        assert parts[-1][1] == 28672
        assert all(a[1] == b[0] for a, b in pairwise(parts))
        assert max(last - first for first, last in parts) * 4096 <= most
        assert (len(parts) == 1) == (rows == 1025)
    assert list(library._parts(513, p, torch.bfloat16, how)) == [(0, 64)]
    assert len(list(library._parts(513, big, torch.bfloat16, Library(True, 6 << 20)))) == 1


@pytest.mark.parametrize(
    ("parts", "dtype"), [(False, torch.float16), (True, torch.bfloat16)], ids=str
)
def test_residuals_of_some_tokens(parts, dtype, monkeypatch):
    x, p, bias = operands(dtype)
    salient, group = torch.tensor([4, -1, 0, -1]), (torch.arange(5) % 3 - 1).int()
    if parts:
        monkeypatch.setattr(library, "_FEATURES", 64)
        monkeypatch.setattr(library, "_SMALL_CACHE", 1)
        how = EIGHT._replace(cache=64 * 64 * 16 // 7 + 16)
    else:
        how = EIGHT
    given = quantize_tokens(x, p, "dialect", SCRATCH, salient=salient, group=group)
    y = library_product(*given, p, bias, dtype, how, salient)
    want = reference.semantic_linear(x.double().float(), p, bias.float(), salient[[0, 2]], group)
    assert y.shape == want.shape
    assert (y.float() - want).abs().max() <= torch.finfo(dtype).eps * 2 * want.abs().max()


def test_both_paths_of_decomposed_tokens_agree(monkeypatch):
    x, p, bias = operands(features=40, tokens=3)
    salient, group = torch.tensor([2, -1]), torch.tensor([0, 1, -1], dtype=torch.int32)
    few = linear.semantic_linear(x, p, bias, salient, group)
    monkeypatch.setattr(linear, "route", lambda *_, **__: SCRATCH)
    many = linear.semantic_linear(x, p, bias, salient, group)
    assert not torch.equal(few, torch.zeros_like(few))
    assert (few - many).abs().max() <= 2.0**-20 * few.abs().max()


def test_sums_stay_in_the_accumulator_only_where_it_was_measured_to_be_wide():
    """The condition is the contract's bound for the worst case, in numbers."""
    assert not library._accumulates_fast(32, None)
    for bits, columns, allowed in (
        (13, 32, False),
        (14, 32, True),
        (14, 64, False),
        (21, 4096, True),
        (21, 14336, False),
        (22, 14336, True),
    ):
        worst = -(-columns // 32) * 33 * 2.0**-bits
        assert (worst <= 2.0**-8) == allowed
        assert library._accumulates_fast(columns, bits) == allowed
