"""Emulated number formats: a linear layer on rounded operands."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["RoundedLinear", "Rounding"]

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""[T, K] in any dtype -> the rounded values, float32 [T, K]."""


class RoundedLinear(torch.nn.Module):
    """A linear layer on rounded operands: products and bias in float32, one rounding at the end.

    Args:
        weight: the weight's rounded values, float32 [N, K].
        bias: [N] or None.
        rounding: applied to the activations.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rounding: Rounding) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else bias.detach().float()
        self.rounding = rounding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        y = F.linear(self.rounding(x.reshape(-1, x.shape[-1])), self.weight, self.bias)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])
