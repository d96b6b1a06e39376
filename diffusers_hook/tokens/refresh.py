"""When salient tokens and groups of a block are renewed, and how they are found in an attention."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from ..attention.attention import Attention
from ..attention.saliency import received_attention, select_salient
from ..attention.seda import assign_groups
from ..config import SemanticDialectConfig
from .token_rows import TokenRows

__all__ = ["Due", "choose", "group", "video_scores"]


@dataclass(frozen=True)
class Due:
    """What an attention call renews."""

    salient: bool
    groups: bool

    @classmethod
    def at(cls, calls: int, config: SemanticDialectConfig) -> Due:
        """What is due after `calls` attention calls of a block and guidance branch."""
        return cls(
            config.decomposes and calls % config.salient_refresh == 0,
            config.groups and calls % config.seda_refresh == 0,
        )


def video_scores(attention: Attention, where: TokenRows) -> torch.Tensor:
    """Received attention of the video tokens in the block's order, float32 [batch, tokens]."""
    scores = received_attention(attention)
    if where.kind.attends != "all":
        return scores.reshape(where.grid.batch, where.grid.tokens)
    return scores[:, where.video(attention.key.shape[2])]


def choose(scores: torch.Tensor, config: SemanticDialectConfig, draw: str) -> torch.Tensor:
    """The salient video tokens, int64 [batch, S], ascending.

    Args:
        scores: float32 [batch, video tokens].
        config: share and selection.
        draw: names the draw of a random selection; with the configuration's seed it decides it.
    """
    generator = None
    if config.selection == "random":
        seed = zlib.crc32(f"{config.seed} {draw}".encode())
        generator = torch.Generator().manual_seed(seed)
    return select_salient(
        scores, config.salient_fraction, selection=config.selection, generator=generator
    )


def group(
    attention: Attention, scores: torch.Tensor, where: TokenRows, config: SemanticDialectConfig
) -> torch.Tensor:
    """The groups of the video tokens in the block's order, int32 [batch, tokens]."""
    device = attention.query.device
    positions, parts = where.places(device)
    first = where.video(attention.key.shape[2]).start if parts is None else 0
    order = where.order(device)
    groups = assign_groups(
        attention,
        scores[:, order.argsort()],
        where.grid.shape,
        window=config.seda_window,
        threshold=config.seda_threshold,
        video_positions=positions + first,
        parts=parts,
    )
    return groups[:, order]
