"""Rotation `hadamard_32`: the brute force's bits, in the reference and behind the public functions.

How a kernel multiplies rotated operands is compared with how it multiplies plain ones elsewhere.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import dialect_kernels
from dialect_kernels import SEMANTIC_32, PackedTensor, ops, quantize, reference
from dialect_kernels.rotation import rotate_activation, rotate_weight
from tests.support import brute_force as brute
from tests.support.format_checks import BLOCK_SIZES, BOOKS, RULES, as_float32, assert_same, data
from tests.support.rotated import ROTATED, assert_bits, hard_rows, overflowing, unrotated

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODULES = [dialect_kernels, reference]
FORMATS = ["dialect", "fp8", "none"]

by_module = pytest.mark.parametrize("module", MODULES, ids=["public", "reference"])
by_book = pytest.mark.parametrize("book", BOOKS.values(), ids=lambda book: book.name)
by_block_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)
by_format = pytest.mark.parametrize("activation_format", FORMATS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def from_numpy(x: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rounded to `dtype` without torch's cast."""
    if dtype == torch.bfloat16:
        return torch.from_numpy(brute.to_bf16(x).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x.astype(np.float16 if dtype == torch.float16 else np.float32))


def test_a_unit_vector_becomes_a_row_of_sylvesters_matrix():
    signs = [[(-1) ** (i & j).bit_count() for j in range(32)] for i in range(32)]
    assert rotate_weight(torch.eye(32)).tolist() == signs
    assert (rotate_activation(torch.eye(32)) * 32).tolist() == signs


@by_dtype
def test_the_butterfly_has_the_brute_forces_bits(dtype):
    x = hard_rows(96).to(dtype)
    assert_bits(rotate_weight(x), from_numpy(brute.butterfly(as_float32(x))))
    assert_bits(rotate_activation(x), from_numpy(brute.rotate_activation(as_float32(x))))


def test_another_order_of_the_sums_has_other_bits():
    x = hard_rows(96)
    other = x.view(-1, 2, 2, 2, 2, 2)
    for dim in (1, 2, 3, 4, 5):  # steps 16, 8, 4, 2, 1
        a, b = other.unbind(dim)
        other = torch.stack([a + b, a - b], dim=dim)
    differ = other.reshape(x.shape) != rotate_weight(x)
    assert 0.1 < differ.float().mean() < 0.9


def test_there_is_a_way_back():
    w = data("outlier_channels", 8, 256, 1)
    back = rotate_activation(rotate_weight(w))
    groups = w.view(8, 8, 32).norm(dim=2, keepdim=True)
    assert ((back - w).view(8, 8, 32).abs() <= 2.0**-21 * groups).all()
    p = quantize(w, block_size=16, rotation=ROTATED)
    lost = (rotate_activation(p.dequantize()) - w).norm() / w.norm()
    assert lost == pytest.approx((p.dequantize() - rotate_weight(w)).norm() / 32**0.5 / w.norm())
    assert rotate_weight(w, "none") is rotate_activation(w, "none") is w


@by_module
@by_block_size
@pytest.mark.parametrize(("book", "rule"), RULES, ids=lambda part: getattr(part, "name", part))
def test_weights_are_the_brute_forces_bytes(book, rule, block_size, module):
    for kind, columns in (("outlier_channels", 64), ("student_t2", 96), ("wide", 32)):
        w = data(kind, 3, columns, block_size)
        p = module.quantize(w, BOOKS[book], block_size, rule, rotation=ROTATED)
        assert p.rotation == ROTATED
        want = brute.quantize(brute.butterfly(as_float32(w)), book, block_size, rule)
        assert_same(p, want)


