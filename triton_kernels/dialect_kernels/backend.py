"""What a back end of the ground floor does, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .packed import PackedTensor

__all__ = ["Quantized"]


class Quantized(NamedTuple):
    """A quantized matrix [N, K], and what was counted on the way."""

    packed: PackedTensor
    blocks_below_window: torch.Tensor
    """int64 [N], as :func:`dialect_kernels.reference.blocks_below_window`."""
