"""Embeddings in Triton's interpreter, every bit against the packed tensor's rows."""

import os

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedTensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from dialect_kernels.gpu.rows import gather


def packed(rows, columns, book, block_size):
    """Any bytes there can be, and a row that is no number."""
    generator = torch.Generator().manual_seed(columns)
    padded = -(-columns // block_size) * block_size

    def bytes_(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    codes, meta = bytes_(rows, padded // 2), bytes_(rows, padded // block_size)
    exponent = torch.randint(-100, 100, (rows,), generator=generator).to(torch.int8)
    exponent[1] = -128
    return PackedTensor(codes, meta, exponent, (rows, columns), book, block_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("book", "block_size", "columns"),
    [(DIALECT_FP4, 16, 40), (SEMANTIC_32, 32, 300), (DIALECT_FP4, 64, 64)],
)
def test_rows_of_any_bytes(book, block_size, columns, dtype):
    p = packed(30, columns, book, block_size)
    want = p.dequantize(dtype)
    for ids in ([4], [29, 0, 1, 0, 7, 7, 2, 28, 5], []):
        ids = torch.tensor(ids, dtype=torch.int64)
        got = gather(ids, p, dtype)
        assert got.dtype == dtype
        assert torch.equal(got.isnan(), want[ids].isnan())
        assert torch.equal(got.nan_to_num(7.0), want[ids].nan_to_num(7.0))


def test_ids_that_are_no_rows_are_nan():
    p = packed(6, 64, DIALECT_FP4, 32)
    got = gather(torch.tensor([2, -1, 6, 2**40, 3]), p, torch.bfloat16)
    assert got.isnan().all(dim=1).tolist() == [False, True, True, True, False]
    assert torch.equal(got[[0, 4]], p.dequantize(torch.bfloat16)[[2, 3]])
    assert gather(torch.tensor([0]), p.slice_rows(0, 0), torch.bfloat16).isnan().all()
