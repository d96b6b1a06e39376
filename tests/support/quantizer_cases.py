"""What the tests of the Triton quantizers share: hard inputs, and sections 5 and 6 by brute force.

The brute force is written from docs/reference/format.md with the half-units as its only table.
"""

from itertools import product

import numpy as np
import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, reference
from dialect_kernels.formatbook import BLOCK_SIZES

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

all_pairs = pytest.mark.parametrize(
    ("dtype", "block_size", "book"),
    [
        (DTYPES[number % 3], *pair)
        for number, pair in enumerate(product(BLOCK_SIZES, (DIALECT_FP4, SEMANTIC_32)))
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
"""Each block size with each book, each dtype with each book: of a dtype a kernel sees the load."""


def tensor(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """float32 [rows, columns] that uses every cell, all signs and several exponents."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.exp2(torch.randint(-6, 7, (rows, columns), generator=generator).float())


def adversarial(block_size: int) -> torch.Tensor:
    """Rows that a quantizer could get wrong, float32 [rows, 4 blocks]; the last four not finite."""
    B = block_size
    steps = torch.arange(4 * B)
    alternating = torch.where(steps % 2 == 0, 1.0, -1.0)
    gaps = torch.exp2(torch.tensor([0.0, -13, -14, -100])).repeat_interleave(B)
    rows = [
        torch.zeros(4 * B),
        -torch.zeros(4 * B),
        torch.full((4 * B,), 1e-45),
        steps * 1e-45,
        torch.where(steps == 0, 2.0**-118, steps * 2.0**-130),
        tensor(1, B, 1)[0].clamp(-7, 7).repeat(4) * gaps,  # on both sides of the window's edge
        (steps % 33 - 16) / 4,  # every cell's edge: midpoints and levels
        (steps % 65 - 32) / 8,
        torch.where(steps % B == 0, 7.99, (steps % 32) / 4.0),  # cell 31 saturates
        torch.where(steps % B == 0, 4.0, 0.24999),
        3.3e38 * alternating,
        torch.where(steps == 5, NAN, steps.float()),
        torch.where(steps == 2 * B, -INF, steps.float()),
        torch.where(steps == 4 * B - 1, INF, 0.0),
        torch.where(steps == 1, NAN, INF),
    ]
    return torch.stack([row.to(torch.float32) for row in rows])


def row_exponents(x: torch.Tensor) -> torch.Tensor:
    """R of every row of finite values, int32 [T]."""
    largest = x.to(torch.float32).abs().amax(dim=1)
    exponent = (torch.frexp(largest).exponent - 3).clamp(min=-120)  # frexp: mantissa in [0.5, 1)
    return torch.where(largest == 0, -120, exponent)


def as_fp8(values: torch.Tensor, exponent: torch.Tensor, block_size: int):
    """(E4M3 bytes [T, Kp], scale float32 [T]) of rounded values; rows of NaN: zeros and NaN."""
    finite = values.isfinite().all(dim=1)
    scale = torch.ldexp(torch.ones(len(values), dtype=torch.float64), exponent - 5)
    units = torch.where(finite[:, None], values.double() / scale[:, None], 0.0)
    q = units.to(torch.float32).to(torch.float8_e4m3fn)
    assert torch.equal(q.double(), units), "dialect values are E4M3 numbers"
    padding = -values.shape[1] % block_size
    q = torch.nn.functional.pad(q.view(torch.uint8), (0, padding))
    return q, torch.where(finite, scale, NAN).to(torch.float32)


def reference_fp8(x: torch.Tensor, book, block_size: int):
    """What ``quantize_activation`` must return, from the reference's values."""
    values = reference.round_activation(x, book, block_size)
    return as_fp8(values, row_exponents(x.nan_to_num(0.0, 0.0, 0.0)), block_size)


def same_rows(got, want) -> bool:
    """Whether two (q, scale) agree in every bit."""
    q, scale = (got[0].view(torch.uint8).cpu(), got[1].cpu())
    return torch.equal(q, want[0].cpu()) and torch.equal(
        scale.view(torch.int32), want[1].cpu().view(torch.int32)
    )


def operand_order(q: torch.Tensor) -> torch.Tensor:
    """[T, Kp] with the first 4 of every 8 columns in the first half, the others in the second."""
    halves = q.view(len(q), -1, 2, 4)
    return torch.cat([halves[:, :, 0].flatten(1), halves[:, :, 1].flatten(1)], dim=1)


def round_groups(x: torch.Tensor, book, block_size: int, group=None) -> torch.Tensor:
    """Section 6 (section 4 without `group`) for the 32-dialect book; float32 [T, K], rows finite.

    Args:
        group: labels [T], -1 free, or None: all tokens are free.
    """
    tokens, columns = x.shape
    padded = np.zeros((tokens, columns + -columns % block_size))
    padded[:, :columns] = x.to(torch.float64).numpy()
    blocks = padded.reshape(tokens, -1, block_size)
    magnitude = np.abs(blocks)
    exponent = np.frexp(magnitude.max(axis=2))[1] - 3
    exponent = np.where(magnitude.max(axis=2) == 0, -120, np.maximum(exponent, -120))
    effective = np.maximum(exponent, exponent.max(axis=1, keepdims=True) - 13)
    scaled = magnitude * np.exp2(-effective.astype(float))[:, :, None]
    k = np.minimum(31, np.floor(4 * scaled)).astype(int)
    m = np.clip((k.max(axis=2) + 1) // 2, 8, 15)

    half_units = np.array(book.half_units)
    middles = half_units[:, :-1] + half_units[:, 1:]
    ids = 4 * (15 - m)[:, :, None] + np.arange(4)  # [T, blocks, variant]
    index = (k[:, :, None, :, None] >= middles[ids][:, :, :, None, :]).sum(axis=-1)
    h = np.take_along_axis(half_units[ids], index, axis=3)  # [T, blocks, variant, B]
    error = ((2 * k[:, :, None, :] + 1 - 4 * h) ** 2).sum(axis=3)
    shared = error.copy()
    labels = np.full(tokens, -1) if group is None else group.numpy()
    for label in set(labels[labels >= 0].tolist()):
        shared[labels == label] = error[labels == label].sum(axis=0)
    variant = shared.argmin(axis=2)  # the first of equals
    chosen = np.take_along_axis(h, variant[:, :, None, None], axis=2)[:, :, 0]
    values = np.sign(blocks) * chosen * np.exp2(effective - 1.0)[:, :, None] + 0.0  # no -0
    return torch.from_numpy(values.reshape(tokens, -1)[:, :columns].astype(np.float32))


def decompose(x: torch.Tensor, first: torch.Tensor, salient: torch.Tensor) -> torch.Tensor:
    """Residuals of the salient rows (section 5), float32 [S, K]; unused places zero."""
    used = (salient >= 0) & (salient < len(x))
    index = torch.where(used, salient, 0).long()
    residual = x.to(torch.float32)[index] - first[index]
    return torch.where(used[:, None], residual, 0.0)