@by_module
@by_dtype
def test_weights_of_any_type_and_size(dtype, module):
    w = hard_rows(64).to(dtype)
    w = w[(brute.butterfly(as_float32(w)) != np.inf).all(1) & np.isfinite(as_float32(w)).all(1)]
    for window in (13, 2):
        p = module.quantize(w, block_size=16, window=window, rotation=ROTATED)
        want = brute.quantize(brute.butterfly(as_float32(w)), brute.FP4, 16, "mse", window)
        assert_same(p, want)
    for shape in ((0, 64), (3, 0)):
        p = module.quantize(torch.empty(shape, dtype=dtype), rotation=ROTATED)
        assert (p.shape, p.rotation) == (shape, ROTATED)


@by_module
def test_blocks_below_the_window_are_counted_in_the_rotated_matrix(module):
    w = data("wide", 5, 256, 3)
    w[:, 64:96] *= 2.0**-30
    counted = ops.quantize_counted(w, SEMANTIC_32, 16, rotation=ROTATED, finite=True)
    want = reference.blocks_below_window(rotate_weight(w), 16, 7)
    assert want.any()
    assert torch.equal(counted.blocks_below_window, want)
    p = module.quantize(w, SEMANTIC_32, 16, rotation=ROTATED)
    assert torch.equal(counted.packed.meta, p.meta)
    assert counted.packed.rotation == ROTATED


@by_module
def test_weights_that_cannot_be_rotated_are_refused(module):
    with pytest.raises(ValueError, match=r"a\.weight: has 40 columns; .* a multiple of 32"):
        module.quantize(torch.ones(2, 40), block_size=16, rotation=ROTATED, name="a.weight")
    with pytest.raises(ValueError, match="rotation: 'x'; allowed are 'none' and 'hadamard_32'"):
        module.quantize(torch.ones(2, 64), rotation="x")
    w = torch.zeros(3, 64)
    w[1] = overflowing(64)
    with pytest.raises(
        ValueError, match=r"a: row 1 overflows float32 under rotation 'hadamard_32'"
    ):
        module.quantize(w, rotation=ROTATED, name="a")
    w[1] = 2.0**122
    w[1, ::2] *= -1
    assert module.quantize(w, rotation=ROTATED).row_exponent.tolist() == [-120, 125, -120]
    w[1, 5] = float("inf")
    with pytest.raises(ValueError, match=r"inf at \[1, 5\]"):
        module.quantize(w, rotation=ROTATED)


@by_module
@by_format
@by_book
def test_exact_products_are_the_brute_forces_bits(book, activation_format, module):
    brute_book = next(key for key, value in BOOKS.items() if value is book)
    for block_size, dtype in ((16, torch.float32), (32, torch.bfloat16), (64, torch.float16)):
        x = data("outlier_channels", 3, 64, block_size).to(dtype)
        w = brute.quantize(
            brute.butterfly(as_float32(data("gaussian", 5, 64, 7))), brute_book, block_size, "mse"
        )
        p = module.quantize(data("gaussian", 5, 64, 7), book, block_size, rotation=ROTATED)
        turned = brute.rotate_activation(as_float32(x))
        if activation_format == "none":
            y = brute.linear_none(as_float32(from_numpy(turned, dtype)), w)
        else:
            y = brute.linear(turned, w, None, activation_format)
        got = module.dialect_linear(x, p, None, activation_format, "exact")
        assert_bits(got, from_numpy(y, dtype))


@by_module
@by_block_size
@by_book
@by_dtype
def test_activations_are_rounded_after_the_rotation(dtype, book, block_size, module):
    """Every product with a rotated weight is that of rotated activations with the same bytes."""
    x, w = hard_rows(96).to(dtype), data("lognormal_channels", 9, 96, 5)
    p, bias = module.quantize(w, book, block_size, rotation=ROTATED), torch.randn(9)
    turned = rotate_activation(x)
    for activation_format in FORMATS:
        operand = turned.to(dtype) if activation_format == "none" else turned
        want = module.dialect_linear(operand, unrotated(p), bias, activation_format, "exact")
        got = module.dialect_linear(x, p, bias, activation_format, "exact")
        assert_bits(got, want.to(dtype))
    rounded = reference.round_activation(x, book, block_size, rotation=ROTATED)
    assert_bits(rounded, reference.round_activation(turned, book, block_size))
    group = None
    if book is SEMANTIC_32:
        group = torch.arange(len(x)) % 3 - 1
        rounded = reference.round_activation(x, book, block_size, group, ROTATED)
        assert_bits(rounded, reference.round_activation(turned, book, block_size, group))
    salient = torch.tensor([1, -1, len(x) - 1, 4])
    want = module.semantic_linear(turned, unrotated(p), bias, salient, group)
    assert_bits(module.semantic_linear(x, p, bias, salient, group), want.to(dtype))


