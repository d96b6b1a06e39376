"""What a generation knows of the tokens of one block, for one guidance branch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..layouts import Stream
from .token_rows import Rows

__all__ = ["BranchState"]


@dataclass
class BranchState:
    """The record of one guidance branch of one block."""

    calls: int = 0
    salient: torch.Tensor | None = None
    """int64 [batch, S]: salient video tokens, ascending; None before the first score."""
    group: torch.Tensor | None = None
    """int32 [batch, video tokens]: the group of each video token, or None."""
    rows: dict[tuple[Stream, int], Rows] = field(default_factory=dict)
    """Answers given since the last refresh."""
    samples: int = 0
    """Samples whose attention was seen in the call in progress, where they come one by one."""
    scores: list[torch.Tensor] = field(default_factory=list)
    """Their scores [1, video tokens], where tokens are chosen in this call."""
    groups: list[torch.Tensor] = field(default_factory=list)
    """Their groups [1, video tokens], where tokens are grouped in this call."""

    def group_sizes(self) -> tuple[float, float] | None:
        """(Groups of a sample, share of the video tokens in them), or None without groups."""
        if self.group is None:
            return None
        groups = sum(len(row[row >= 0].unique()) for row in self.group)
        return groups / len(self.group), (self.group >= 0).float().mean().item()
