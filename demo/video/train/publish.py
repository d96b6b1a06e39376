"""Make the video model's folder, its card and the loss curve from the last checkpoint.

`python -m demo.video.train.publish` writes `demo/video/model/` (weights in bfloat16, model card)
and `loss.csv`, `loss.png` and `run.json` beside this file. This script measures every
figure in the card.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging

from ...training import render_card, write_record
from ..check import SEED, check
from ..pictures import contact_sheet
from ..pipeline import MODEL, MovingShapesPipeline
from ..scenes import ASPECTS, DEGREES, FRAMES, SIZE, draw
from .train import CACHE, SHAPE, Recipe, averaged_model

HERE = Path(__file__).resolve().parent
SHEET = "videos.png"


def export(cache: Path, out: Path) -> dict[str, Any]:
    """Write the averaged weights of the run in `cache` to `out` in bfloat16; its progress."""
    model, progress = averaged_model(cache)
    # diffusers warns that it keeps some weights in float32; so does loading, from these files
    logging.set_verbosity_error()
    pipe = MovingShapesPipeline(
        model.transformer.to(torch.bfloat16),
        model.text_encoder.to(torch.bfloat16),
        FlowMatchEulerDiscreteScheduler(shift=Recipe(**progress["recipe"]).shift),
    )
    pipe.save_pretrained(out)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes its file readable by its owner alone
    return progress


def plot(curve: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss over the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in curve], [row["loss"] for row in curve], linewidth=1)
    axes.set(xlabel="step", ylabel="mean squared error of the velocity", yscale="log")
    axes.set_title("Video model: loss")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def card(run: dict[str, Any]) -> str:
    """The model card, as Markdown, from what `run.json` holds."""
    recipe, model, seen = run["recipe"], run["model"], run["check"]
    rows = [
        ("weights", f"{model['weights']:,}, bfloat16, {model['bytes']:,} bytes"),
        ("class", f"diffusers' `WanTransformer3DModel`: {SHAPE['num_layers']} blocks, "
                  f"{SHAPE['num_attention_heads']} heads of {SHAPE['attention_head_dim']}, "
                  f"feed-forward {SHAPE['ffn_dim']}, patches {SHAPE['patch_size']}"),
        ("videos", f"{FRAMES} frames of {SIZE} x {SIZE} pixels, no VAE"),
        ("training", f"{run['steps']:,} steps of {recipe['batch']} videos, "
                     f"{run['seconds'] / 60:.0f} minutes on one core with other work beside it"),
        ("optimizer", f"Muon (rate {recipe['muon_rate']}) for the blocks' matrices, AdamW "
                      f"({recipe['adamw_rate']}) for the rest; moving average of the weights "
                      f"({recipe['average_decay']})"),
        ("seed", recipe["seed"]),
        ("versions", ", ".join(f"{name} {value}" for name, value in run["versions"].items())),
        ("last training loss", f"{run['loss']:.4f}"),
        ("check, seed " + str(seen["seed"]),
         f"**{seen['colours']} of {seen['videos']}** in the right colour, **{seen['directions']} "
         f"of {seen['videos']}** within {DEGREES:.0f} degrees of the right direction"),
    ]  # fmt: skip
    return render_card(HERE / "card.md.jinja", rows=rows, aspects=ASPECTS, sheet=SHEET)


def main(
    cache: Annotated[Path, typer.Option(help="where train.py put its checkpoint")] = CACHE,
    out: Annotated[Path, typer.Option(help="the model folder")] = MODEL,
) -> None:
    """Write model, card and loss curve."""
    progress = export(cache, out)
    pipe = MovingShapesPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    found = check(pipe)
    run = {
        "recipe": progress["recipe"],
        "versions": progress["versions"],
        "steps": progress["step"],
        "seconds": round(progress["seconds"]),
        "loss": progress["curve"][-1]["loss"],
        "model": {
            "weights": sum(p.numel() for part in (pipe.transformer, pipe.text_encoder)
                           for p in part.parameters()),
            "bytes": sum(path.stat().st_size for path in out.rglob("*.safetensors")),
        },
        "check": {
            "seed": SEED,
            "videos": len(found.asked),
            "colours": found.colours,
            "directions": found.directions,
            "seen": [asdict(reading) for reading in found.seen],
        },
    }  # fmt: skip
    write_record(HERE, run, progress["curve"])
    plot(progress["curve"], HERE / "loss.png")
    drawn = draw(list(found.asked), torch.Generator().manual_seed(SEED))
    contact_sheet(
        {"generated": found.frames, "drawn, at another place": (drawn.transpose(1, 2) + 1) / 2},
        [scene.prompt for scene in found.asked],
        out / SHEET,
    )
    (out / "README.md").write_text(card(run), encoding="utf-8")
    print(f"{found.colours} colours and {found.directions} directions of {len(found.asked)}; "
          f"{out.name} is complete")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
