"""What the hook on one transformer remembers between calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..config import SemanticDialectConfig
from ..layouts import Block, Grid
from .block_state import BlockState
from .branch import Context
from .generation import Generation, Generations
from .meter import Meter
from .protection import Protection
from .running import running_pipeline

__all__ = ["ModelState"]


class ModelState:
    """The generations in progress, one for each thread, the blocks and the meter.

    Attributes:
        config: the configuration in force.
        blocks: the states of the blocks.
        meter: counts and times.
        protection: the protected steps of the generation that began last, in any thread; None
            before.
        pipeline: a function that returns the followed pipeline, or None.
    """

    def __init__(
        self,
        config: SemanticDialectConfig,
        blocks: Sequence[Block] = (),
        *,
        timestep_rises: bool = False,
    ) -> None:
        """The state of a transformer before any call.

        Args:
            config: the configuration in force.
            blocks: the transformer's blocks.
            timestep_rises: see :class:`~diffusers_hook.layouts.Layout`.
        """
        self.config = config
        self.meter = Meter()
        self.protection: Protection | None = None
        self.pipeline: Callable[[], Any] = lambda: None
        self._generations = Generations(timestep_rises=timestep_rises)
        self.blocks = [
            BlockState(block, index, config, self._generations, self.meter)
            for index, block in enumerate(blocks)
        ]

    @property
    def generation(self) -> Generation:
        """The generation of the thread that asks."""
        return self._generations.current

    @property
    def reads_attention(self) -> bool:
        """Whether salient tokens or groups are read from attention; else all rows round alone."""
        return self.config.decomposes or self.config.groups

    def follow(self, pipeline: object) -> None:
        """Follow a pipeline wherever no enabled one runs: its scheduler tells generations apart."""
        with suppress(TypeError):  # what cannot be referred to weakly is not followed
            self.pipeline = weakref.ref(pipeline)

    def begin(self, grid: Grid | None, timestep: object, context: Context) -> None:
        """A call of the transformer begins; arguments as :meth:`Generation.begin`.

        A generation begins wherever the scheduler of the pipeline gets new timesteps: of the one
        that runs in this thread, or else of the one that is followed.
        """
        self.meter.add("calls")
        if not (self.reads_attention or self.config.protects):
            return
        running = running_pipeline()
        scheduler = getattr(running or self.pipeline(), "scheduler", None)
        if scheduler is None and self.config.protected_steps is None and not self.reads_attention:
            self._protection(None)  # none, so no call needs to be told from another
            return
        # an attribute and no property: a property could make a new tensor in every call
        schedule = getattr(scheduler, "__dict__", {}).get("timesteps")
        generation = self.generation
        generation.begin(
            grid if self.reads_attention else None,
            timestep,
            context,
            schedule,
            None if running is None else _index_of(scheduler),
            lambda: self._protection(scheduler),
        )
        if generation.protected:
            self.meter.add("protected calls")

    def _protection(self, scheduler: object) -> Protection:
        found = self.protection = Protection.of(self.config, scheduler)
        return found

    def end(self) -> None:
        """The call came to its end."""
        self.generation.end()

    def group_sizes(self) -> list[tuple[float, float]]:
        """:meth:`BranchState.group_sizes` of every block and branch, in all threads."""
        found = (record.group_sizes() for record in self._generations.records())
        return [sizes for sizes in found if sizes is not None]


def _index_of(scheduler: Any) -> int | None:
    """Which of its timesteps a scheduler is at, where it says so."""
    index: int | None = getattr(scheduler, "step_index", None)
    return getattr(scheduler, "begin_index", None) if index is None else index
