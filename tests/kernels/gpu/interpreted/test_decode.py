"""The decoding of packed weights in Triton's interpreter, every byte against the packed tensor."""

import os

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedTensor
from dialect_kernels.formatbook import BLOCK_SIZES
from tests.support.quantizer_cases import operand_order

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from dialect_kernels.gpu.decode import decode_bf16, decode_e4m3

all_books = pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda b: b.name)
all_blocks = pytest.mark.parametrize("block_size", BLOCK_SIZES)


def packed(rows, columns, book, block_size, seed=0):
    """Any bytes there can be: every code, every meta byte (reserved deltas too)."""
    generator = torch.Generator().manual_seed(seed)
    padded = -(-columns // block_size) * block_size

    def bytes_(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    codes, meta = bytes_(rows, padded // 2), bytes_(rows, padded // block_size)
    exponent = torch.randint(-100, 100, (rows,), generator=generator).to(torch.int8)
    return PackedTensor(codes, meta, exponent, (rows, columns), book, block_size)


@all_books
@all_blocks
def test_every_meta_byte_with_every_code(block_size, book):
    meta = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = torch.arange(256, dtype=torch.uint8).roll(7).view(-1, block_size // 2)
    codes = codes[torch.arange(256) % len(codes)]
    extra = packed(256, 512, book, block_size)
    p = PackedTensor(
        torch.cat([codes, extra.codes], dim=1),
        torch.cat([meta, extra.meta], dim=1),
        extra.row_exponent,
        (256, 512 + block_size),
        book,
        block_size,
    )
    want, want_scale = p.to_e4m3()
    got, scale = decode_e4m3(p)
    assert torch.equal(got.view(torch.uint8), operand_order(want.view(torch.uint8)))
    assert torch.equal(scale, want_scale)
    bf16 = decode_bf16(p)[:256, : p.shape[1]].contiguous()
    want = p.dequantize(torch.bfloat16)
    assert torch.equal(bf16.view(torch.int16), want.view(torch.int16))


@all_blocks
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (33, 64), (5, 257), (64, 700)])
def test_edges(shape, block_size):
    p = packed(*shape, SEMANTIC_32, block_size, seed=1)
    rows = shape[0]
    padded = p.codes.shape[1] * 2
    got, scale = decode_e4m3(p)
    whole = PackedTensor(p.codes, p.meta, p.row_exponent, (rows, padded), p.book, block_size)
    want, want_scale = whole.to_e4m3()
    assert got.shape == (-(-rows // 32) * 32, padded)
    assert torch.equal(got[:rows].view(torch.uint8), operand_order(want.view(torch.uint8)))
    assert torch.equal(scale[:rows], want_scale)
    assert got.float().isfinite().all(), "rows beyond the last are written too"
    bf16 = decode_bf16(p)
    assert bf16.shape == (-(-rows // 32) * 32, padded)
    assert torch.equal(bf16[:rows, : shape[1]], p.dequantize(torch.bfloat16))


def test_nothing_to_decode():
    for shape in ((0, 64), (3, 0)):
        p = packed(*shape, DIALECT_FP4, 32)
        got, scale = decode_e4m3(p)
        assert got.shape[1] == shape[1]
        assert torch.equal(scale[: shape[0]], p.row_scale())
        assert decode_bf16(p).shape[1] == shape[1]


def test_a_row_of_nan_has_nan_as_its_scale():
    p = packed(2, 32, DIALECT_FP4, 32)
    p.row_exponent[1] = -128
    _, scale = decode_e4m3(p)
    assert scale[:2].isnan().tolist() == [False, True]
    assert decode_bf16(p)[:2].isnan().all(dim=1).tolist() == [False, True]
