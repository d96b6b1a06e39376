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

__all__ = ["ModelState"]


class ModelState:
    """The generations in progress, one for each thread, the blocks and the meter.

    Attributes:
        config: the configuration in force.
        blocks: the states of the blocks.
        meter: counts and times.
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
        """Follow a pipeline: a generation begins wherever its scheduler gets new timesteps."""
        with suppress(TypeError):  # what cannot be referred to weakly is not followed
            self.pipeline = weakref.ref(pipeline)

    def begin(self, grid: Grid | None, timestep: object, context: Context) -> None:
        """A call of the transformer begins; arguments as :meth:`Generation.begin`.

        A generation begins wherever the scheduler of the followed pipeline gets new timesteps.
        """
        self.meter.add("calls")
        if self.reads_attention:
            scheduler = getattr(self.pipeline(), "scheduler", None)
            # an attribute and no property: a property could make a new tensor in every call
            schedule = getattr(scheduler, "__dict__", {}).get("timesteps")
            self.generation.begin(grid, timestep, context, schedule)

    def end(self) -> None:
        """The call came to its end."""
        self.generation.end()

    def group_sizes(self) -> list[tuple[float, float]]:
        """:meth:`BranchState.group_sizes` of every block and branch, in all threads."""
        found = (record.group_sizes() for record in self._generations.records())
        return [sizes for sizes in found if sizes is not None]
