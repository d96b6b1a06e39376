"""The gradient of a product with a packed weight (ours; other quantizers have the same).

It passes straight through the rounding of the activations: it is that of a product with the decoded
weight. The packed weight itself cannot be trained.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

__all__ = ["straight_through"]


class _Layer(Protocol):
    """A linear layer with a packed weight [N, K] and a bias."""

    @property
    def bias(self) -> Any: ...

    def product(self, x: torch.Tensor) -> torch.Tensor: ...

    def decode(self, dtype: torch.dtype | None = None) -> torch.Tensor: ...


def straight_through(x: torch.Tensor, layer: _Layer) -> torch.Tensor:
    """``layer.product(x)``, [..., K] -> [..., N], with a gradient for `x` and for the bias."""
    bias: torch.Tensor | None = layer.bias
    trained = x.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        y: torch.Tensor = _StraightThrough.apply(x, bias, layer)  # type: ignore[no-untyped-call]
        return y
    return layer.product(x)


class _StraightThrough(torch.autograd.Function):
    """The product, and its gradient as if the activations had not been rounded."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: _Layer
    ) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_x, of_bias = ctx.needs_input_grad[:2]
        return (
            grad @ ctx.layer.decode(grad.dtype) if of_x else None,
            grad.flatten(0, -2).sum(0) if of_bias else None,
            None,
        )
