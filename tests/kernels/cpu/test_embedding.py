"""Embeddings in C++: the bits of the packed tensor's rows, whatever bytes and thread count."""

from itertools import product

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedTensor, cpu
from dialect_kernels.cpu import calls

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=f"no CPU kernel: {cpu.why_not()}"),
    pytest.mark.usefixtures("poisoned_outputs"),
]

DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def any_bytes(rows: int, columns: int, book, block_size: int) -> PackedTensor:
    """Reserved deltas, code 8, any row exponent, and a row that is no number."""
    generator = torch.Generator().manual_seed(rows + columns)

    def bytes_(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    blocks = -(-columns // block_size)
    row_exponent = bytes_(rows).view(torch.int8)
    row_exponent[: rows // 2].clamp_(-20, 8)
    row_exponent[-1] = -128
    codes, meta = bytes_(rows, blocks * block_size // 2), bytes_(rows, blocks)
    return PackedTensor(codes, meta, row_exponent, (rows, columns), book, block_size)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda book: book.name)
def test_every_byte_on_any_number_of_threads(book, block_size):
    for columns, dtype in product([0, 1, 33, 192], DTYPES):
        p = any_bytes(60, columns, book, block_size)
        want = p.dequantize(dtype)
        for count, threads in product([0, 1, 2, 17, 200], [1, 2, 5]):
            ids = torch.randint(0, 60, (count,))
            got = calls.embedding(ids, p, dtype, threads=threads)
            assert got.dtype == dtype
            nan = want[ids].isnan()
            assert torch.equal(got.isnan(), nan)
            bits = [torch.where(nan, 0.0, y).view(DTYPES[dtype]) for y in (got, want[ids])]
            assert torch.equal(*bits)


def test_ids_are_checked_before_memory_is_read():
    p = any_bytes(10, 64, DIALECT_FP4, 32)
    for wrong in (-1, 10, 2**62, -(2**63)):
        with pytest.raises(IndexError, match=r"ids: hold .*; allowed are 0\.\.9"):
            calls.embedding(torch.tensor([wrong, 3]), p, torch.bfloat16)
    with pytest.raises(IndexError):
        calls.embedding(torch.tensor([0]), any_bytes(1, 64, DIALECT_FP4, 32).slice_rows(0, 0),
                        torch.bfloat16)  # fmt: skip
    for ids in (torch.tensor([1], dtype=torch.int32), torch.tensor([[1]]), torch.tensor(1)):
        with pytest.raises(ValueError, match=r"ids: .*; it must be torch.int64 \[T\] on cpu"):
            calls.embedding(ids, p, torch.bfloat16)
