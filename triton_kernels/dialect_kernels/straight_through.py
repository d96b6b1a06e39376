"""The gradient of a product with a packed weight (ours; other quantizers have the same).

It passes straight through the rounding of the activations: it is that of a product with the decoded
weight. The packed weight itself cannot be trained.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import torch

__all__ = ["grouped_straight_through", "straight_through"]


class _Layer(Protocol):
    """A linear layer with a packed weight [N, K] and a bias."""

    @property
    def bias(self) -> Any: ...

    def product(self, x: torch.Tensor) -> torch.Tensor: ...

    def decode(self, dtype: torch.dtype | None = None) -> torch.Tensor: ...


class _Experts(Protocol):
    """The packed weights [N, K] of a layer's experts."""

    def product(
        self,
        x: torch.Tensor,
        rows: torch.Tensor | None,
        offsets: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor: ...

    def decode_expert(self, expert: int, dtype: torch.dtype) -> torch.Tensor: ...


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


def grouped_straight_through(
    x: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    experts: _Experts,
) -> torch.Tensor:
    """As :func:`straight_through`, for products of tokens with some of many weights.

    Args:
        x, rows, offsets, bias: as for :func:`dialect_kernels.expert_linear`.
        experts: have the weights.
    """
    trained = x.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        y: torch.Tensor = _GroupedStraightThrough.apply(  # type: ignore[no-untyped-call]
            x, bias, rows, offsets, experts
        )
        return y
    return experts.product(x, rows, offsets, bias)


class _GroupedStraightThrough(torch.autograd.Function):
    """The products, and their gradient as if the activations had not been rounded."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor | None,
        offsets: torch.Tensor,
        experts: _Experts,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, offsets)
        ctx.experts, ctx.tokens, ctx.bias = experts, len(x), bias
        return experts.product(x, rows, offsets, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, offsets = ctx.saved_tensors
        of_x, of_bias = ctx.needs_input_grad[:2]
        x_grad: torch.Tensor | None = None
        bias_grad = torch.zeros_like(ctx.bias) if of_bias else None
        for expert, (first, end) in enumerate(pairwise(offsets.tolist())):
            if first == end:
                continue
            own = grad[first:end]
            if bias_grad is not None:
                bias_grad[expert] = own.sum(0)
            if of_x:
                part = own @ ctx.experts.decode_expert(expert, grad.dtype)
                if x_grad is None:
                    x_grad = grad.new_zeros(ctx.tokens, part.shape[1])
                if rows is None:
                    x_grad[first:end] = part
                else:
                    x_grad.index_add_(0, rows[first:end], part)
        return x_grad, bias_grad, None, None, None
