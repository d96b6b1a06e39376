"""A check of the small video model: `python -m demo.video.check`.

For each of eight prompts one video is generated and read back. All eight must have the prompt's
colour, and at least seven must move within 20 degrees of the prompt's direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from .pipeline import MODEL, MovingShapesPipeline
from .scenes import COLOURS, DIRECTIONS, SHAPES, SPEEDS, Reading, Scene, read

__all__ = ["PROMPTS", "SEED", "Check", "check"]

SEED = 7
PROMPTS = tuple(
    Scene(
        list(COLOURS)[i % len(COLOURS)],
        SHAPES[i % len(SHAPES)],
        direction,
        list(SPEEDS)[i % len(SPEEDS)],
    )
    for i, direction in enumerate(DIRECTIONS)
)
"""Every direction once, every colour, shape and speed at least once."""


@dataclass(frozen=True, eq=False)
class Check:
    """Prompts and readings, video by video; `frames` is [B, F, 3, H, W] in 0..1."""

    asked: Sequence[Scene]
    seen: Sequence[Reading]
    frames: torch.Tensor

    @property
    def colours(self) -> int:
        """Videos in the colour of their prompt."""
        pairs = zip(self.asked, self.seen, strict=True)
        return sum(seen.is_colour_of(scene) for scene, seen in pairs)

    @property
    def directions(self) -> int:
        """Videos whose motion lies within `DEGREES` of their prompt's direction."""
        pairs = zip(self.asked, self.seen, strict=True)
        return sum(seen.is_direction_of(scene) for scene, seen in pairs)

    @property
    def passed(self) -> bool:
        """All colours, and all directions but one."""
        return self.colours == len(self.asked) and self.directions >= len(self.asked) - 1

    def table(self) -> Table:
        """One row for each video."""
        table = Table(title=f"{self.colours} colours and {self.directions} directions of "
                            f"{len(self.asked)}", title_justify="left")  # fmt: skip
        for head in ("prompt", "colour", "direction off by", "pixels per frame"):
            table.add_column(head)
        for asked, seen in zip(self.asked, self.seen, strict=True):
            off = f"{seen.angle_error(asked):.0f}°"
            table.add_row(asked.prompt, seen.colour, off, f"{seen.speed:.2f}")
        return table


def check(pipe: Any, scenes: Sequence[Scene] = PROMPTS, seed: int = SEED) -> Check:
    """Generate a video for each scene with `pipe`, a `MovingShapesPipeline`, and read it back."""
    generator = torch.Generator().manual_seed(seed)
    frames = pipe([scene.prompt for scene in scenes], generator=generator).frames
    return Check(scenes, read(frames.transpose(1, 2) * 2 - 1), frames)


def main(
    model: Annotated[Path, typer.Option(help="folder of the model")] = MODEL,
) -> None:
    """Generate eight videos and read them back."""
    found = check(MovingShapesPipeline.from_pretrained(model))
    Console().print(found.table())
    raise typer.Exit(0 if found.passed else 1)


if __name__ == "__main__":
    typer.run(main)
