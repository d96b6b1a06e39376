"""The decoder's inline PTX, executed in numpy: equal to the formatbook for all there can be.

The instructions are those of the kernels, read from their text.
"""

import numpy as np
import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32
from dialect_kernels.gpu import decode
from tests.support.ptx import execute

all_books = pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda b: b.name)


def words():
    """Every pair of neighbouring codes at every place of a word, beside random codes, [n, 8]."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 16, (7 * 256 + 64, 8))
    for place in range(7):
        pairs = codes[place * 256 : (place + 1) * 256]
        pairs[:, place] = np.arange(256) & 15
        pairs[:, place + 1] = np.arange(256) >> 4
    return codes


def meaning(book, codes):
    """E4M3 bytes of the codes for each meta byte by the book's table, uint8 [256, n, 8]."""
    ids = (1 << book.id_bits) - 1
    table = [book.e4m3_lut[min(meta >> book.id_bits, 13)][meta & ids] for meta in range(256)]
    return np.array(table, dtype=np.uint8)[:, codes]


def bytes_of(word):
    return np.stack([(word >> np.uint64(8 * i)) & np.uint64(0xFF) for i in range(4)], axis=-1)


def operands_of(asm_inputs, copies, start):
    """Operand numbers as Triton gives them: every input once for each word it is spread over."""
    numbered = {}
    for value in asm_inputs:
        for _ in range(copies):
            numbered[start] = value
            start += 1
    return numbered


def table_words(table, shape):
    columns = table.view(256, -1).numpy().view(np.uint32).astype(np.uint64).T
    return [np.broadcast_to(column[:, None], shape) for column in columns]


@all_books
def test_e4m3(book):
    codes = words()
    word = (codes.astype(np.uint64) << (4 * np.arange(8)).astype(np.uint64)).sum(axis=1)
    shape = (256, len(codes))
    table = table_words(decode.e4m3_table(book, torch.device("cpu")), shape)
    operands = {2: np.broadcast_to(word, shape)} | operands_of(table, 4, 3)
    assert decode._E4M3_CONSTRAINTS.value.count("r") == 2 + len(operands)
    first, last = execute(decode._E4M3_ASM.value, operands, 2)
    got = np.concatenate([bytes_of(first), bytes_of(last)], axis=-1)
    assert np.array_equal(got, meaning(book, codes))


@all_books
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype, book):
    codes = words()
    word = (codes.astype(np.uint64) << (4 * np.arange(8)).astype(np.uint64)).sum(axis=1)
    shape = (256, len(codes))
    table = table_words(decode.sixteen_table(book, dtype, torch.device("cpu")), shape)
    operands = {4: np.broadcast_to(word, shape)} | operands_of(table, 2, 5)
    assert decode._SIXTEEN_CONSTRAINTS.value.count("r") == 4 + len(operands)
    parts = execute(decode._SIXTEEN_ASM.value, operands, 4)
    got = np.stack(parts, axis=-1).astype(np.uint32).view(np.uint16)  # low half first
    e4m3 = torch.from_numpy(meaning(book, codes)).view(torch.float8_e4m3fn)
    want = e4m3.to(torch.float32).to(dtype).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(got, want)


@pytest.mark.parametrize(("name", "limit"), [("_E4M3_ASM", 9), ("_SIXTEEN_ASM", 15)])
def test_instructions_for_eight_weights(name, limit):
    text = getattr(decode, name).value
    assert text.count(";") - 1 == limit, "the declaration of registers is no instruction"
