"""Grids of models that put tokens of earlier parts of the video before those being made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..layouts import Grid, patched_grid

__all__ = ["grid_with_history"]


def grid_with_history(
    parts: Mapping[str, tuple[str, int]],
) -> Callable[[nn.Module, Mapping[str, Any]], Grid]:
    """A grid read from ``hidden_states``, with the tokens of earlier parts before it.

    Args:
        parts: the argument with the latents of an earlier part -> (the argument with its frame
            indices, without which the model ignores it; how many times longer its patches are in
            every axis than 1 x 2 x 2).
    """
    of_video = patched_grid()

    def grid(model: nn.Module, arguments: Mapping[str, Any]) -> Grid:
        before = 0
        for latents, (indices, factor) in parts.items():
            if arguments.get(latents) is not None and arguments.get(indices) is not None:
                before += _tokens(arguments[latents], factor)
        return replace(of_video(model, arguments), before=before)

    return grid


def _tokens(latents: torch.Tensor, factor: int) -> int:
    """Tokens of latents [batch, channels, frames, height, width]; patches at the border count."""
    patch = (factor, 2 * factor, 2 * factor)
    return math.prod(-(-size // p) for size, p in zip(latents.shape[2:], patch, strict=True))
