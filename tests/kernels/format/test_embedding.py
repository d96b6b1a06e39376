"""Rows of a packed embedding matrix: the bits of the decoded matrix's rows, rounded once."""

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, cpu, dialect_embedding, ops, quantize
from dialect_kernels.formatbook import BLOCK_SIZES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(2 * torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) * spread


def by_hand(p, row: int, dtype: torch.dtype) -> torch.Tensor:
    """A row as docs/reference/format.md defines its values, in Python's floats."""
    values = []
    for column in range(p.shape[1]):
        byte = int(p.codes[row, column // 2])
        code = byte >> 4 if column % 2 else byte & 15
        meta = int(p.meta[row, column // p.block_size])
        delta, id_ = meta >> p.book.id_bits, meta & ((1 << p.book.id_bits) - 1)
        half_units = p.book.half_units[id_][code & 7] * (-1 if code & 8 else 1)
        values.append(half_units * 2.0 ** (int(p.row_exponent[row]) - delta - 1))
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@pytest.fixture(params=["the machine's back end", "torch"])
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu, "available", lambda: False)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda b: b.name)
def test_values_by_their_definition(book, dtype):
    for block_size, columns in zip(BLOCK_SIZES, (32, 40, 129), strict=True):
        p = quantize(matrix(7, columns), book, block_size)
        rows = dialect_embedding(torch.tensor([6, 0, 6]), p, dtype)
        assert rows.dtype == dtype
        for place, row in enumerate((6, 0, 6)):
            assert torch.equal(rows[place], by_hand(p, row, dtype))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 4)])
def test_ids_of_any_shape(shape):
    p = quantize(matrix(50, 64))
    ids = torch.randint(0, 50, shape)
    whole = p.dequantize(torch.bfloat16)
    for given in (ids, ids.to(torch.int32)):
        assert torch.equal(dialect_embedding(given, p, torch.bfloat16), whole[ids])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("wrong", [-1, 50, 2**40])
def test_an_id_that_is_no_row(wrong):
    p = quantize(matrix(50, 64))
    with pytest.raises((IndexError, RuntimeError)):
        dialect_embedding(torch.tensor([3, wrong]), p)


def test_nothing_is_decoded_of_an_empty_matrix():
    none = torch.empty(0, dtype=torch.int64)
    assert dialect_embedding(none, quantize(torch.empty(0, 64))).shape == (0, 64)
    assert dialect_embedding(torch.tensor([1]), quantize(torch.empty(3, 0))).shape == (1, 0)


def test_what_is_refused():
    p = quantize(matrix(4, 64))
    for ids, dtype, sentence in (
        (torch.zeros(2), torch.float32, "ids: has dtype torch.float32; it must be an integer"),
        (torch.tensor([True]), torch.float32, "ids: has dtype torch.bool"),
        (torch.tensor([1]), torch.float64, "dtype: torch.float64; allowed are float32, bfloat16"),
        (torch.tensor([1], device="meta"), torch.float32, "ids: is on meta, the packed tensor on"),
    ):
        with pytest.raises(ValueError, match=sentence):
            dialect_embedding(ids, p, dtype)
    rotated = quantize(matrix(4, 64), rotation="hadamard_32")
    with pytest.raises(ValueError, match="p: has the rotation hadamard_32; an embedding matrix"):
        dialect_embedding(torch.tensor([1]), rotated)


def test_the_op_is_traced():
    p = quantize(matrix(50, 64))

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return ops.embedding(ids, *p.tensors, 64, p.book.name, p.block_size, torch.bfloat16) * 2

    ids = torch.tensor([4, 49, 0])
    compiled = torch.compile(embed, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(ids), p.dequantize(torch.bfloat16)[ids] * 2)
