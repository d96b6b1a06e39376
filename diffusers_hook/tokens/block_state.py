"""One block: its salient tokens and groups are renewed here, and its ops find them.

Compiled blocks must not see any of it, so that a new set of salient tokens never means a new
compilation. A block carries one small tensor, its *slot*; the ops of
:mod:`diffusers_hook.tokens.ops` find the block's state through the number in it::

    slot (int64 [2], CPU) = [number of the state, attention calls so far]

Both ops declare that they write the slot: that keeps compilers from moving one across the other.
"""

from __future__ import annotations

import itertools
import weakref

import torch

from ..attention.attention import Attention
from ..config import SemanticDialectConfig
from ..layouts import Block, LayoutError, Stream
from . import refresh
from .branch_state import BranchState
from .generation import Generation, Generations
from .meter import Meter
from .token_rows import Rows, TokenRows

__all__ = ["NO_BLOCK", "BlockState", "state_of"]

_numbers = itertools.count()
_states: weakref.WeakValueDictionary[int, BlockState] = weakref.WeakValueDictionary()

NO_BLOCK = -1
"""The number in the slot of a layer that belongs to no enabled transformer."""


def state_of(slot: torch.Tensor) -> BlockState | None:
    """The state a slot belongs to, or None if its transformer is not enabled (any more)."""
    return _states.get(int(slot[0]))


class BlockState:
    """One block of a transformer.

    It remembers nothing of its tokens: that belongs to a generation.

    Attributes:
        slot: int64 [2] on CPU; see above.
        kind: the kind of block.
        index: its place in the model.
    """

    def __init__(
        self,
        block: Block,
        index: int,
        config: SemanticDialectConfig,
        generations: Generations,
        meter: Meter,
    ) -> None:
        """The state of a block before any call.

        Args:
            block: the block.
            index: its place in the model.
            config: the configuration in force.
            generations: of the block's transformer.
            meter: of the block's transformer.
        """
        self.kind = block.kind
        self.meter = meter
        self.index = index
        self._config = config
        self._generations = generations
        number = next(_numbers)
        self.slot = torch.tensor([number, 0], device="cpu")  # whatever the default device is
        _states[number] = self

    @property
    def branches(self) -> dict[str, BranchState]:
        """The guidance branches seen in this generation, by name."""
        return self._generations.current.records[self.index]

    def observe(self, attention: Attention) -> None:
        """Count an attention call; choose salient tokens and groups where they are due.

        Salient tokens need a few sampled queries. Groups need the log-sum-exp of all queries, which
        costs as much as the attention itself: with the default refresh a tenth of the attention's
        time. The model's own call does not return it.

        Args:
            attention: the queries and keys as they enter the softmax, of all samples or, where
                attention is computed for one sample after the other, of one.
        """
        generation = self._generations.current
        grid = generation.grid
        if grid is None:
            return  # the block was called outside its transformer, or its tokens lie on no grid
        branch, where = generation.record(self.index), TokenRows(self.kind, grid)
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
            self._refresh(branch, due, generation.branch)

    def rows(self, stream: Stream, count: int, device: torch.device) -> Rows:
        """Salient rows and groups of a linear layer's input; in a protected step its precision.

        Args:
            stream: the tokens that its rows are.
            count: rows of all samples together.
            device: where the layer computes.

        Raises:
            LayoutError: if the rows do not fit the grid of the call in progress.
        """
        generation = self._generations.current
        if not generation.protected:
            found = self._rows(generation, stream, count, device)
        elif self._config.protected_format == "fp8":
            found = Rows(1, count, in_fp8=True)
        else:
            found = self._rows(generation, stream, count, device).decomposed(device)
        if stream != Stream.CONTEXT:
            self.meter.add("rows", count)
            if found.salient is not None:
                self.meter.add("decomposed rows", found.salient.numel())
        return found

    def _rows(
        self, generation: Generation, stream: Stream, count: int, device: torch.device
    ) -> Rows:
        """What the tokens' own records say of a linear layer's input."""
        grid = generation.grid
        if stream == Stream.CONTEXT or grid is None:
            return Rows(1, count)
        branch = generation.record(self.index)
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
        return known

    def _refresh(self, branch: BranchState, due: refresh.Due, name: str) -> None:
        """An attention call has shown all its samples: put the result in force."""
        branch.calls += 1
        # another draw in every block, branch and refresh, the same in every run
        draw = f"{self.index} {name} {branch.calls}"
        branch.samples = 0
        if due.salient or due.groups:
            branch.rows.clear()
        if due.salient:
            with self.meter.clock("saliency"):
                scores = torch.cat(branch.scores)
                branch.salient = refresh.choose(scores, self._config, draw)
            self.meter.add("salient refreshes")
        if due.groups:
            branch.group = torch.cat(branch.groups)
            self.meter.add("group refreshes")
        branch.scores, branch.groups = [], []
