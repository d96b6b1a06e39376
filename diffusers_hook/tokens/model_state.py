"""What the hook on one transformer remembers between calls."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import SemanticDialectConfig
from ..layouts import Block, Grid
from .block_state import BlockState
from .branch import Context
from .generation import Generation
from .meter import Meter

__all__ = ["ModelState"]


class ModelState:
    """The generation in progress, the blocks with their salient tokens and groups, the meter.

    Attributes:
        config: the configuration in force.
        generation: where the generation in progress is.
        blocks: the states of the blocks.
        meter: counts and times.
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
        self.generation = Generation(timestep_rises=timestep_rises)
        self.blocks = [
            BlockState(block, index, config, self.generation, self.meter)
            for index, block in enumerate(blocks)
        ]

    @property
    def reads_attention(self) -> bool:
        """Whether salient tokens or groups are read from attention; else all rows round alone."""
        return self.config.decomposes or self.config.groups

    def begin(self, grid: Grid | None, timestep: object, context: Context) -> None:
        """A call of the transformer begins; arguments as :meth:`Generation.begin`.

        Where it begins a generation, every block forgets its salient tokens and groups.
        """
        self.meter.counts["calls"] += 1
        if self.reads_attention and self.generation.begin(grid, timestep, context):
            self.reset()

    def end(self) -> None:
        """The call came to its end."""
        self.generation.end()

    def reset(self) -> None:
        """Forget salient tokens and groups: a new generation begins."""
        for block in self.blocks:
            block.reset()
