"""SeDA and saliency judged by their own aims, on the small video model that ships.

Groups are made in several ways; each is measured on the same videos as 10 % salient tokens without
groups, none of whose prompts and seeds chose a threshold here. 16 steps with guidance.

* *Alike*: the mean cosine of grouped tokens and their anchors, beside that of any two tokens.
* *Errors apart*: how far the rounding errors of a token and its anchor are apart, in percent of the
  tokens, where each token chooses its dialects alone and where the group shares sub-formatbooks.
  Groups reach their aim if the second is smaller.
* PSNR against the 16-bit model's video, and the change error of
  `demo.video.metrics.frame_change_error`: paired mean differences with their standard errors.

*Residuals of single blocks* takes the place of salient tokens: as many blocks have a residual, each
chosen by what its rounding error does to the layer's output.

*Recall* is the share of the tokens with the most received attention, by all queries, that are among
the salient ones, in the call that chose them and in later ones.

    python -m benchmarks.video.bench_video_groups
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from ..lib.gate import golden_gate
from ..lib.harness import Table, main

PACKAGES = ("torch", "diffusers")
PROMPTS, SEEDS, STEPS = 5, (40, 41), 16
_SCENES, _SHARE = 41, 0.10

CONTROL, BLOCKS = "no groups", "residuals of single blocks, no groups"
_MEANS = ("likeness", "of_any", "alone", "together")


def ways() -> dict[str, Callable[[Any], Any]]:
    """Name -> function from the `Aims` of a run to the context in which it generates."""
    from .groupings import alike, in_force, in_place, rows_of, with_floor
    from .residuals import of_single_blocks

    return {
        CONTROL: lambda _: in_force(None),
        "attention to the anchor (SeDA as it is)": lambda _: in_force(None),
        "and at least 4 times even attention": lambda _: in_force(with_floor(4)),
        "rows of attention alike, cosine 0.9": lambda _: in_force(alike(rows_of, 0.9)),
        "inputs of the block alike, cosine 0.9": lambda a: in_force(alike(a.block_input, 0.9)),
        "the same place in 2 frames": lambda _: in_force(in_place(2)),
        "2 x 2 places of a frame": lambda _: in_force(in_place(1, 2)),
        BLOCKS: lambda _: of_single_blocks(_SHARE),
    }


def measure() -> dict[str, Any]:
    """Per way what its groups are like, and the videos beside those of the 16-bit model."""
    from rich.progress import track

    from demo.video.formats import PLAIN, Format
    from demo.video.metrics import frame_change_error, psnr
    from demo.video.scenes import random_scenes

    scenes = random_scenes(PROMPTS, torch.Generator().manual_seed(_SCENES))
    prompts = [scene.prompt for scene in scenes]
    salient = {**PLAIN, "salient_fraction": _SHARE}
    wanted, _ = _generate(Format(None), prompts, ways()[CONTROL])
    found: dict[str, Any] = {}
    for name, way in track(ways().items(), "ways", console=Console(stderr=True)):
        format = Format({**salient, "seda": name not in (CONTROL, BLOCKS)})
        frames, aims = _generate(format, prompts, way)
        found[name] = {
            "psnr": psnr(frames, wanted),
            "change": frame_change_error(frames, wanted),
            **aims,
        }
    return {"steps": STEPS, "ways": found}


def _generate(
    format: Any, prompts: list[str], way: Callable[[Any], Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The videos [B, F, 3, H, W] of all seeds, and what was measured of the format's aims."""
    from demo.video.formats import load

    from .consistency import Aims, watched

    frames, aims = [], Aims()
    for seed in SEEDS:
        pipe = load(format)
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed)}
        if format.options is None:
            frames.append(pipe(prompts, **call).frames)
            continue
        with watched(pipe.transformer, aims), way(aims):
            frames.append(pipe(prompts, **call).frames)
    return torch.cat(frames), _means(aims)


def _means(aims: Any) -> dict[str, Any]:
    """The means over blocks and calls."""
    each = [asdict(one) for one in aims.consistencies]
    means = {name: statistics.mean(one[name] for one in each) for name in _MEANS if each}
    return means | {
        "grouped": statistics.mean(aims.grouped) if aims.grouped else 0.0,
        "recall": {str(age): statistics.mean(aims.recalls[age]) for age in sorted(aims.recalls)},
    }


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``groups``: all ways; ``recall``: of the salient tokens without groups."""
    found = figures["ways"]
    head = ["groups", "tokens with an anchor", "alike / any two", "errors apart, alone",
            "errors apart, together", "PSNR", "change error"]  # fmt: skip
    rows = [
        [
            name,
            *_groups_of(row),
            _paired(row["psnr"], found[CONTROL]["psnr"], "dB"),
            _paired(row["change"], found[CONTROL]["change"], "%"),
        ]
        for name, row in found.items()
        if name != CONTROL
    ]
    recalls = found[CONTROL]["recall"]
    return {
        "groups": [head, *rows],
        "recall": [
            ["attention calls since the choice", *recalls],
            ["recall", *(f"{value:.2f}" for value in recalls.values())],
        ],
    }


def _groups_of(row: dict[str, Any]) -> list[str]:
    """The cells about a way's groups."""
    if "likeness" not in row:
        return ["–"] * 4
    return [
        f"{row['grouped']:.0%}",
        f"{row['likeness']:.2f} / {row['of_any']:.2f}",
        f"{row['alone']:.2%}",
        f"{row['together']:.2%}",
    ]


def _paired(values: list[float], control: list[float], unit: str) -> str:
    """The mean difference and its standard error."""
    differences = [a - b for a, b in zip(values, control, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.2f} ± {error:.2f} {unit}"


if __name__ == "__main__":
    main(golden_gate, measure)