@by_module
def test_rounded_activations_are_the_brute_forces(module):
    x = data("outlier_channels", 4, 64, 2)
    turned = brute.rotate_activation(as_float32(x))
    want = brute.round_activation(turned, brute.SEM, 32).astype(np.float32)
    got = reference.round_activation(x, SEMANTIC_32, 32, rotation=ROTATED)
    assert_bits(got, torch.from_numpy(want))
    seen = module.quantize(torch.eye(64), SEMANTIC_32)  # a weight whose rotation is the identity
    assert_bits(module.dialect_linear(x, replace(seen, rotation=ROTATED), None), got)
    with pytest.raises(ValueError, match="x: has 40 columns"):
        reference.round_activation(x[:, :40], rotation=ROTATED)


@by_module
@by_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**127])
def test_a_token_that_is_not_finite_is_a_row_of_nan(value, activation_format, module):
    x = torch.ones(3, 96)
    x[1] = value
    p = module.quantize(data("gaussian", 4, 96, 1), block_size=16, rotation=ROTATED)
    y = module.dialect_linear(x, p, None, activation_format)
    assert y[[0, 2]].isfinite().all()
    assert torch.equal(y[0], y[2])
    assert y[1].isnan().all() if activation_format != "none" else not y[1].isfinite().any()
    if activation_format == "dialect":
        salient = torch.tensor([1])
        assert module.semantic_linear(x, p, None, salient)[1].isnan().all()
        assert reference.round_activation(x, rotation=ROTATED)[1].isnan().all()


@by_module
@by_format
def test_default_accumulation_stays_within_its_bound(activation_format, module):
    x = data("outlier_channels", 16, 256, 3).to(torch.bfloat16)
    p = module.quantize(data("gaussian", 32, 256, 4), SEMANTIC_32, rotation=ROTATED)
    exact = reference.dialect_linear(x.float(), p, None, activation_format)
    y = module.dialect_linear(x, p, None, activation_format, "default").float()
    magnitude = rotate_activation(x).abs() @ p.dequantize().abs().T
    assert ((y - exact).abs() <= 2.0**-7 * magnitude).all()
    plain = quantize(data("gaussian", 32, 256, 4), SEMANTIC_32)
    wanted = x.float() @ data("gaussian", 32, 256, 4).T
    rotated_error = (y - wanted).norm()
    assert rotated_error < 0.2 * wanted.norm()  # it computes the same product
    if activation_format == "dialect":  # the channels that stood out hide in their groups
        other = module.dialect_linear(x, plain, None, activation_format).float()
        assert rotated_error < (other - wanted).norm()


