"""What rounding loses: float64 sums, the same bits on every processor."""

import math
from itertools import product

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, cpu, ops, reference
from dialect_kernels.cpu import calls

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=f"no CPU kernel: {cpu.why_not()}"),
    pytest.mark.usefixtures("poisoned_outputs"),
]

INSTRUCTIONS = (
    cpu.INSTRUCTIONS[: cpu.INSTRUCTIONS.index(cpu.features()) + 1] if cpu.available() else ()
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Gaussian with log-normal channels: several deltas in every row."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp(1.5 * torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) * channels


def energies(x: torch.Tensor, values: torch.Tensor) -> list[list[float]]:
    """Exact sums of exact numbers, rounded once."""
    both = zip(x.double().tolist(), values.double().tolist(), strict=True)
    return [
        [
            math.fsum(a * a for a in row),
            math.fsum((a - b) ** 2 for a, b in zip(row, rounded, strict=True)),
        ]
        for row, rounded in both
    ]


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda book: book.name)
def test_sums_of_squares_by_their_definition(book, block_size):
    """Any number of columns, so that the last block is padded; the padding does not count."""
    for seed, (columns, dtype) in enumerate(product([1, 31, 64, 200], DTYPES)):
        x = matrix(9, columns, seed).to(dtype)
        p = reference.quantize(x, book, block_size)
        expected = torch.tensor(energies(x, p.dequantize()), dtype=torch.float64)
        first = calls.rounding_loss(x, p, threads=1)
        assert torch.allclose(first, expected, rtol=1e-13, atol=0)
        assert torch.allclose(reference.rounding_loss(x, p), expected, rtol=1e-13, atol=0)
        for instructions, threads in product(INSTRUCTIONS, [1, 2, 3]):
            again = calls.rounding_loss(x, p, threads=threads, instructions=instructions)
            assert torch.equal(again, first), (instructions, threads)


def test_squares_beyond_float32():
    x = torch.tensor([[3e38] * 32, [1e-30] * 32])
    p = reference.quantize(x)
    expected = torch.tensor(energies(x, p.dequantize()), dtype=torch.float64)
    assert torch.allclose(ops.rounding_loss(x, p), expected, rtol=1e-13, atol=0)
    assert expected.isfinite().all()
    assert (expected[:, 0] > 0).all()


def test_a_rotated_matrix_has_the_energies_of_the_matrix():
    x = matrix(8, 96, seed=1)
    p = ops.quantize(x, rotation="hadamard_32")
    found = ops.rounding_loss(x, p)
    values = reference.rotate_activation(p.dequantize())  # the way back
    expected = torch.tensor(energies(x, values), dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-4, atol=0)  # rotations are rounded to float32
    assert torch.allclose(found, reference.rounding_loss(x, p), rtol=1e-13, atol=0)


def test_nothing_to_measure_and_a_row_that_is_no_number():
    for shape in ((0, 64), (3, 0)):
        empty = torch.zeros(shape)
        found = ops.rounding_loss(empty, ops.quantize(empty))
        assert torch.equal(found, torch.zeros(shape[0], 2, dtype=torch.float64))
    x = matrix(3, 64, seed=2)
    x[1, 5] = torch.nan
    found = calls.rounding_loss(x, cpu.quantize(x, DIALECT_FP4, 32, "mse", 13, "none"))
    assert found.isnan().all(dim=1).tolist() == [False, True, False]


def test_a_matrix_that_does_not_fit():
    p = ops.quantize(matrix(4, 64, seed=3))
    with pytest.raises(ValueError, match=r"x: has shape \[3, 64\]; it must be .* \[4, 64\]"):
        ops.rounding_loss(torch.zeros(3, 64), p)
    with pytest.raises(ValueError, match=r"x: has dtype torch\.float64"):
        ops.rounding_loss(torch.zeros(4, 64, dtype=torch.float64), p)
    with pytest.raises(ValueError, match=r"x: is on meta, the packed tensor on cpu"):
        ops.rounding_loss(torch.zeros(4, 64, device="meta"), p)
