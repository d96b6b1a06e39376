"""The loss in quality of each format and each mechanism, on the small video model that ships.

Sixteen prompts and three seeds; every video is compared with the one that the 16-bit model makes
from the same noise. All formats change the same linear layers; FP8, MXFP4 and NVFP4 are emulated
there.

* ``sqnr``: one step. The velocity that the transformer predicts for a noisy drawn video, against
  the 16-bit model's, in dB; for each prompt the mean over three noise levels and all seeds.
* ``psnr``, ``ssim``: the final video, 16 steps with guidance.
* ``change``: temporal consistency, see `demo.video.metrics.frame_change_error`.
* ``vmaf``: mean over all videos, by ffmpeg's filter on the videos enlarged eight times.
* ``asked``: videos that follow their prompt: the right colour, the direction within 20 degrees.

Each mechanism is compared with its control on the same 48 videos: the mean difference in PSNR and
its 95 % interval (Student's t). A mechanism belongs into the default if that interval lies above 0.

    python -m benchmarks.video.bench_video_quality
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from diffusers_hook import SemanticDialectConfig

from ..lib.gate import golden_gate
from ..lib.harness import Table, main

PACKAGES = ("torch", "diffusers")
PROMPTS, SEEDS = 16, (0, 1, 2)
LEVELS = (0.9, 0.5, 0.1)
"""Noise levels of the one-step measurement, in the order of a generation."""

FRACTIONS = (0.05, 0.10, 0.20, 0.30)
DEFAULT = SemanticDialectConfig()

_DECOMPOSED = f"+ {DEFAULT.salient_fraction:.0%} top"
_RANDOM = f"+ {DEFAULT.salient_fraction:.0%} random"
_SEDA = f"{_DECOMPOSED}, SeDA"
_LUT = "32 dialects, lut"

CONTROLS = {
    "dialects": (_LUT, "MXFP4-32"),
    "book": (_LUT, "BlockDialect-32, two_stage"),
    "decomposition": (_DECOMPOSED, _LUT),
    "attention": (_DECOMPOSED, _RANDOM),
    "seda": (_SEDA, _DECOMPOSED),
}
"""Mechanism -> format with it, its control."""


def formats() -> dict[str, Any]:
    """Name -> `demo.video.formats.Format`; the first one is the reference."""
    from demo.video.formats import FP8, MXFP4, NVFP4, PLAIN, Format

    two_stage = {**PLAIN, "book": "dialect_fp4"}
    top = {**PLAIN, "salient_fraction": DEFAULT.salient_fraction}
    seda = {**top, "seda": True}
    found = {
        "16 bit": Format(None),
        "FP8": Format(PLAIN, FP8),
        "MXFP4-32": Format(PLAIN, MXFP4),
        "NVFP4-16": Format(PLAIN, NVFP4),
        "BlockDialect-32, two_stage": Format(two_stage),
        _LUT: Format(PLAIN),
    }
    for selection in ("top", "random", "bottom"):
        for fraction in FRACTIONS:
            options = {**PLAIN, "salient_fraction": fraction, "selection": selection}
            found[f"+ {fraction:.0%} {selection}"] = Format(options)
    found |= {
        "+ SeDA": Format({**PLAIN, "seda": True}),
        _SEDA: Format(seda),
        f"{_SEDA}, window 1 x 4 x 4": Format({**seda, "seda_window": (1, 4, 4)}),
        f"{_SEDA}, window 2 x 2 x 2": Format({**seda, "seda_window": (2, 2, 2)}),
        f"{_SEDA}, window 4 x 6 x 6": Format({**seda, "seda_window": (4, 6, 6)}),
        f"{_SEDA}, threshold 0.8": Format({**seda, "seda_threshold": 0.8}),
        f"{_SEDA}, regrouped every call": Format({**seda, "seda_refresh": 1}),
        f"{_SEDA}, grouped once": Format({**seda, "seda_refresh": 1000}),
        f"{_DECOMPOSED}, chosen every call": Format({**top, "salient_refresh": 1}),
        f"{_DECOMPOSED}, chosen once": Format({**top, "salient_refresh": 1000}),
        "MXFP4-32, W4A16": Format({**PLAIN, "activation_format": "none"}, MXFP4),
        "NVFP4-16, W4A16": Format({**PLAIN, "activation_format": "none"}, NVFP4),
        "BlockDialect-32, W4A16": Format({**two_stage, "activation_format": "none"}),
        "32 dialects, W4A16": Format({**PLAIN, "activation_format": "none"}),
    }
    return found


def measure() -> dict[str, Any]:
    """Per format the figures video by video; per mechanism its gain and whether it helps."""
    from rich.progress import track

    from demo.video.metrics import follow_prompts, frame_change_error, psnr, sqnr, ssim, vmaf

    scenes = _scenes()
    wanted: list[torch.Tensor] = []
    wanted_steps: list[torch.Tensor] = []
    measured: dict[str, Any] = {}
    console = Console(stderr=True)
    for name, format in track(formats().items(), "formats", console=console):
        frames, steps = _generate(format, scenes)
        if not wanted:
            wanted, wanted_steps = frames, steps
        pairs = list(zip(frames, wanted, strict=True))
        row: dict[str, Any] = {
            "asked": sum(sum(follow_prompts(part, scenes)) for part in frames),
            "videos": len(scenes) * len(SEEDS),
        }
        if format.options is not None:
            levels = [sqnr(a, b) for a, b in zip(steps, wanted_steps, strict=True)]
            row |= {
                "sqnr": [statistics.mean(level) for level in zip(*levels, strict=True)],
                "psnr": [value for pair in pairs for value in psnr(*pair)],
                "ssim": [value for pair in pairs for value in ssim(*pair)],
                "change": [value for pair in pairs for value in frame_change_error(*pair)],
                "vmaf": vmaf(torch.cat(frames), torch.cat(wanted)),
            }
        measured[name] = row
    gains = {
        mechanism: {"with": name, "control": control,
                    **gain(measured[name]["psnr"], measured[control]["psnr"])}
        for mechanism, (name, control) in CONTROLS.items()
    }  # fmt: skip
    return {
        "formats": measured,
        "gains": gains,
        "include_in_default": {mechanism: found["low"] > 0 for mechanism, found in gains.items()},
    }


def gain(ours: list[float], control: list[float]) -> dict[str, float]:
    """Mean paired difference in dB and its 95 % interval, by Student's t."""
    from scipy.stats import t

    differences = [a - b for a, b in zip(ours, control, strict=True)]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = float(t.ppf(0.975, len(differences) - 1)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _scenes() -> list[Any]:
    from demo.video.scenes import random_scenes

    return random_scenes(PROMPTS, torch.Generator().manual_seed(16))


def _generate(format: Any, scenes: list[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Videos [16, F, 3, H, W] of each seed, and one velocity for each seed and noise level."""
    from demo.video.formats import load
    from demo.video.scenes import draw

    videos, velocities = [], []
    prompts = [scene.prompt for scene in scenes]
    words = torch.tensor([scene.words for scene in scenes])
    for seed in SEEDS:
        pipe = load(format)
        pipe.set_progress_bar_config(disable=True)
        videos.append(pipe(prompts, generator=torch.Generator().manual_seed(seed)).frames)
        pipe = load(format)  # with no memory of another video
        dice = torch.Generator().manual_seed(1000 + seed)
        clean = draw(scenes, dice)
        noise = torch.randn(clean.shape, generator=dice)
        for level in LEVELS:
            noisy = ((1 - level) * clean + level * noise).to(pipe.transformer.dtype)
            times = torch.full((len(scenes),), 1000 * level)
            with torch.no_grad(), pipe.transformer.cache_context("cond"):
                velocity = pipe.transformer(noisy, times, pipe.text_encoder(words)).sample
            velocities.append(velocity.float())
    return videos, velocities


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``formats``: all of them; ``short``: those of the README; ``gains``: mechanisms."""
    rows = {name: _row(name, row) for name, row in figures["formats"].items()}
    head = ["format", "one step, SQNR", "PSNR", "SSIM", "change error", "VMAF", "follow the prompt"]
    short = ["16 bit", "FP8", "MXFP4-32", "NVFP4-16", "BlockDialect-32, two_stage", _LUT,
             _DECOMPOSED, _SEDA]  # fmt: skip
    gains = [["mechanism", "with", "control", "PSNR gained", "95 % interval", "in the default"]]
    for mechanism, row in figures["gains"].items():
        included = figures["include_in_default"][mechanism]
        gains.append(
            [
                mechanism,
                row["with"],
                row["control"],
                f"{row['mean']:+.2f} dB",
                f"{row['low']:+.2f} … {row['high']:+.2f} dB",
                "yes" if included else "no",
            ]
        )
    return {
        "formats": [head, *rows.values()],
        "short": [head, *(rows[name] for name in short)],
        "gains": gains,
    }


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    asked = f"{row['asked']} of {row['videos']}"
    if "psnr" not in row:
        return [name, "–", "–", "–", "–", "–", asked]
    return [
        name,
        f"{_spread(row['sqnr'], 1)} dB",
        f"{_spread(row['psnr'], 1)} dB",
        _spread(row["ssim"], 3),
        f"{_spread(row['change'], 2)} %",
        "–" if row["vmaf"] is None else f"{row['vmaf']:.1f}",
        asked,
    ]


def _spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over the videos; of ``sqnr`` over the prompts."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def plots(figures: dict[str, Any]) -> dict[str, Figure]:
    """``psnr``: the final videos of all formats; the bar is the standard error."""
    found = {name: row["psnr"] for name, row in figures["formats"].items() if "psnr" in row}
    figure = Figure(figsize=(8, 0.26 * len(found) + 0.9), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(found.values()):
        error = statistics.stdev(values) / math.sqrt(len(values))
        axes.errorbar(statistics.mean(values), place, xerr=error, fmt="o", markersize=4, color="C0")
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("PSNR of the final video against 16 bit, dB")
    axes.grid(alpha=0.3)
    return {"psnr": figure}


if __name__ == "__main__":
    main(golden_gate, measure)
