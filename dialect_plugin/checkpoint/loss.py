"""The loss of a weight by rounding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

__all__ = ["signal_and_noise", "sqnr"]


def signal_and_noise(
    weight: torch.Tensor, rounded: Callable[[], torch.Tensor]
) -> tuple[float, float]:
    """Energy of a weight and of its rounding error.

    Row sums are float32, their sum float64 in a fixed order: the same for any thread count.

    Args:
        weight: [N, K].
        rounded: returns the rounded weight, a fresh float32 [N, K], which is overwritten.

    Returns:
        (sum of x**2, sum of (x - rounded)**2).
    """
    exact = weight.to(torch.float32)
    error = rounded().sub_(exact)
    rows = torch.stack([exact.square().sum(dim=1), error.square_().sum(dim=1)])
    signal, noise = rows.to(torch.float64).cumsum(dim=1)[:, -1].tolist() if rows.numel() else (0, 0)
    return float(signal), float(noise)


def sqnr(signal: float, noise: float) -> float:
    """Signal to quantization noise, in dB; infinite without noise."""
    return 10 * math.log10(signal / noise) if noise and signal else math.inf
