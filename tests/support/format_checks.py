"""What the tests of the format share: book pairs, dtypes and the byte-for-byte comparison."""

import numpy as np
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedTensor
from tests.support import brute_force as brute

BOOKS = {brute.FP4: DIALECT_FP4, brute.SEM: SEMANTIC_32}
RULES = [
    (brute.FP4, "mse"),
    (brute.FP4, "two_stage"),
    (brute.SEM, "mse"),
    (brute.SEM, "lut"),
]
BLOCK_SIZES = (16, 32, 64)


def as_float32(x: torch.Tensor) -> np.ndarray:
    return x.detach().to(torch.float32).contiguous().numpy()


def assert_same(p: PackedTensor, expected: brute.Packed) -> None:
    """Codes, meta and row exponents are the same bytes, the values the same float32 bits."""
    assert p.shape == expected.shape
    assert p.block_size == expected.block_size
    assert p.book.name == expected.book.name
    for field in ("row_exponent", "meta", "codes"):
        got, want = getattr(p, field).numpy(), getattr(expected, field)
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        wrong = np.argwhere(got != want)
        assert not len(wrong), f"{field}{wrong[0].tolist()}: {got[tuple(wrong[0])]}, " + (
            f"expected {want[tuple(wrong[0])]} ({len(wrong)} differ)"
        )
    values = p.dequantize(torch.float32).numpy().astype(np.float64)
    assert np.array_equal(values, expected.values())


def to_packed(b: brute.Packed) -> PackedTensor:
    """The brute force's tensor as the product's type."""
    return PackedTensor(
        torch.from_numpy(b.codes),
        torch.from_numpy(b.meta),
        torch.from_numpy(b.row_exponent),
        b.shape,
        BOOKS[b.book],
        b.block_size,
    )


def data(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """float32 [rows, columns] of one of the shapes that real tensors have."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns))
    if kind == "outlier_channels":
        x[:, rng.permutation(columns)[: max(1, columns // 100)]] *= 100
    elif kind == "one_channel":
        x[:, columns // 3] *= 2000
    elif kind == "lognormal_channels":
        x *= np.exp(1.5 * rng.standard_normal(columns))
    elif kind == "student_t2":
        x = rng.standard_t(2, (rows, columns))
    elif kind == "wide":
        x *= np.exp2(rng.integers(-24, 8, (rows, columns)))
    elif kind == "grid":
        x = rng.integers(-31, 32, (rows, columns)) / 4  # levels and midpoints: many exact ties
    elif kind != "gaussian":
        raise ValueError(kind)
    return torch.from_numpy(x.astype(np.float32))
