"""How much of a transformer is in 4 bit."""

from __future__ import annotations

import logging

from torch import nn

from ..layers.dialect import DialectLinear
from ..layers.quantized import QuantizedLinear

__all__ = ["share_in_4_bit", "warn_of_a_small_share"]

_log = logging.getLogger(__name__)
_SMALL = 0.5


def share_in_4_bit(module: nn.Module) -> float:
    """Share of a transformer's parameters, counted as before, that is in 4-bit layers."""
    held, quantized = 0, 0
    for part in module.modules():
        own = sum(p.numel() for p in part.parameters(recurse=False))
        if isinstance(part, QuantizedLinear):
            weights = part.in_features * part.out_features
            own = weights + (0 if part.bias is None else part.bias.numel())
            quantized += weights if isinstance(part, DialectLinear) else 0
        held += own
    return quantized / max(1, held)


def warn_of_a_small_share(module: nn.Module) -> None:
    """Say that most of a transformer stays in 16 bit, if it does."""
    share = share_in_4_bit(module)
    if share < _SMALL:
        _log.warning(
            "%s: %.0f %% of the parameters are in 4 bit, the others in 16 bit or FP8",
            type(module).__name__,
            100 * share,
        )
