"""What `make video` runs: the same prompts in 16 bit, MXFP4 and SemanticDialect.

    python -m demo.video.run [--prompt "a red circle moves up, fast" ...] [--out DIR]

The model is the small video transformer that ships with the project. MXFP4 is emulated in the same
layers; an emulation's time would say nothing, so none is shown.
"""

from __future__ import annotations

import itertools
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..terminal import shown
from .check import PROMPTS
from .formats import MXFP4, PLAIN, Format, load, transformer_bytes
from .metrics import follow_prompts, psnr, ssim
from .pictures import contact_sheet, save_gif, save_mp4
from .pipeline import MODEL
from .scenes import parse

OUT = Path(__file__).resolve().parents[2] / "outputs" / "video"
FORMATS = {
    "16 bit": Format(None),
    "MXFP4": Format(PLAIN, MXFP4),
    "SemanticDialect": Format(),
}


@dataclass(frozen=True)
class Row:
    """One format's figures.

    Attributes:
        name: the format.
        frames: the videos, [B, F, 3, H, W] in 0..1.
        bytes: of the transformer's weights.
        seconds: a denoising step of all prompts together, the median; None for an emulation.
        psnr, ssim: mean against the 16-bit model's videos; None for itself.
        good: videos that show the colour and the direction of their prompt.
    """

    name: str
    frames: torch.Tensor
    bytes: int
    seconds: float | None
    psnr: float | None
    ssim: float | None
    good: int


def run(
    prompts: list[str], seed: int, steps: int, out: Path, console: Console, model: Path = MODEL
) -> list[Row]:
    """Generate the prompts in every format, with progress bars, and write videos and pictures.

    Args:
        prompts: each names a colour, a shape, a direction and a speed.
        seed: of the noise, the same in every format.
        steps: denoising steps.
        out: folder for ``FORMAT/PROMPT.mp4``, ``comparison.png`` and ``comparison.gif``.
        console: for progress messages.
        model: folder of the model.

    Raises:
        ValueError: if a prompt lacks one of the four words, before anything is generated.
    """
    scenes = [parse(prompt) for prompt in prompts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    for number, (name, format) in enumerate(FORMATS.items(), start=1):
        console.print(f"{number}/{len(FORMATS)} {name}")
        pipe = load(format, model, device)
        pipe.set_progress_bar_config(desc="  denoising", disable=not console.is_terminal)
        generator = torch.Generator().manual_seed(seed)
        ends = [time.perf_counter()]
        frames = pipe(
            prompts,
            num_inference_steps=steps,
            generator=generator,
            callback_on_step_end=lambda *_, ends=ends: ends.append(time.perf_counter()),
        ).frames.cpu()
        wanted = rows[0].frames if rows else None
        rows.append(
            Row(
                name,
                frames,
                transformer_bytes(pipe, format),
                _median_difference(ends) if format.emulated is None else None,
                None if wanted is None else _mean(psnr(frames, wanted)),
                None if wanted is None else _mean(ssim(frames, wanted)),
                sum(follow_prompts(frames, scenes)),
            )
        )
        folder = re.sub(r"\W+", "-", name.lower())
        for prompt, video in zip(prompts, frames, strict=True):
            save_mp4(video, out / folder / f"{_slug(prompt)}.mp4")
        if format.options is not None and format.emulated is None:
            console.print(str(pipe.semantic_dialect_summary()), highlight=False)
    contact_sheet({row.name: row.frames for row in rows}, prompts, out / "comparison.png")
    save_gif({row.name: row.frames for row in rows}, out / "comparison.gif")
    return rows


def figures_table(rows: list[Row], prompts: int) -> Table:
    """Quality, memory and time of every format."""
    table = Table(title=f"{prompts} videos", title_justify="left")
    table.add_column("format")
    for head in ("MB", "of 16 bit", "PSNR", "SSIM", "follow the prompt", "s/step"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bytes / 1e6:.2f}",
            f"{row.bytes / rows[0].bytes:.2f} x",
            "" if row.psnr is None else f"{row.psnr:.1f} dB",
            "" if row.ssim is None else f"{row.ssim:.3f}",
            f"{row.good} of {prompts}",
            "emulated" if row.seconds is None else f"{row.seconds:.2f}",
        )
    return table


def _median_difference(times: list[float]) -> float:
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")


def main(
    prompt: Annotated[
        list[str] | None, typer.Option(help="prompt of a video; may be given several times")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    steps: Annotated[int, typer.Option(help="denoising steps", min=1)] = 16,
    out: Annotated[Path, typer.Option(help="folder for videos and the picture")] = OUT,
) -> None:
    """Generate the same prompts in 16 bit, MXFP4 and SemanticDialect and compare them."""
    console = Console()
    prompts = prompt or [scene.prompt for scene in PROMPTS]
    try:
        rows = run(prompts, seed, steps, out, console)
    except ValueError as error:
        console.print(f"[red]{error}", highlight=False)
        raise typer.Exit(2) from None
    console.print(figures_table(rows, len(prompts)))
    console.print(
        "PSNR and SSIM: against the 16-bit videos from the same noise. A video follows its prompt "
        "if its colour is right and its direction is within 20 degrees.\nA small model on a CPU "
        "says nothing about speed on a GPU."
    )
    console.print(f"videos and comparison.png are in {shown(out)}")


if __name__ == "__main__":
    typer.run(main)
