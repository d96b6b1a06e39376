"""The salient tokens and groups of one block, per guidance branch, and how its ops find them.

Compiled blocks must not see any of it, so that a new set of salient tokens never means a new
compilation. A block carries one small tensor, its *slot*; the ops of
:mod:`diffusers_hook.tokens.ops` find the block's state through the number in it::

    slot (int64 [2], CPU) = [number of the state, attention calls so far]

Both ops declare that they write the slot: that keeps compilers from moving one across the other.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field

import torch

from ..attention.attention import Attention
from ..config import SemanticDialectConfig
from ..layouts import Block, LayoutError, Stream
from . import refresh
from .generation import Generation
from .meter import Meter
from .token_rows import Rows, TokenRows

__all__ = ["NO_BLOCK", "BlockState", "BranchState", "state_of"]

_numbers = itertools.count()
_states: weakref.WeakValueDictionary[int, BlockState] = weakref.WeakValueDictionary()

NO_BLOCK = -1
"""The number in the slot of a layer that belongs to no enabled transformer."""


def state_of(slot: torch.Tensor) -> BlockState | None:
    """The state a slot belongs to, or None if its transformer is not enabled (any more)."""
    return _states.get(int(slot[0]))


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


class BlockState:
    """Salient tokens and groups of one block.

    Attributes:
        slot: int64 [2] on CPU; see above.
        kind: the kind of block.
        index: its place in the model.
        branches: the guidance branches seen in this generation, by name.
    """

    def __init__(
        self,
        block: Block,
        index: int,
        config: SemanticDialectConfig,
        generation: Generation,
        meter: Meter,
    ) -> None:
        """The state of a block before any call.

        Args:
            block: the block.
            index: its place in the model.
            config: the configuration in force.
            generation: of the block's transformer.
            meter: of the block's transformer.
        """
        self.kind = block.kind
        self.meter = meter
        self.branches: dict[str, BranchState] = {}
        self.index = index
        self._config = config
        self._generation = generation
        number = next(_numbers)
        self.slot = torch.tensor([number, 0], device="cpu")  # whatever the default device is
        _states[number] = self

    @property
    def branch(self) -> BranchState:
        """The branch of the call in progress."""
        return self.branches.setdefault(self._generation.branch, BranchState())

    def observe(self, attention: Attention) -> None:
        """Count an attention call; choose salient tokens and groups where they are due.

        Salient tokens need a few sampled queries. Groups need the log-sum-exp of all queries, which
        costs as much as the attention itself: with the default refresh a tenth of the attention's
        time. The model's own call does not return it.

        Args:
            attention: the queries and keys as they enter the softmax, of all samples or, where
                attention is computed for one sample after the other, of one.
        """
        grid = self._generation.grid
        if grid is None:
            return  # the block was called outside its transformer, or its tokens lie on no grid
        branch, where = self.branch, TokenRows(self.kind, grid)
        due = refresh.Due.at(branch.calls, self._config)
        if due.groups:
            with self.meter.clock("SeDA"):
                attention = attention.with_lse()
        if due.salient or due.groups:
            with self.meter.clock("saliency"):
                branch.scores.append(refresh.video_scores(attention, where))
        if due.groups:
            with self.meter.clock("SeDA"):
                groups = refresh.group(attention, branch.scores[-1], where, self._config)
                branch.groups.append(groups)
        branch.samples += 1
        if branch.samples == (grid.batch if self.kind.one_by_one else 1):
            self._refresh(branch, due)

    def rows(self, stream: Stream, count: int, device: torch.device) -> Rows:
        """Salient rows and groups of a linear layer's input.

        Args:
            stream: the tokens that its rows are.
            count: rows of all samples together.
            device: where the layer computes.

        Raises:
            LayoutError: if the rows do not fit the grid of the call in progress.
        """
        grid = self._generation.grid
        if stream == Stream.CONTEXT or grid is None:
            return Rows(1, count)
        branch = self.branch
        known = branch.rows.get((stream, count))
        if known is None:
            where = TokenRows(self.kind, grid)
            if not where.fits(stream, count):
                raise LayoutError(
                    f"a {stream} layer of block {self.index} got {count} rows for {grid.batch} "
                    f"samples of {grid.tokens} video tokens; the layout does not fit this model or "
                    "this call (context parallelism and inputs split inside the model need "
                    "salient_fraction=0 and seda=False)"
                )
            known = where.rows(
                stream,
                count,
                branch.salient,
                branch.group,
                device,
                decomposes=self._config.decomposes,
            )
            branch.rows[stream, count] = known
        self.meter.counts["rows"] += count
        if known.salient is not None:
            self.meter.counts["decomposed rows"] += known.salient.numel()
        return known

    def group_sizes(self) -> list[tuple[float, float]]:
        """(groups of a sample, share of the video tokens in them), the mean of every branch."""
        sizes = []
        for branch in self.branches.values():
            if branch.group is not None:
                groups = sum(len(row[row >= 0].unique()) for row in branch.group)
                share = (branch.group >= 0).float().mean().item()
                sizes.append((groups / len(branch.group), share))
        return sizes

    def reset(self) -> None:
        """Forget everything: a new generation begins."""
        self.branches.clear()

    def _refresh(self, branch: BranchState, due: refresh.Due) -> None:
        """An attention call has shown all its samples: put the result in force."""
        branch.calls += 1
        # another draw in every block, branch and refresh, the same in every run
        draw = f"{self.index} {self._generation.branch} {branch.calls}"
        branch.samples = 0
        if due.salient or due.groups:
            branch.rows.clear()
        if due.salient:
            with self.meter.clock("saliency"):
                scores = torch.cat(branch.scores)
                branch.salient = refresh.choose(scores, self._config, draw)
            self.meter.counts["salient refreshes"] += 1
        if due.groups:
            branch.group = torch.cat(branch.groups)
            self.meter.counts["group refreshes"] += 1
        branch.scores, branch.groups = [], []
