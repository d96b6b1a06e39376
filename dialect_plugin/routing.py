"""What the routed experts of a layer add up to; engines bring the products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["Product", "chosen_experts"]


class Product(Protocol):
    """The product of tokens with the stacked matrices of all experts."""

    def __call__(
        self, x: torch.Tensor, rows: torch.Tensor | None, offsets: torch.Tensor
    ) -> torch.Tensor: ...


def chosen_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    count: int,
    before: Product,
    activation: Callable[[torch.Tensor], torch.Tensor],
    after: Product,
) -> torch.Tensor:
    """The weighted sum of the outputs of each token's experts.

    All shapes depend on shapes alone, so that it can be traced.

    Args:
        x: the tokens, [T, H].
        weights: [T, k].
        ids: int64 [T, k], numbers of experts; what another number than 0..count-1 chooses is 0.
        count: how many experts there are.
        before, after: the products in front of the activation and behind it; arguments and result
            are those of ``torch.ops.blockdialect.grouped_linear``.
        activation: what lies between them, row by row.

    Returns:
        [T, H] in x's dtype: products of the chosen experts are added in float32 and rounded once.
    """
    tokens, chosen = ids.shape
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(count + 1, device=ids.device))
    rows = torch.div(order, chosen, rounding_mode="floor")
    outer = after(activation(before(x, rows, offsets)), None, offsets)
    own = torch.argsort(order).view(tokens, chosen)
    weighted = outer[own].float() * weights.float().unsqueeze(-1)
    return weighted.sum(dim=1).to(x.dtype)