def test_slices_and_copies_keep_the_rotation():
    w = data("gaussian", 6, 192, 2)
    for block_size, unit in ((16, 32), (32, 32), (64, 64)):
        p = quantize(w, SEMANTIC_32, block_size, rotation=ROTATED)
        rows = quantize(w[2:5], SEMANTIC_32, block_size, rotation=ROTATED)
        part = p.slice_rows(2, 5)
        assert part.rotation == ROTATED
        assert torch.equal(part.codes, rows.codes)
        part = p.slice_columns(64, 192)
        assert (part.rotation, part.shape) == (ROTATED, (6, 128))
        assert torch.equal(part.dequantize(), p.dequantize()[:, 64:])
        assert p.to("meta").rotation == ROTATED
        for start, stop in ((unit // 2, 128), (0, 64 + unit // 2)):
            with pytest.raises(ValueError, match=f"cuts a .* of {unit}; use multiples of {unit}"):
                p.slice_columns(start, stop)


def test_two_halves_along_the_columns_add_up_to_the_whole():
    """A row-parallel layer on two ranks."""
    x, w = data("gaussian", 3, 128, 1), data("gaussian", 5, 128, 2)
    p = quantize(w, block_size=16, rotation=ROTATED)
    halves = [
        reference.dialect_linear(x[:, part], p.slice_columns(part.start, part.stop), None, "none")
        for part in (slice(0, 64), slice(64, 128))
    ]
    whole = reference.dialect_linear(x, p, None, "none")
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-5, atol=1e-5)


def test_every_constructor_takes_the_rotation():
    p = quantize(torch.randn(5, 64), SEMANTIC_32, 16, rotation=ROTATED)
    bias = torch.zeros(5)
    codes, meta, exponent, _, columns, name, block_size = p.op_arguments(bias)
    for again in (
        PackedTensor.from_stored(p.stored, 64, p.book, 16, ROTATED),
        PackedTensor.from_op(codes, meta, exponent, columns, name, block_size, ROTATED),
        PackedTensor.empty((5, 64), p.book, 16, rotation=ROTATED),
    ):
        assert (again.rotation, again.shape) == (ROTATED, p.shape)
    assert PackedTensor.from_stored(p.stored, 64, p.book, 16).rotation == "none"
    for wrong in ("hadamard", "hadamard_64"):
        with pytest.raises(ValueError, match=f"rotation: {wrong!r}; allowed are"):
            replace(p, rotation=wrong)
    with pytest.raises(ValueError, match="has 48 columns; rotation 'hadamard_32' needs"):
        PackedTensor.empty((5, 48), p.book, 16, rotation=ROTATED)
    assert repr(p) == "PackedTensor(5 x 64, semantic_32, blocks of 16, hadamard_32, " + (
        f"{p.bits_per_element:.3f} bits per element, cpu)"
    )


def test_a_rotated_tensor_is_saved_as_version_2_and_only_that_one(tmp_path):
    w = torch.randn(5, 64)
    for rotation, version in (("none", "1"), (ROTATED, "2")):
        p = quantize(w, SEMANTIC_32, 16, rotation=rotation)
        p.save(tmp_path / "f")
        again = PackedTensor.load(tmp_path / "f")
        assert again.rotation == rotation
        assert all(torch.equal(a, b) for a, b in zip(again.tensors, p.tensors, strict=True))
        with safe_open(tmp_path / "f", framework="pt") as file:
            metadata = file.metadata()
        assert metadata["format_version"] == version
        assert metadata.get("rotation", "none") == rotation
        assert ("rotation" in metadata) == (version == "2")


def test_the_ops_take_the_rotation_last_and_can_be_traced():
    x, p = torch.randn(3, 64), quantize(torch.randn(6, 64), SEMANTIC_32, 16, rotation=ROTATED)
    bias = torch.randn(6)
    linear = (x, *p.op_arguments(bias), "dialect", "exact")
    semantic = (x, *p.op_arguments(bias), torch.tensor([1]), None)
    assert torch.equal(ops.linear(*linear, ROTATED), ops.dialect_linear(x, p, bias, "dialect"))
    plain = ops.dialect_linear(x, unrotated(p), bias, "dialect", "exact")
    assert torch.equal(ops.linear(*linear), plain)
    assert not torch.equal(ops.linear(*linear, ROTATED), plain)
    want = ops.semantic_linear(x, p, bias, torch.tensor([1]))
    assert torch.equal(ops.semantic_op(*semantic, rotation=ROTATED), want)
    for op, arguments in ((ops.linear, linear), (ops.semantic_op, semantic)):
        torch.library.opcheck(
            op, (*arguments, ROTATED), test_utils=("test_schema", "test_faketensor")
        )
