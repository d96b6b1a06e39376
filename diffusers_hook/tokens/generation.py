"""Where a generation begins, which branch and grid a call has, and what is known of its tokens."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import TypeAlias

import torch

from ..layouts import Grid
from .branch import Context
from .branch_state import BranchState
from .protection import NO_PROTECTION, Protection

__all__ = ["Generation", "Generations"]

_MOST_BRANCHES = 16
"""Guidance branches of one generation, at most; more calls of one timestep begin another one."""

_Place: TypeAlias = tuple[float, ...]
"""How far a generation is, in numbers of which none rises: the step, negated, or all timesteps."""


class Generation:
    """The generation that the calls of a transformer in one thread belong to.

    Attributes:
        grid: the grid of the call in progress; None outside a call, and where there is none.
        branch: the guidance branch of the call in progress.
        protection: the protected steps.
        protected: whether the call in progress is of one of them.
        records: what is known of the tokens of each block, by its index and by branch.
    """

    def __init__(self, *, timestep_rises: bool = False) -> None:
        """No call has been made yet.

        Args:
            timestep_rises: see :class:`~diffusers_hook.layouts.Layout`.
        """
        self.grid: Grid | None = None
        self.branch = ""
        self.protected = False
        self.records: defaultdict[int, dict[str, BranchState]] = defaultdict(dict)
        self._timestep_rises = timestep_rises
        self._schedule: torch.Tensor | None = None
        self._first: _Place | None = None
        self._last: dict[str, tuple[_Place, Grid | None]] = {}
        self._in_call = False
        self.protection = NO_PROTECTION
        self._here: _Place | None = None
        self._levels = 0

    def record(self, block: int) -> BranchState:
        """The record of a block, by its index, in the branch of the call in progress."""
        return self.records[block].setdefault(self.branch, BranchState())

    def begin(
        self,
        grid: Grid | None,
        timestep: object,
        context: Context,
        schedule: torch.Tensor | None = None,
        index: int | None = None,
        protection: Callable[[], Protection] = lambda: NO_PROTECTION,
    ) -> None:
        """A call of the transformer begins.

        It begins a generation if the call before did not come to its end, if the pipeline we follow
        has new timesteps, or if its guidance branch

        * goes back, to more noise or to an earlier step;
        * comes again where the generation began: schedulers of second order repeat a timestep, but
          never the first;
        * has another grid than in its last call.

        Args:
            grid: the call's video tokens; None where they lie on no grid.
            timestep: the call's noise level, a number or a tensor of any shape; all its values are
                compared, as a generation may denoise one frame after the other.
            context: branch and step as the pipeline names them; where it names no branch, the
                calls of one timestep are numbered.
            schedule: the timesteps of the pipeline that is followed, if one is.
            index: which of them the pipeline's scheduler is at, if it says so; it counts only where
                neither the timestep itself nor the context tells.
            protection: the protected steps of a generation; called where one begins.

        Where a generation begins, all records are forgotten.

        Waits for a GPU only where neither the context nor the followed pipeline tells the step.
        """
        aborted, scheduled = self._in_call, schedule is not self._schedule
        self._in_call, self._schedule = True, schedule
        place = self._place(timestep, context.step)
        anew = aborted or scheduled or self._begins_anew(place, grid, self._branch(place, context))
        if anew:
            self.records.clear()
            self._last.clear()
            self._first = place
            self._levels = 0
            self.protection = protection()
        elif _level(place) != self._here:
            self._levels += 1
        self._here = _level(place)
        self.grid = grid
        self.branch = self._branch(place, context)
        self._last[self.branch] = place, grid
        if self.protection.steps:
            step = self._step(_index_in(schedule, timestep), context.step, index)
            self.protected = step in self.protection.steps

    def end(self) -> None:
        """The call came to its end."""
        self.grid = None
        self.protected = self._in_call = False

    def _step(self, *indices: int | None) -> int:
        """The step of the call in progress.

        Args:
            *indices: what is known of the timestep's index, the surest first; where none of it is,
                the noise levels of the generation are counted.
        """
        for index in indices:
            if index is not None:
                return self.protection.step(index)
        return self._levels

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


class Generations:
    """The generations of one transformer: each thread that calls it has its own."""

    def __init__(self, *, timestep_rises: bool = False) -> None:
        """No thread has called yet; argument as :class:`Generation`."""
        self._timestep_rises = timestep_rises
        self._of_thread = threading.local()
        self._all: weakref.WeakSet[Generation] = weakref.WeakSet()

    @property
    def current(self) -> Generation:
        """The generation of the thread that asks."""
        found: Generation | None = getattr(self._of_thread, "generation", None)
        if found is None:
            found = Generation(timestep_rises=self._timestep_rises)
            self._of_thread.generation = found
            self._all.add(found)
        return found

    def records(self) -> list[BranchState]:
        """What is known in all threads that have not ended."""
        return [
            record
            for generation in list(self._all)
            for branches in list(generation.records.values())
            for record in list(branches.values())
        ]


def _level(place: _Place) -> _Place:
    """A place, in the same numbers for every batch where all its tokens have one noise level."""
    return place[:1] if len(set(place)) == 1 else place


def _index_in(schedule: torch.Tensor | None, timestep: object) -> int | None:
    """Which of the schedule's timesteps this is, if it is a view of one; reads no values."""
    if not (isinstance(schedule, torch.Tensor) and isinstance(timestep, torch.Tensor)):
        return None
    if timestep.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
        return None
    return int(timestep.storage_offset() - schedule.storage_offset())
