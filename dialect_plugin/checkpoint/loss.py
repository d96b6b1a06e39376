"""The loss of a weight by rounding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

__all__ = ["signal_and_noise", "sqnr"]


_SLICE_ELEMENTS = 1 << 16  # a slice and its float32 copies stay in the cache of a core


def signal_and_noise(
    weight: torch.Tensor, rounded: Callable[[int, int], torch.Tensor]
) -> tuple[float, float]:
    """Energy of a weight and of its rounding error.

    Row sums are float32, their sum float64 in a fixed order: the same for any thread count.

    Args:
        weight: [N, K].
        rounded: ``rounded(start, stop)`` returns these rows of the rounded weight, float32
            [stop - start, K], which are overwritten.

    Returns:
        (sum of x**2, sum of (x - rounded)**2).
    """
    rows, columns = weight.shape
    step = max(1, _SLICE_ELEMENTS // max(1, columns))
    sums = torch.empty(2, rows, dtype=torch.float32)
    copies = torch.empty(min(step, rows), columns, dtype=torch.float32)  # once: fresh pages cost
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        exact = copies[: stop - start].copy_(weight[start:stop])
        error = rounded(start, stop).sub_(exact)
        torch.sum(exact.square_(), dim=1, out=sums[0, start:stop])
        torch.sum(error.square_(), dim=1, out=sums[1, start:stop])
    signal, noise = sums.to(torch.float64).cumsum(dim=1)[:, -1].tolist() if rows else (0, 0)
    return float(signal), float(noise)


def sqnr(signal: float, noise: float) -> float:
    """Signal to quantization noise, in dB; infinite without noise."""
    return 10 * math.log10(signal / noise) if noise and signal else math.inf
