"""What the hook remembers between calls: salient tokens and groups, per block and guidance branch.

Compiled blocks must not see any of it, so that a new set of salient tokens never means a new
compilation. A block carries one small tensor, its *slot*; the ops of :mod:`diffusers_hook.ops` find
the block's state through the number in it::

    slot (int64 [2], CPU) = [number of the state, attention calls so far]

Both ops declare that they write the slot: that keeps compilers from moving one across the other.
"""

from __future__ import annotations

import itertools
import math
import time
import weakref
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .branch import Context
from .config import SemanticDialectConfig
from .layouts import Block, Grid, LayoutError, Stream
from .saliency import received_attention, select_salient
from .seda import assign_groups

__all__ = ["NO_BLOCK", "BlockState", "BranchState", "ModelState", "Rows", "state_of"]

_numbers = itertools.count()
_states: weakref.WeakValueDictionary[int, BlockState] = weakref.WeakValueDictionary()


NO_BLOCK = -1
"""The number in the slot of a layer that belongs to no enabled transformer."""


def state_of(slot: torch.Tensor) -> BlockState | None:
    """The state a slot belongs to, or None if its transformer is not enabled (any more)."""
    return _states.get(int(slot[0]))


@dataclass(frozen=True)
class Rows:
    """What the rounding of one linear layer's input needs, for `batch` samples of `tokens` rows."""

    batch: int
    tokens: int
    salient: torch.Tensor | None = None
    """int64 [batch, S]: rows that are decomposed."""
    group: torch.Tensor | None = None
    """int32 [batch, tokens]: the group of each row, -1 for a free one."""


