"""Other ways to make SeDA's groups, to compare with the one in the hook (all ours).

Each is a function in the place of :func:`diffusers_hook.tokens.refresh.group`: an attention, the
scores of its video tokens, where they stand, the configuration -> int32 [batch, video tokens], the
index of each token's anchor, or -1. Blocks whose attention is over the whole video only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch.nn.functional import normalize

from diffusers_hook.attention.attention import Attention
from diffusers_hook.attention.windows import tilings
from diffusers_hook.config import SemanticDialectConfig
from diffusers_hook.tokens import refresh
from diffusers_hook.tokens.token_rows import TokenRows

__all__ = ["Grouping", "alike", "in_force", "in_place", "rows_of", "with_floor"]

Grouping: TypeAlias = Callable[
    [Attention, torch.Tensor, TokenRows, SemanticDialectConfig], torch.Tensor
]


@contextmanager
def in_force(grouping: Grouping | None) -> Iterator[None]:
    """Let the hook group by this in the `with` block; None: by its own rule."""
    own = refresh.group
    refresh.group = grouping or own
    try:
        yield
    finally:
        refresh.group = own


def rows_of(attention: Attention, where: TokenRows) -> torch.Tensor:
    """The attention of the video tokens to each other, the mean over heads, float32 [B, T, T]."""
    samples, heads, queries, _ = attention.query.shape
    rows = torch.zeros(samples, queries, attention.key.shape[2])
    for _, part, logits in attention.tiles():
        rows[:, part] += logits.softmax(-1).sum(1) / heads
    video = where.video(rows.shape[2])
    return rows[:, video, video]


def with_floor(times: float) -> Grouping:
    """The hook's rule, and a correlation of at least `times` that of even attention, 1 / T."""

    def grouping(
        attention: Attention,
        scores: torch.Tensor,
        where: TokenRows,
        config: SemanticDialectConfig,
    ) -> torch.Tensor:
        rows = rows_of(attention, where)
        correlation = (rows + rows.mT) / 2
        group = own(attention, scores, where, config).to(torch.int64)
        strength = correlation.gather(2, group.clamp(min=0)[:, :, None])[:, :, 0]
        token = torch.arange(group.shape[1])
        kept = (group == token) | (strength >= times / attention.key.shape[2])
        return group.masked_fill(~kept, -1).to(torch.int32)

    own = refresh.group
    return grouping


def alike(vectors: Callable[[Attention, TokenRows], torch.Tensor], threshold: float) -> Grouping:
    """Tokens whose vectors have at least this cosine with their window's anchor.

    Anchors and windows are those of the hook; a token that two anchors claim follows the more alike
    one, the first of equals.

    Args:
        vectors: [B, T, any width] of the video tokens.
        threshold: of the cosine.
    """

    def grouping(
        attention: Attention,
        scores: torch.Tensor,
        where: TokenRows,
        config: SemanticDialectConfig,
    ) -> torch.Tensor:
        unit = normalize(vectors(attention, where).float(), dim=-1)
        cosine = unit @ unit.mT
        windows = tilings(where.grid.shape, config.seda_window, scores.device)
        members, padding = windows.members.clamp(min=0), windows.members < 0
        best = scores[:, members].masked_fill(padding, -torch.inf).argmax(-1)
        anchors = members.expand(len(scores), -1, -1).gather(2, best[:, :, None])[:, :, 0]
        own = (windows.slots // members.shape[1]).T  # the two windows of each token
        claims = anchors[:, own]  # [B, T, 2]
        strength = cosine.gather(2, claims)
        strongest, which = strength.max(-1)
        group = claims.gather(2, which[:, :, None])[:, :, 0].masked_fill(strongest < threshold, -1)
        return group.scatter(1, anchors, anchors).to(torch.int32)

    return grouping


def in_place(frames: int, side: int = 1) -> Grouping:
    """Boxes of neighbours: so many frames of a square of so many rows and columns."""

    def grouping(
        attention: Attention,
        scores: torch.Tensor,
        where: TokenRows,
        config: SemanticDialectConfig,
    ) -> torch.Tensor:
        sizes, steps = where.grid.shape, (frames, side, side)
        along = [torch.arange(size) // step * step for size, step in zip(sizes, steps, strict=True)]
        frame, row, column = torch.meshgrid(*along, indexing="ij")
        anchor = (frame * sizes[1] + row) * sizes[2] + column
        return anchor.flatten().expand(len(scores), -1).to(torch.int32)

    return grouping
