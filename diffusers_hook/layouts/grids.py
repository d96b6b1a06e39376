"""The (frames, rows, columns) grid of a call's video tokens, and how families read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "Grid",
    "grid_with_history",
    "no_grid",
    "patched_grid",
    "remembered",
    "with_padded_text",
]

_Read = TypeVar("_Read")
_Grid: TypeAlias = Callable[[nn.Module, Mapping[str, Any]], "Grid"]


@dataclass(frozen=True)
class Grid:
    """The video tokens of one call of the transformer.

    Attributes:
        batch: samples.
        frames, rows, columns: sizes of the grid; token (t, h, w) is ``(t*rows + h)*columns + w``.
        before: tokens of another video, e.g. of an earlier part, that stand before these wherever
            the whole sequence is seen; they are never salient and in no group.
        after: the same, standing after them.
        text: the most text tokens that a sample has; those behind them are padding. None: all.
    """

    batch: int
    frames: int
    rows: int
    columns: int
    before: int = 0
    after: int = 0
    text: int | None = None

    @property
    def tokens(self) -> int:
        """Video tokens per sample."""
        return self.frames * self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, rows, columns)."""
        return self.frames, self.rows, self.columns

    @property
    def sequence(self) -> int:
        """Tokens per sample with those of other videos."""
        return self.before + self.tokens + self.after


def patched_grid(
    argument: str = "hidden_states", axes: str = "bcthw"
) -> Callable[[nn.Module, Mapping[str, Any]], Grid]:
    """A grid read from a 5-D input and the model's ``config.patch_size``.

    Args:
        argument: name of the input.
        axes: its axes: b(atch), c(hannels), t(ime), h(eight), w(idth).
    """

    def grid(model: nn.Module, arguments: Mapping[str, Any]) -> Grid:
        video: torch.Tensor = arguments[argument]
        size = dict(zip(axes, video.shape, strict=True))
        patch = _patch(model)
        return Grid(size["b"], size["t"] // patch[0], size["h"] // patch[1], size["w"] // patch[2])

    return grid


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


def with_padded_text(
    of_video: _Grid,
    masks: Sequence[str] = ("encoder_attention_mask",),
    images: str | None = None,
    *,
    zeros_are_none: bool = False,
) -> _Grid:
    """A grid that tells how many text tokens are not padding.

    Args:
        of_video: the grid of the video.
        masks: arguments with masks [batch, text tokens] of texts; the padding is at their ends.
        images: the argument with features of images [batch, tokens, ...], which stand before the
            text and are no padding.
        zeros_are_none: whether the model takes features that are all zero for padding.
    """

    def grid(model: nn.Module, arguments: Mapping[str, Any]) -> Grid:
        counts = [_counts(mask) for name in masks if (mask := arguments.get(name)) is not None]
        if not counts or None in counts:
            return of_video(model, arguments)
        text = max(sum(of_sample) for of_sample in zip(*counts, strict=True))
        features = None if images is None else arguments.get(images)
        if features is not None and not (zeros_are_none and _all_zero(features)):
            text += features.shape[1]
        return replace(of_video(model, arguments), text=text)

    return grid


def no_grid(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """None: the tokens lie on no grid that we know."""


def remembered(read: Callable[[torch.Tensor], _Read]) -> Callable[[torch.Tensor], _Read]:
    """`read` with a memory of every tensor object it has seen: reading values waits for a GPU.

    For tensors that a pipeline makes once and passes in every call, such as coordinates.
    """
    known: Any = WeakTensorKeyDictionary()

    def read_once(tensor: torch.Tensor) -> _Read:
        if tensor not in known:
            known[tensor] = read(tensor)
        found: _Read = known[tensor]
        return found

    return read_once


def _count(mask: torch.Tensor) -> tuple[int, ...] | None:
    if mask.ndim != 2:
        return None
    counts = mask.bool().sum(1)
    in_front = torch.arange(mask.shape[1], device=mask.device) < counts[:, None]
    return tuple(counts.tolist()) if torch.equal(in_front, mask.bool()) else None


_counts = remembered(_count)
"""Tokens of each sample, or None where the padding is not at the end of all of them."""

_all_zero = remembered(lambda features: not features.any())


def _patch(model: nn.Module) -> tuple[int, int, int]:
    """Frames, rows and columns of pixels per token, from the model's configuration."""
    config: Any = model.config
    size = config.patch_size
    if isinstance(size, int):
        return getattr(config, "patch_size_t", None) or 1, size, size
    return tuple(size)


def _tokens(latents: torch.Tensor, factor: int) -> int:
    """Tokens of latents [batch, channels, frames, height, width]; patches at the border count."""
    patch = (factor, 2 * factor, 2 * factor)
    return math.prod(-(-size // p) for size, p in zip(latents.shape[2:], patch, strict=True))