@dataclass
class BranchState:
    """One guidance branch of one block."""

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
        branches: the guidance branches seen in this generation, by name.
    """

    def __init__(self, model: ModelState, block: Block, index: int) -> None:
        """State of a block; `index` is its place in the model."""
        self.model: ModelState = weakref.proxy(model)  # the model holds its blocks
        self.kind = block.kind
        self.index = index
        self.branches: dict[str, BranchState] = {}
        number = next(_numbers)
        self.slot = torch.tensor([number, 0])
        _states[number] = self

    @property
    def branch(self) -> BranchState:
        """The branch of the call in progress."""
        return self.branches.setdefault(self.model.branch, BranchState())

    def observe(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        """Count an attention call; choose salient tokens and groups where they are due.

        Args:
            query: [rows, heads, tokens, head dim] as they enter the softmax.
            key: [rows, heads, tokens, head dim].
            mask: as `F.scaled_dot_product_attention` takes it, or None.
            scale: factor of the scores; None: 1/sqrt(head dim).
        """
        grid = self.model.grid
        if grid is None:
            return  # the block was called outside its transformer, or its tokens lie on no grid
        config, branch = self.model.config, self.branch
        choose = config.decomposes and branch.calls % config.salient_refresh == 0
        group = config.groups and branch.calls % config.seda_refresh == 0
        if choose or group:
            with self.model.clock("saliency"):
                branch.scores.append(self._scores(query, key, mask, scale, grid))
        if group:
            with self.model.clock("SeDA"):
                groups = self._assign(query, key, mask, scale, branch.scores[-1], grid)
                branch.groups.append(groups)
        branch.samples += 1
        if branch.samples == (grid.batch if self.kind.one_by_one else 1):
            self._refresh(branch, choose, group)

    def _refresh(self, branch: BranchState, choose: bool, group: bool) -> None:
        """An attention call has shown all its samples: put what it says in force."""
        branch.calls += 1
        branch.samples = 0
        if choose or group:
            branch.rows.clear()
        if choose:
            with self.model.clock("saliency"):
                branch.salient = self._select(torch.cat(branch.scores))
            self.model.counts["salient refreshes"] += 1
        if group:
            branch.group = torch.cat(branch.groups)
            self.model.counts["group refreshes"] += 1
        branch.scores, branch.groups = [], []

    def rows(self, stream: Stream, count: int, device: torch.device) -> Rows:
        """Salient rows and groups of a linear layer's input.

        Args:
            stream: whose tokens its rows are.
            count: rows of all samples together.
            device: where the layer computes.

        Raises:
            LayoutError: if the rows do not fit the grid of the call in progress.
        """
        grid = self.model.grid
        if stream == Stream.CONTEXT or grid is None:
            return Rows(1, count)
        branch = self.branch
        known = branch.rows.get((stream, count))
        if known is None:
            known = self._rows(stream, count, grid, branch, device)
            branch.rows[stream, count] = known
        self.model.count_rows(count, known)
        return known

    def group_sizes(self) -> list[tuple[int, float]]:
        """(groups of a sample, share of the video tokens in them), the mean of every branch."""
        sizes = []
        for branch in self.branches.values():
            if branch.group is not None:
                groups = sum(len(row[row >= 0].unique()) for row in branch.group)
                share = (branch.group >= 0).float().mean().item()
                sizes.append((groups // len(branch.group), share))
        return sizes

    def reset(self) -> None:
        """Forget everything: a new generation begins."""
        self.branches.clear()

    def _scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        grid: Grid,
    ) -> torch.Tensor:
        """Received attention of the video tokens in the block's order, float32 [batch, tokens]."""
        scores = received_attention(query, key, mask=mask, scale=scale)
        if self.kind.attends != "all":
            return scores.reshape(grid.batch, grid.tokens)
        first = self._first_video(key.shape[2], grid)
        return scores[:, first : first + grid.tokens]

    def _select(self, scores: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        generator = None
        if config.selection == "random":
            # another draw in every block, branch and refresh, the same in every run
            draw = f"{config.seed} {self.index} {self.model.branch} {self.branch.calls}"
            generator = torch.Generator().manual_seed(zlib.crc32(draw.encode()))
        return select_salient(
            scores, config.salient_fraction, selection=config.selection, generator=generator
        )

    def _assign(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        scores: torch.Tensor,
        grid: Grid,
    ) -> torch.Tensor:
        """The groups of the video tokens in the block's order, int32 [batch, tokens]."""
        config = self.model.config
        positions, parts = _places(self.kind.attends, grid, query.device)
        first = self._first_video(key.shape[2], grid) if parts is None else 0
        order = _block_order(self.kind.attends, grid, query.device)
        group = assign_groups(
            query,
            key,
            scores[:, order.argsort()],
            grid.shape,
            mask=mask,
            scale=scale,
            window=config.seda_window,
            threshold=config.seda_threshold,
            video_positions=positions + first,
            rows=parts,
        )
        return group[:, order]

    def _first_video(self, tokens: int, grid: Grid) -> int:
        """Position of the first video token in a sequence of `tokens`."""
        if tokens < grid.sequence:
            return 0  # the video alone, without others before or after it
        return grid.before + (tokens - grid.sequence if self.kind.text == "first" else 0)

    def _text(self, tokens: int, grid: Grid, device: torch.device) -> torch.Tensor:
        """Positions of the text tokens in a sequence of `tokens`, int64."""
        count = max(0, tokens - grid.sequence)
        if self.kind.text is None:
            count = 0
        first = grid.sequence if self.kind.text == "last" else 0
        return torch.arange(first, first + count, device=device)

    def _rows(
        self, stream: Stream, count: int, grid: Grid, branch: BranchState, device: torch.device
    ) -> Rows:
        tokens, rest = divmod(count, grid.batch)
        if stream == Stream.VIDEO:
            fits = tokens in (grid.tokens, grid.sequence)
        else:
            fits = tokens >= grid.sequence
        if rest or not (fits or stream == Stream.TEXT):
            raise LayoutError(
                f"a {stream} layer of block {self.index} got {count} rows for {grid.batch} samples "
                f"of {grid.tokens} video tokens; the layout does not fit this model or this call"
            )
        if stream == Stream.TEXT:
            everything = torch.arange(tokens, device=device).expand(grid.batch, -1)
            return Rows(grid.batch, tokens, everything if self.model.config.decomposes else None)
        first = self._first_video(tokens, grid)
        salient = group = None
        if self.model.config.decomposes:
            text = self._text(tokens, grid, device).expand(grid.batch, -1)
            salient = _salient_rows(branch.salient, first, text)
        if branch.group is not None:
            group = branch.group.new_full((grid.batch, tokens), -1, device=device)
            group[:, first : first + grid.tokens] = branch.group.to(device)
        return Rows(grid.batch, tokens, salient, group)


class ModelState:
    """What one transformer's hook knows during a generation.

    Attributes:
        config: the configuration in force.
        blocks: states of the blocks whose attention is observed.
        grid: the grid of the call in progress; None outside a call, and where there is none.
        branch: the guidance branch of the call in progress.
        counts: how often things happened, by name.
        seconds: time spent in the hook's parts, by name; on a GPU the time to launch them.
    """

    def __init__(self, config: SemanticDialectConfig) -> None:
        """State of a transformer whose blocks are added by the caller."""
        self.config = config
        self.blocks: list[BlockState] = []
        self.grid: Grid | None = None
        self.branch = ""
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._timestep = -math.inf
        self._step: int | None = None
        self._branches_of_step: list[str] = []
        self._last_grid: Grid | None = None

    def begin(self, grid: Grid | None, timestep: float, context: Context) -> None:
        """A call of the transformer begins.

        A generation begins where the timestep rises, the grid changes, a named branch comes again
        at the same step, or the call before did not come to its end; then every block forgets its
        salient tokens and groups.

        Args:
            grid: the call's video tokens; None where they lie on no grid.
            timestep: the call's noise level; it falls during a generation.
            context: what the pipeline says about the call. Where it does not name the guidance
                branch, the calls of one timestep are numbered.
        """
        aborted = self.grid is not None
        same_step = (timestep, context.step) == (self._timestep, self._step)
        again = same_step and context.branch in self._branches_of_step
        if aborted or again or timestep > self._timestep or grid != self._last_grid:
            self.reset()
        elif not same_step:
            self._branches_of_step.clear()
        self._timestep, self._step = timestep, context.step
        self._last_grid = self.grid = grid
        self.branch = context.branch or f"call {len(self._branches_of_step)}"
        self._branches_of_step.append(self.branch)
        self.counts["calls"] += 1

    def end(self) -> None:
        """The call came to its end."""
        self.grid = None

    def reset(self) -> None:
        """Forget salient tokens and groups: a new generation begins."""
        self.grid = None
        self._timestep = -math.inf
        self._branches_of_step.clear()
        for block in self.blocks:
            block.reset()

    def count_rows(self, count: int, rows: Rows) -> None:
        """Count the rows of a linear layer's input, and those of them that are decomposed."""
        self.counts["rows"] += count
        if rows.salient is not None:
            self.counts["decomposed rows"] += rows.salient.numel()

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the time of the `with` block to `seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start


def _places(
    attends: str, grid: Grid, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where each video token, in grid order, stands in its attention.

    Returns:
        (int64 [tokens], its position in the sequence or in its part of the video; int64 [tokens],
        its part, or None where attention is over the whole video).
    """
    token = torch.arange(grid.tokens, device=device)
    if attends == "all":
        return token, None
    place, frame = token % (grid.rows * grid.columns), token // (grid.rows * grid.columns)
    return (place, frame) if attends == "frame" else (frame, place)


def _block_order(attends: str, grid: Grid, device: torch.device) -> torch.Tensor:
    """The grid index of each video token in the block's order, int64 [tokens]."""
    token = torch.arange(grid.tokens, device=device)
    if attends != "time":
        return token
    return token.view(grid.frames, -1).T.flatten()


def _salient_rows(
    video: torch.Tensor | None, first: int, text: torch.Tensor
) -> torch.Tensor | None:
    """The chosen video tokens and every text token, as rows of the layer's input."""
    if video is not None:
        return torch.cat([video.to(text.device) + first, text], dim=1)
    return text if text.shape[1] else None
