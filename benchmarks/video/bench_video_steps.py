"""Protected denoising steps on the small video model that ships: what they gain, and at what cost.

Sixteen prompts and two seeds, none of which chose the rule of ``protected_steps="auto"``; every
video is compared with the one that the 16-bit model makes from the same noise, 16 steps with
guidance. Each format is compared on the same 32 videos with dialects alone and with 10 % salient
tokens: the mean difference in PSNR and its 95 % interval (Student's t).

*Another step* is a control: as many rows as ``"auto"``, in a step drawn for each seed among the
others.

    python -m benchmarks.video.bench_video_steps
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from diffusers_hook.model.attach import attached

from ..lib.gate import golden_gate
from ..lib.harness import Table, main
from .bench_video_quality import gain

PACKAGES = ("torch", "diffusers")
PROMPTS, SEEDS = 16, (20, 21)
STEPS = 16
_SCENES, _DRAWS = 21, 5

ALONE = "dialects alone"
SALIENT = "10 % salient tokens"
ANOTHER = "another step, decomposed"


def formats() -> dict[str, Any]:
    """Name -> `demo.video.formats.Format`; the first one is the reference."""
    from demo.video.formats import PLAIN, Format

    auto = {"protected_steps": "auto"}
    salient = {"salient_fraction": 0.10}
    return {
        "16 bit": Format(None),
        ALONE: Format(PLAIN),
        SALIENT: Format({**PLAIN, **salient}),
        "auto, decomposed": Format({**PLAIN, **auto}),
        ANOTHER: Format({**PLAIN, "protected_steps": [0]}),
        "auto, fp8": Format({**PLAIN, **auto, "protected_format": "fp8"}),
        "auto, decomposed, and 10 % salient tokens": Format({**PLAIN, **auto, **salient}),
        "first and last block in 16 bit": Format(
            {**PLAIN, "ignore": [r"re:blocks\.0\.", r"re:blocks\.5\."]}
        ),
        "rotation": Format({**PLAIN, "rotation": "hadamard_32"}),
    }


def measure() -> dict[str, Any]:
    """Per format its videos' PSNR, its cost, and its gains over the two plain formats."""
    from rich.progress import track

    from demo.video.metrics import psnr
    from demo.video.scenes import random_scenes

    scenes = random_scenes(PROMPTS, torch.Generator().manual_seed(_SCENES))
    prompts = [scene.prompt for scene in scenes]
    wanted: list[torch.Tensor] = []
    measured: dict[str, Any] = {}
    console = Console(stderr=True)
    for name, format in track(formats().items(), "formats", console=console):
        made = list(_generate(name, format, prompts))
        frames = [found for found, _ in made]
        wanted = wanted or frames
        if format.options is None:
            continue
        pairs = zip(frames, wanted, strict=True)
        row: dict[str, Any] = {"psnr": [value for pair in pairs for value in psnr(*pair)]}
        row |= {key: [cost[key] for _, cost in made] for key in made[0][1]}
        for key, control in (("over_alone", ALONE), ("over_salient", SALIENT)):
            if control in measured:
                row[key] = gain(row["psnr"], measured[control]["psnr"])
        measured[name] = row
    return {"steps": STEPS, "formats": measured}


def _generate(
    name: str, format: Any, prompts: list[str]
) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Of each seed the videos [16, F, 3, H, W] and what the format cost."""
    from demo.video.formats import Format, load

    dice, protected = torch.Generator().manual_seed(_DRAWS), _protected(load(formats()[ALONE]))
    for seed in SEEDS:
        if name == ANOTHER:
            others = [step for step in range(STEPS) if step not in protected]
            drawn = others[int(torch.randint(len(others), (), generator=dice))]
            format = Format({**format.options, "protected_steps": [drawn]})
        pipe = load(format)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        frames = pipe(prompts, num_inference_steps=STEPS, generator=generator).frames
        yield frames, {} if format.options is None else _cost(pipe)


def _protected(pipe: Any) -> frozenset[int]:
    """The steps that `auto` protects with the pipeline's scheduler."""
    from diffusers_hook import SemanticDialectConfig
    from diffusers_hook.tokens.protection import Protection

    pipe.scheduler.set_timesteps(STEPS)
    return Protection.of(SemanticDialectConfig(protected_steps="auto"), pipe.scheduler).steps


def _cost(pipe: Any) -> dict[str, Any]:
    """The format's protected steps, additional rows, calls in FP8 and layers in 4 bit."""
    [found] = pipe.semantic_dialect_summary().transformers
    hook = attached(pipe.transformer)
    assert hook is not None
    in_fp8 = hook.config.protected_format == "fp8"
    return {
        "protected": sorted(hook.state.generation.protection.steps),
        "additional_rows": found.salient_share,
        "calls_in_fp8": found.protected_calls / found.calls if in_fp8 else 0.0,
        "layers": found.layers,
    }


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``gains``: all formats."""
    head = ["format", "protected steps", "cost", "PSNR", "over dialects alone",
            "over 10 % salient tokens"]  # fmt: skip
    layers = figures["formats"][ALONE]["layers"][0]
    return {
        "gains": [
            head,
            *(
                [
                    name,
                    ", ".join(str(step) for step in _distinct(row["protected"])) or "–",
                    _cost_of(row, layers),
                    f"{statistics.mean(row['psnr']):.2f} dB",
                    _gained(row, "over_alone"),
                    _gained(row, "over_salient"),
                ]
                for name, row in figures["formats"].items()
            ),
        ]
    }


def _distinct(protected: list[list[int]]) -> list[int]:
    """The protected steps of all seeds, each once, in the order of the seeds."""
    return list(dict.fromkeys(step for steps in protected for step in steps))


def _cost_of(row: dict[str, Any], layers: int) -> str:
    """The cost beside that of dialects alone."""
    rows, fp8 = statistics.mean(row["additional_rows"]), statistics.mean(row["calls_in_fp8"])
    parts = [f"{rows:.1%} more rows"] if rows else []
    parts += [f"{fp8:.1%} of calls in W4A8"] if fp8 else []
    left = layers - row["layers"][0]
    parts += [f"{left} of {layers} layers in 16 bit"] if left else []
    return ", ".join(parts) or "–"


def _gained(row: dict[str, Any], key: str) -> str:
    found = row.get(key)
    if found is None:
        return "–"
    return f"{found['mean']:+.2f} dB ({found['low']:+.2f} … {found['high']:+.2f})"


if __name__ == "__main__":
    main(golden_gate, measure)
