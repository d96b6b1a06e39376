"""What the hook remembers between calls: salient tokens and groups, per block and guidance branch.

Compiled blocks must not see any of it, so that a new set of salient tokens never means a new
compilation. A block carries one small tensor, its *slot*; the ops of
:mod:`diffusers_hook.tokens.ops` find the block's state through the number in it::

    slot (int64 [2], CPU) = [number of the state, attention calls so far]

Both ops declare that they write the slot: that keeps compilers from moving one across the other.
"""

from __future__ import annotations

import itertools
import time
import weakref
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from ..attention.attention import log_sum_exp
from ..attention.saliency import received_attention, received_attention_from_lse, select_salient
from ..attention.seda import assign_groups
from ..config import SemanticDialectConfig
from ..layouts.layouts import Block, Grid, LayoutError, Stream
from .branch import Context

__all__ = ["NO_BLOCK", "BlockState", "BranchState", "ModelState", "Rows", "state_of"]

_numbers = itertools.count()
_states: weakref.WeakValueDictionary[int, BlockState] = weakref.WeakValueDictionary()


NO_BLOCK = -1
"""The number in the slot of a layer that belongs to no enabled transformer."""

_MOST_BRANCHES = 16
"""Guidance branches of one generation, at most: more calls of one timestep are another's."""

_Place: TypeAlias = tuple[float, ...]
"""How far a generation is, in numbers of which none rises: the step, negated, or all timesteps."""


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
        self.slot = torch.tensor([number, 0], device="cpu")  # whatever the default device is
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

        Salient tokens need a few sampled queries. Groups need the log-sum-exp of all queries, which
        costs as much as the attention itself: with the default refresh a tenth of the attention's
        time. The model's own call does not hand it out.

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
        lse = None
        if group:
            with self.model.clock("SeDA"):
                lse = log_sum_exp(query, key, mask=mask, scale=scale)
        if choose or group:
            with self.model.clock("saliency"):
                branch.scores.append(self._scores(query, key, lse, mask, scale, grid))
        if group:
            with self.model.clock("SeDA"):
                groups = self._assign(query, key, lse, mask, scale, branch.scores[-1], grid)
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

    def _scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        lse: torch.Tensor | None,
        mask: torch.Tensor | None,
        scale: float | None,
        grid: Grid,
    ) -> torch.Tensor:
        """Received attention of the video tokens in the block's order, float32 [batch, tokens]."""
        if lse is None:
            scores = received_attention(query, key, mask=mask, scale=scale)
        else:
            scores = received_attention_from_lse(query, key, lse, mask=mask, scale=scale)
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
        lse: torch.Tensor | None,
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
            lse=lse,
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
                f"of {grid.tokens} video tokens; the layout does not fit this model or this call "
                "(context parallelism and inputs split inside the model need salient_fraction=0 "
                "and seda=False)"
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
        seconds: time spent in the hook's parts, by name; on a GPU the time to launch them, unless
            `wait` waits for it.
        pipeline: the pipeline that is followed, or None, when called.
        wait: called whenever the clock of a part is read; ``torch.cuda.synchronize`` in benchmarks.
    """

    def __init__(self, config: SemanticDialectConfig, *, timestep_rises: bool = False) -> None:
        """State of a transformer whose blocks are added by the caller.

        Args:
            config: the configuration in force.
            timestep_rises: see :class:`~diffusers_hook.layouts.layouts.Layout`.
        """
        self.config = config
        self.blocks: list[BlockState] = []
        self.grid: Grid | None = None
        self.branch = ""
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.wait: Callable[[], object] = lambda: None
        self._timestep_rises = timestep_rises
        self.pipeline: Callable[[], Any] = lambda: None
        self._schedule: torch.Tensor | None = None
        self._first: _Place | None = None
        self._last: dict[str, tuple[_Place, Grid | None]] = {}

    def follow(self, pipeline: object) -> None:
        """Know the pipeline: a generation begins wherever its scheduler gets new timesteps."""
        with suppress(TypeError):  # what cannot be referred to weakly is not followed
            self.pipeline = weakref.ref(pipeline)

    def begin(self, grid: Grid | None, timestep: object, context: Context) -> None:
        """A call of the transformer begins.

        It begins a generation, and every block forgets its salient tokens and groups, if the call
        before did not come to its end, if the pipeline we follow has new timesteps, or if its
        guidance branch

        * goes back, to more noise or to an earlier step;
        * comes again where the generation began: schedulers of second order repeat a timestep, but
          never the first;
        * has another grid than in its last call.

        Args:
            grid: the call's video tokens; None where they lie on no grid.
            timestep: the call's noise level, a number or a tensor of any shape; all its values are
                compared, as a generation may denoise one frame after the other.
            context: what the pipeline says about the call. Where it does not name the guidance
                branch, the calls of one timestep are numbered.

        Waits for a GPU only where neither the context nor the followed pipeline tells the step.
        """
        self.counts["calls"] += 1
        if not (self.config.decomposes or self.config.groups):
            return  # rows are rounded alone, whosever they are
        aborted, scheduled = self.grid is not None, self._scheduled()
        place = self._place(timestep, context.step)
        if aborted or scheduled or self._begins_anew(place, grid, self._branch(place, context)):
            self.reset()
            self._first = place
        self.grid = grid
        self.branch = self._branch(place, context)
        self._last[self.branch] = place, grid

    def end(self) -> None:
        """The call came to its end."""
        self.grid = None

    def reset(self) -> None:
        """Forget salient tokens and groups: a new generation begins."""
        self.grid = self._first = None
        self._last.clear()
        for block in self.blocks:
            block.reset()

    def _scheduled(self) -> bool:
        """Whether the pipeline has set timesteps since the last call."""
        before = self._schedule
        scheduler = getattr(self.pipeline(), "scheduler", None)
        # an attribute and no property: a property could make a new tensor for everybody who asks
        self._schedule = getattr(scheduler, "__dict__", {}).get("timesteps")
        return self._schedule is not before

    def _place(self, timestep: object, step: int | None) -> _Place:
        if step is None:
            step = _index_in(self._schedule, timestep)
        if step is not None:
            return (-step,)
        if timestep is None:
            return ()
        values = torch.as_tensor(timestep).flatten().tolist()
        return tuple(-value for value in values) if self._timestep_rises else tuple(values)

    def _branch(self, place: _Place, context: Context) -> str:
        here = sum(last == place for last, _ in self._last.values())
        return context.branch or f"call {here}"

    def _begins_anew(self, place: _Place, grid: Grid | None, branch: str) -> bool:
        """Whether a call of this branch cannot go on with the generation so far."""
        if branch not in self._last:
            return len(self._last) in (0, _MOST_BRANCHES)
        last, last_grid = self._last[branch]
        if place == self._first or len(place) != len(last) or grid != last_grid:
            return True
        return any(now > before for now, before in zip(place, last, strict=True))

    def count_rows(self, count: int, rows: Rows) -> None:
        """Count the rows of a linear layer's input, and those of them that are decomposed."""
        self.counts["rows"] += count
        if rows.salient is not None:
            self.counts["decomposed rows"] += rows.salient.numel()

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the time of the `with` block to `seconds`."""
        self.wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.wait()
            self.seconds[part] += time.perf_counter() - start


def _index_in(schedule: torch.Tensor | None, timestep: object) -> int | None:
    """Which of the schedule's timesteps this is, if it is a view of one; reads no values."""
    if not (isinstance(schedule, torch.Tensor) and isinstance(timestep, torch.Tensor)):
        return None
    if timestep.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
        return None
    return int(timestep.storage_offset() - schedule.storage_offset())


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
