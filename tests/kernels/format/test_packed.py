"""The packed tensor: every stored byte decoded, FP8 equality, slices, and what a file may hold."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedTensor, quantize
from dialect_kernels.formatbook import NAN_ROW
from dialect_kernels.packed import STORED_FIELDS
from tests.support import brute_force as brute
from tests.support.format_checks import (
    BLOCK_SIZES,
    BOOKS,
    RULES,
    as_float32,
    assert_same,
    data,
    to_packed,
)

by_book = pytest.mark.parametrize("book", brute.BOOKS, ids=lambda book: book.name)


def every_byte(book: brute.Book, row_exponent: int) -> brute.Packed:
    """One row with a block for each of the 256 meta bytes, whose 16 elements are the 16 codes."""
    codes = np.array([low | (low + 1) << 4 for low in range(0, 16, 2)], np.uint8)
    meta = np.arange(256, dtype=np.uint8)
    return brute.decode(
        np.tile(codes, 256)[None], meta[None], np.array([row_exponent], np.int8),
        (1, 256 * 16), book, 16,
    )  # fmt: skip


@by_book
@pytest.mark.parametrize("row_exponent", [-120, -119, -7, 0, 5, 124, 125])
def test_every_code_id_and_delta_decodes_to_its_value(row_exponent, book):
    expected = every_byte(book, row_exponent)
    p = to_packed(expected)
    values = p.dequantize(torch.float32)
    assert np.array_equal(values.numpy().astype(np.float64), expected.values())
    # bfloat16 holds four bits down to 2**-133; rounding to it must not happen twice
    exact = torch.from_numpy(expected.values())
    assert torch.equal(p.dequantize(torch.bfloat16), exact.to(torch.float32).to(torch.bfloat16))
    assert torch.equal(p.dequantize(torch.float16), exact.to(torch.float16))


@by_book
@pytest.mark.parametrize("row_exponent", [-120, 0, 125])
def test_every_code_id_and_delta_is_exactly_an_fp8_number(row_exponent, book):
    expected = every_byte(book, row_exponent)
    e4m3, scale = to_packed(expected).to_e4m3()
    assert e4m3.dtype == torch.float8_e4m3fn
    assert scale.tolist() == [2.0 ** (row_exponent - 5)]
    by_byte = [float(value) for value in brute.E4M3]
    for position, byte in enumerate(e4m3.view(torch.uint8)[0].tolist()):
        value = by_byte[byte & 127] * (-1 if byte >> 7 else 1)
        delta = int(expected.deltas[0, position // 16])
        assert value == int(expected.halves[0, position]) * 2.0 ** (4 - delta)
    product = e4m3.to(torch.float32) * scale[:, None]
    assert torch.equal(product, to_packed(expected).dequantize(torch.float32))


@by_book
def test_codes_of_quantized_tensors_as_fp8(book):
    for block_size in BLOCK_SIZES:
        p = quantize(data("wide", 5, 150, seed=1), BOOKS[book], block_size)
        e4m3, scale = p.to_e4m3()
        assert e4m3.shape == (5, 150)
        assert e4m3.is_contiguous()
        assert torch.equal(e4m3.to(torch.float32) * scale[:, None], p.dequantize(torch.float32))


@by_book
def test_reserved_deltas_read_as_13(book):
    p = to_packed(every_byte(book, 0))
    by_meta = p.dequantize(torch.float32).view(256, 16)
    if book.id_bits == 4:
        for dialect in range(16):
            for reserved in (14, 15):
                assert torch.equal(by_meta[reserved << 4 | dialect], by_meta[13 << 4 | dialect])
    e4m3, _ = p.to_e4m3()
    assert e4m3.to(torch.float32).isfinite().all()


@by_book
def test_code_8_reads_as_minus_zero(book):
    p = to_packed(every_byte(book, 3))
    for values in (p.dequantize(torch.float32), p.to_e4m3()[0].to(torch.float32)):
        zeros = values.view(256, 16)[:, [0, 8]]
        assert (zeros == 0).all()
        assert not zeros[:, 0].signbit().any()
        assert zeros[:, 1].signbit().all()


def test_a_nan_row_is_all_nan_and_leaves_the_others_alone():
    p = quantize(torch.ones(3, 32))
    marked = PackedTensor(
        p.codes, p.meta, torch.tensor([-2, NAN_ROW, -2], dtype=torch.int8), p.shape, p.book, 32
    )
    for values in (marked.dequantize(), marked.to_e4m3()[0].float() * marked.to_e4m3()[1][:, None]):
        assert values[1].isnan().all()
        assert torch.equal(values[[0, 2]], torch.ones(2, 32))


@pytest.mark.parametrize(
    ("book", "rule"), RULES, ids=[f"{book.name}-{rule}" for book, rule in RULES]
)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_slice_of_rows_is_the_quantized_slice_byte_for_byte(block_size, book, rule):
    x = data("lognormal_channels", 9, 192, seed=3)
    p = quantize(x, BOOKS[book], block_size, rule)
    for start, stop in ((0, 9), (2, 5), (8, 9), (4, 4)):
        part = p.slice_rows(start, stop)
        assert_same(part, brute.quantize(as_float32(x[start:stop]), book, block_size, rule))


@pytest.mark.parametrize(
    ("book", "rule"), RULES, ids=[f"{book.name}-{rule}" for book, rule in RULES]
)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_slice_of_columns_keeps_the_row_exponent_and_the_values(block_size, book, rule):
    # a ramp, so that the last columns' own row exponent is lower than the row's
    x = data("gaussian", 4, 256, seed=5) * torch.exp2(-torch.arange(256) / 50)
    p = quantize(x, BOOKS[book], block_size, rule)
    whole = p.dequantize()
    for start, stop in ((0, 256), (64, 192), (192, 256), (128, 128)):
        part = p.slice_columns(start, stop)
        assert part.shape == (4, stop - start)
        assert torch.equal(part.row_exponent, p.row_exponent)
        assert torch.equal(part.dequantize(), whole[:, start:stop])
        own = brute.quantize(as_float32(x[:, start:stop]), book, block_size, rule)
        assert np.array_equal(part.dequantize().numpy().astype(np.float64), own.values())
    assert p.slice_columns(192, 256).row_exponent[0] > brute.quantize(
        as_float32(x[:, 192:]), book, block_size, rule
    ).row_exponent[0]  # fmt: skip


def test_a_slice_of_columns_with_clamped_blocks_is_valid_though_not_canonical():
    x = torch.ones(1, 64)
    x[0, 32:] = 2.0**-14 * torch.linspace(0.5, 1.9, 32)
    p = quantize(x)
    assert int(p.meta[0, 1]) >> 4 == 13
    part = p.slice_columns(32, 64)
    assert torch.equal(part.dequantize(), p.dequantize()[:, 32:])
    assert not torch.equal(part.dequantize(), quantize(x[:, 32:]).dequantize())


def test_the_last_slice_may_end_inside_the_padding():
    x = data("gaussian", 2, 70, seed=6)
    p = quantize(x)
    part = p.slice_columns(32, 70)
    assert part.shape == (2, 38)
    assert torch.equal(part.dequantize(), p.dequantize()[:, 32:])


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda p: p.slice_rows(-1, 2), r"slice_rows: -1\.\.2 is not inside 0\.\.4"),
        (lambda p: p.slice_rows(3, 2), r"slice_rows: 3\.\.2"),
        (lambda p: p.slice_rows(0, 5), r"slice_rows: 0\.\.5"),
        (lambda p: p.slice_columns(0, 97), r"slice_columns: 0\.\.97 is not inside 0\.\.96"),
        (lambda p: p.slice_columns(16, 64), r"slice_columns: 16\.\.64 cuts a block of 32"),
        (lambda p: p.slice_columns(32, 80), r"slice_columns: 32\.\.80 cuts a block of 32"),
    ],
)
def test_slices_outside_the_tensor_or_through_a_block_are_refused(cut, message):
    with pytest.raises(ValueError, match=message):
        cut(quantize(torch.ones(4, 96)))


@pytest.mark.parametrize(("block_size", "bits"), [(16, 4.5), (32, 4.25), (64, 4.125)])
def test_size_in_bytes_and_bits(block_size, bits):
    p = quantize(torch.ones(8, 1024), block_size=block_size)
    assert p.bits_per_element == bits + 8 / 1024
    assert p.nbytes == 8 * (512 + 1024 // block_size + 1)


def test_layout_of_the_fields():
    p = quantize(torch.ones(3, 40), SEMANTIC_32, 16)
    assert (p.codes.dtype, p.codes.shape) == (torch.uint8, (3, 24))
    assert (p.meta.dtype, p.meta.shape) == (torch.uint8, (3, 3))
    assert (p.row_exponent.dtype, p.row_exponent.shape) == (torch.int8, (3,))
    assert all(t.is_contiguous() for t in (p.codes, p.meta, p.row_exponent))
    assert p.shape == (3, 40)


def fields(**changes):
    p = quantize(torch.ones(4, 64))
    return {
        "codes": p.codes, "meta": p.meta, "row_exponent": p.row_exponent,
        "shape": p.shape, "book": DIALECT_FP4, "block_size": 32, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(4, 31, dtype=torch.uint8)}, r"codes: .*\[4, 31\].*\[4, 32\]"),
        ({"codes": torch.zeros(4, 32, dtype=torch.int8)}, "codes: torch.int8 .*torch.uint8"),
        ({"meta": torch.zeros(4, 4, dtype=torch.uint8)}, r"meta: .*\[4, 4\].*\[4, 2\]"),
        ({"row_exponent": torch.zeros(5, dtype=torch.int8)}, r"row_exponent: .*\[5\].*\[4\]"),
        ({"row_exponent": torch.zeros(4, dtype=torch.int32)}, "row_exponent: torch.int32"),
        ({"block_size": 24}, "block_size: 24; allowed are 16, 32 and 64"),
        ({"shape": (4, 128)}, r"codes: .*4 x 128.*\[4, 64\]"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PackedTensor(**fields(**changes))


def test_contents_a_file_may_not_hold_are_named_with_their_position():
    good = quantize(data("gaussian", 4, 64, seed=0))
    good.validate("layer.weight")
    for delta in (14, 15):
        meta = good.meta.clone()
        meta[2, 1] = delta << 4 | 3
        bad = PackedTensor(**fields(meta=meta))
        with pytest.raises(ValueError, match=rf"layer\.weight\.meta: .*\[2, 1\].*delta {delta}"):
            bad.validate("layer.weight")
    for exponent in (-128, -127, -121, 126, 127):
        row_exponent = good.row_exponent.clone()
        row_exponent[3] = exponent
        bad = PackedTensor(**fields(row_exponent=row_exponent))
        with pytest.raises(ValueError, match=rf"layer\.weight\.row_exponent: {exponent} at \[3\]"):
            bad.validate("layer.weight")


def test_it_is_immutable_and_moves_between_devices():
    p = quantize(torch.ones(2, 32))
    with pytest.raises(AttributeError):
        p.codes = p.meta
    assert p.to("cpu") is p
    assert p.device == torch.device("cpu")


def test_one_table_names_the_stored_tensors():
    assert [(part.name, part.stored, part.dtype) for part in STORED_FIELDS] == [
        ("codes", "weight_packed", torch.uint8),
        ("meta", "weight_meta", torch.uint8),
        ("row_exponent", "weight_row_exponent", torch.int8),
    ]
    assert [part.shape(3, 33, 16) for part in STORED_FIELDS] == [(3, 24), (3, 3), (3,)]


@pytest.mark.parametrize("book", BOOKS.values(), ids=lambda book: book.name)
def test_a_packed_tensor_comes_back_from_its_stored_tensors_and_from_an_op(book):
    p = quantize(torch.randn(5, 40), book, 16)
    assert list(p.stored) == [part.stored for part in STORED_FIELDS]
    bias = torch.zeros(5)
    codes, meta, row_exponent, passed, columns, name, block_size = p.op_arguments(bias)
    assert passed is bias
    for again in (
        PackedTensor.from_stored(p.stored, 40, book, 16),
        PackedTensor.from_op(codes, meta, row_exponent, columns, name, block_size),
    ):
        assert (again.shape, again.book, again.block_size) == (p.shape, book, 16)
        assert all(a is b for a, b in zip(again.tensors, p.tensors, strict=True))


def test_an_empty_tensor_can_lie_on_the_meta_device():
    p = PackedTensor.empty((5, 40), DIALECT_FP4, 16, "meta")
    assert p.device.type == "meta"
    assert p.nbytes == 5 * (24 + 3 + 1)
    with pytest.raises(ValueError, match="block_size: 8"):
        PackedTensor.empty((5, 40), DIALECT_FP4, 8)


def test_a_missing_stored_tensor_is_an_error():
    p = quantize(torch.randn(2, 16), DIALECT_FP4, 16)
    with pytest.raises(KeyError, match="weight_meta"):
        PackedTensor.from_stored({"weight_packed": p.codes}, 16, DIALECT_FP4, 16)


@pytest.mark.parametrize("book", BOOKS.values(), ids=lambda book: book.name)
@pytest.mark.parametrize("of_path", [str, Path])
def test_a_saved_tensor_is_loaded_as_it_was(tmp_path, book, of_path):
    p = quantize(torch.randn(5, 40), book, 16)
    file = tmp_path / "weight.safetensors"
    for saved in (p, p.slice_rows(1, 3), p.slice_rows(0, 0)):
        saved.save(of_path(file))
        again = PackedTensor.load(of_path(file))
        assert (again.shape, again.book, again.block_size) == (saved.shape, book, 16)
        assert all(torch.equal(a, b) for a, b in zip(again.tensors, saved.tensors, strict=True))
    again.save(file)  # over the file whose bytes it maps
    assert list(tmp_path.iterdir()) == [file]


def test_the_stored_file_has_the_names_of_checkpoints(tmp_path):
    p = quantize(torch.randn(5, 40), DIALECT_FP4, 16)
    p.save(tmp_path / "f")
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == {
            "format": "pt", "format_version": "1", "shape": "[5, 40]",
            "book": "dialect_fp4", "block_size": "16",
        }  # fmt: skip
        assert sorted(file.keys()) == sorted(p.stored)


def damaged(path, drop=None, **changes):
    """A saved tensor of 5 x 40 with other tensors or metadata; None removes a key."""
    p = quantize(torch.randn(5, 40), DIALECT_FP4, 16)
    metadata = {
        "format_version": "1", "shape": "[5, 40]", "book": "dialect_fp4", "block_size": "16",
    }  # fmt: skip
    tensors = {name: tensor.clone() for name, tensor in p.stored.items() if name != drop}
    for name, value in changes.items():
        (tensors if isinstance(value, torch.Tensor) else metadata)[name] = value
    save_file(tensors, path, {k: v for k, v in metadata.items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shape": None}, "shape is missing; it must be [rows, columns]"),
        ({"shape": "[5]"}, "shape is '[5]'"),
        ({"shape": "[5, -1]"}, "shape is '[5, -1]'"),
        ({"shape": "[5, true]"}, "shape is '[5, true]'"),
        ({"shape": "5 x 40"}, "shape is '5 x 40'"),
        ({"shape": "[" * 100_000}, "shape is"),
        ({"shape": "[5, 64]"}, "does not fit a 5 x 64 tensor"),
        ({"shape": f"[5, {10**30}]"}, "does not fit a 5 x 1"),
        ({"book": "x"}, "book is 'x'; it must be dialect_fp4 or semantic_32"),
        ({"book": None}, "book is missing"),
        ({"block_size": "48"}, "block_size is '48'; it must be 16, 32 or 64"),
        ({"block_size": "16.0"}, "block_size is '16.0'"),
        ({"block_size": "32"}, "does not fit a 5 x 40 tensor in blocks of 32"),
        ({"format_version": "3"}, "format_version is '3'; it must be 1 or 2"),
        ({"format_version": "true"}, "format_version is 'true'"),
        ({"rotation": "hadamard_32"}, "rotation is 'hadamard_32'; it must be absent"),
        ({"rotation": "x", "format_version": "2"}, "rotation is 'x'; it must be none or hadamard"),
        ({"rotation": "hadamard_32", "format_version": "2"}, "tensor: has 40 columns; rotation"),
        ({"format_version": None}, "format_version is missing"),
        ({"drop": "weight_meta"}, "they must be ['weight_meta', 'weight_packed'"),
        ({"bias": torch.zeros(5)}, "holds the tensors ['bias'"),
        ({"weight_row_exponent": torch.full((5,), -128, dtype=torch.int8)}, "-128 at [0]"),
        ({"weight_meta": torch.full((5, 3), 0xE0, dtype=torch.uint8)}, "reserved delta 14"),
    ],
)
def test_a_file_that_is_no_packed_tensor_is_refused_in_one_sentence(tmp_path, changes, sentence):
    file = tmp_path / "f.safetensors"
    damaged(file, **changes)
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        PackedTensor.load(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path):
    file = tmp_path / "f"
    with pytest.raises(FileNotFoundError, match="is not a file; give one that"):
        PackedTensor.load(file)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        PackedTensor.load(file)
    p = quantize(torch.ones(2, 32))
    nan = torch.tensor([-2, NAN_ROW], dtype=torch.int8)
    with pytest.raises(ValueError, match="row 1 is NaN; a file holds finite rows only"):
        PackedTensor(p.codes, p.meta, nan, p.shape, p.book, 32).save(file)
    assert file.read_bytes() == b"nothing"
    with pytest.raises(OSError, match="no"):
        p.save(tmp_path / "no" / "f")
    assert list(tmp_path.iterdir()) == [file]


def test_it_is_shown_in_one_short_line():
    p = quantize(torch.ones(576, 1536), SEMANTIC_32, 16)
    shown = "576 x 1536, semantic_32, blocks of 16, 4.505 bits per element, cpu"
    assert repr(p) == f"PackedTensor({shown})"
