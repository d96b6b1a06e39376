"""Moving shapes: the words of a prompt, how they are drawn, and how a video is read back.

A scene is one shape in one colour that crosses the frame along a straight line. Four words of a
prompt decide it; everything else (where the line lies, how large the shape is) is chance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = [
    "ASPECTS",
    "COLOURS",
    "DEGREES",
    "DIRECTIONS",
    "FRAMES",
    "SHAPES",
    "SIZE",
    "SPEEDS",
    "WORDS",
    "Reading",
    "Scene",
    "draw",
    "parse",
    "random_scenes",
    "read",
]

FRAMES = 8
SIZE = 24  # pixels, both ways

COLOURS = {
    "red": (1.0, -0.8, -0.8),
    "green": (-0.8, 0.8, -0.8),
    "blue": (-0.7, -0.5, 1.0),
    "yellow": (1.0, 0.9, -0.8),
    "magenta": (1.0, -0.8, 1.0),
    "cyan": (-0.8, 0.9, 1.0),
}
"""RGB in -1..1, the range of all videos here."""

SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
"""Multiples of 45 degrees, counter-clockwise."""

SPEEDS = {"slowly": 0.9, "fast": 1.7}
"""Pixels per frame."""

ASPECTS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "speed": tuple(SPEEDS),
}
WORDS = ("", *(word for words in ASPECTS.values() for word in words))
"""The model's vocabulary; word 0 stands for "anything"."""

DEGREES = 20.0
"""A motion follows a direction if it is at most this far from it."""

_BACKGROUND, _SHADING = -0.6, -0.15
_FOUND = 0.35  # how far from the background a pixel of the shape lies at least


@dataclass(frozen=True)
class Scene:
    """The content of a prompt: one word of each aspect."""

    colour: str
    shape: str
    direction: str
    speed: str

    @property
    def prompt(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction}, {self.speed}"

    @property
    def words(self) -> list[int]:
        """Four positions in `WORDS`, in the order of `ASPECTS`."""
        return [WORDS.index(getattr(self, aspect)) for aspect in ASPECTS]

    @property
    def angle(self) -> float:
        """Where the shape goes, degrees counter-clockwise from the right."""
        return 45.0 * DIRECTIONS.index(self.direction)


def parse(prompt: str) -> Scene:
    """The scene that a prompt describes; other words are free.

    Raises:
        ValueError: if it does not hold exactly one word of each aspect.
    """
    written = re.findall(r"[a-z]+(?:-[a-z]+)?", prompt.lower())
    found = {}
    for aspect, words in ASPECTS.items():
        named = [word for word in written if word in words]
        if len(named) != 1:
            raise ValueError(
                f"prompt: {prompt!r} names {' and '.join(named) or 'no ' + aspect}; it must name "
                f"one {aspect} of {', '.join(words)}, for example {Scene(*_EXAMPLE).prompt!r}"
            )
        found[aspect] = named[0]
    return Scene(**found)


_EXAMPLE = ("red", "circle", "up-right", "fast")


def random_scenes(count: int, generator: torch.Generator) -> list[Scene]:
    """Scenes whose words are drawn independently."""
    choices = [
        torch.randint(len(words), (count,), generator=generator) for words in ASPECTS.values()
    ]
    rows = zip(*choices, strict=True)
    return [
        Scene(*(words[int(i)] for words, i in zip(ASPECTS.values(), row, strict=True)))
        for row in rows
    ]


def draw(scenes: Sequence[Scene], generator: torch.Generator) -> torch.Tensor:
    """Videos of the scenes, float32 [B, 3, FRAMES, SIZE, SIZE] in -1..1.

    Place and size of each shape come from `generator`; edges are smoothed over one pixel.
    """
    count = len(scenes)
    middle = SIZE / 2 + 5 * (torch.rand(count, 2, generator=generator) - 0.5)
    radius = (3.2 + torch.rand(count, generator=generator))[:, None, None, None]
    angle = torch.tensor([math.radians(scene.angle) for scene in scenes])
    speed = torch.tensor([SPEEDS[scene.speed] for scene in scenes])
    x, y = _pixels()
    along = speed[:, None] * _times()
    right = x - (middle[:, :1] + torch.cos(angle)[:, None] * along)[:, :, None, None]
    down = y - (middle[:, 1:] - torch.sin(angle)[:, None] * along)[:, :, None, None]
    inside = torch.stack(
        [
            radius - torch.sqrt(right**2 + down**2),
            0.88 * radius - torch.maximum(right.abs(), down.abs()),
            torch.minimum(0.75 * radius - down, (down + 1.15 * radius - 1.75 * right.abs()) / 2),
        ],
        dim=1,
    )[range(count), [SHAPES.index(scene.shape) for scene in scenes]]
    share = (inside + 0.5).clamp(0, 1)[:, None]  # [B, 1, F, H, W]
    colour = torch.tensor([COLOURS[scene.colour] for scene in scenes])[:, :, None, None, None]
    background = _BACKGROUND + _SHADING * y / SIZE
    return share * colour + (1 - share) * background


@dataclass(frozen=True)
class Reading:
    """Colour and motion in one video.

    Attributes:
        colour: the nearest of `COLOURS`.
        angle: of the motion, degrees counter-clockwise from the right, -180..180.
        speed: pixels per frame.
    """

    colour: str
    angle: float
    speed: float

    def angle_error(self, scene: Scene) -> float:
        """Degrees between the motion and the direction of `scene`, 0..180."""
        return abs((self.angle - scene.angle + 180) % 360 - 180)

    def is_colour_of(self, scene: Scene) -> bool:
        """Whether the shape has the colour of `scene`."""
        return self.colour == scene.colour

    def is_direction_of(self, scene: Scene) -> bool:
        """Whether the motion is within `DEGREES` of the direction of `scene`."""
        return self.angle_error(scene) <= DEGREES


def read(videos: torch.Tensor) -> list[Reading]:
    """Colour and motion of the shape in each video, without knowing the prompt.

    The shape is whatever stands out from a frame's median; its motion is the line fitted to its
    centres of mass, its colour the weighted mean over all frames.

    Args:
        videos: float32 [B, 3, F, H, W] in -1..1.
    """
    background = videos.flatten(3).median(-1).values[..., None, None]
    weight = ((videos - background).abs().amax(1) - _FOUND).clamp(min=0)  # [B, F, H, W]
    total = weight.sum((-1, -2)).clamp(min=1e-6)
    x, y = _pixels()
    times = _times(videos.shape[2])
    right = ((weight * x).sum((-1, -2)) / total * times).sum(1) / (times**2).sum()
    up = -((weight * y).sum((-1, -2)) / total * times).sum(1) / (times**2).sum()
    colour = (videos * weight[:, None]).sum((2, 3, 4)) / total.sum(1, keepdim=True)
    nearest = torch.cdist(colour, torch.tensor(list(COLOURS.values()))).argmin(-1)
    return [
        Reading(
            list(COLOURS)[int(nearest[i])],
            math.degrees(math.atan2(float(up[i]), float(right[i]))),
            math.hypot(float(up[i]), float(right[i])),
        )
        for i in range(len(videos))
    ]


def _pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of the pixels' middles, each [SIZE, SIZE]."""
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    return x, y


def _times(frames: int = FRAMES) -> torch.Tensor:
    """Frames counted from the middle of the video."""
    return torch.arange(frames) - (frames - 1) / 2
