"""Videos and pictures for people: MP4 files, and one sheet that compares formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import imageio_ffmpeg
import torch
from PIL import Image

__all__ = ["SCALE", "contact_sheet", "enlarged", "save_gif", "save_mp4"]

SCALE = 8
"""A pixel of the model becomes a square of this many: players blur small videos."""

_FRAMES_PER_SECOND = 6
_REPEATS = 3
"""A video is over in a second; the file shows it several times."""


def enlarged(frames: torch.Tensor, scale: int = SCALE) -> torch.Tensor:
    """Frames [F, 3, H, W] in 0..1 as bytes, uint8 [F, scale H, scale W, 3]."""
    large = frames.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return (large.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).contiguous()


def save_mp4(frames: torch.Tensor, path: Path) -> None:
    """Write one video [F, 3, H, W] in 0..1 as H.264, enlarged."""
    pixels = enlarged(frames).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = imageio_ffmpeg.write_frames(
        str(path), (pixels.shape[2], pixels.shape[1]), fps=_FRAMES_PER_SECOND, quality=9
    )
    writer.send(None)
    for _ in range(_REPEATS):
        for frame in pixels:
            writer.send(frame)
    writer.close()


def save_gif(videos: Mapping[str, torch.Tensor], path: Path, scale: int = 4) -> None:
    """Write all videos as one endless GIF: a row for each format, a column for each prompt.

    Args:
        videos: name of the format -> frames [B, F, 3, H, W] in 0..1.
        path: of the GIF.
        scale: how many pixels across a pixel becomes.
    """
    edged = [torch.nn.functional.pad(v, (0, 1, 0, 1), value=1.0) for v in videos.values()]
    sheet = torch.stack(edged).permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)
    pictures = [Image.fromarray(frame.numpy()) for frame in enlarged(sheet, scale)]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=1000 // _FRAMES_PER_SECOND, loop=0
    )


def contact_sheet(
    videos: Mapping[str, torch.Tensor], prompts: Sequence[str], path: Path, shown: int = 4
) -> None:
    """One row for each prompt, `shown` frames of its video in each format side by side, as PNG.

    Args:
        videos: name of the format -> frames [B, F, 3, H, W] in 0..1.
        prompts: of the videos, B of them.
        path: of the PNG.
        shown: how many frames, evenly over the video.
    """
    from matplotlib.figure import Figure

    rows, columns = len(prompts), len(videos)
    figure = Figure(figsize=(3.6 * columns + 1.8, 1.05 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for column, (name, frames) in enumerate(videos.items()):
        times = torch.linspace(0, frames.shape[1] - 1, shown).round().long()
        for row, prompt in enumerate(prompts):
            axes = grid[row][column]
            strip = torch.nn.functional.pad(frames[row, times], (0, 1), value=1.0)
            axes.imshow(strip.permute(2, 0, 3, 1).flatten(1, 2).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[], frame_on=False)
            if row == 0:
                axes.set_title(name, fontsize=9)
            if column == 0:
                label = prompt.replace(" moves ", "\nmoves ")
                axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
