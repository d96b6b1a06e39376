"""Train the small video model: `python -m demo.video.train.train`.

Flow matching: noise ``z`` and a drawn video ``x`` are mixed to ``(1 - t) x + t z``, and the
transformer learns the velocity ``z - x``. Every batch depends on the seed and the step alone, so a
run can be stopped at any time and resumed. Nothing outside the cache folder is written: when
training is over, `python -m demo.video.train.publish` makes the model folder.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import WanTransformer3DModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ...training import Checkpoint, Optimizers, update, versions
from ..pipeline import WordEmbedder
from ..scenes import draw, random_scenes

__all__ = ["CACHE", "Recipe", "VideoModel", "averaged_model"]

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "video"
TEXT_WIDTH = 64
SHAPE = {
    "patch_size": (2, 4, 4),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 6,
    "rope_max_seq_len": 32,
}
LOG_STEPS = 25
SAVE_STEPS = 100
VERSIONS = versions("torch", "diffusers")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights.

    Attributes:
        steps: length of the run.
        batch: videos in a step.
        warmup_steps: over which the learning rates rise.
        fall_share: part of the run over which they fall, to a fiftieth.
        muon_rate: for the matrices of the transformer's blocks.
        adamw_rate: for the rest.
        average_decay: of the moving average of the weights, which is what ships.
        unprompted: share of videos that are learned without their words, for guidance.
        shift: noise levels lie halfway between a logistic normal and the same shifted by this.
        seed: of weights, scenes and noise.
    """

    steps: int = 2000
    batch: int = 16
    warmup_steps: int = 50
    fall_share: float = 0.4
    muon_rate: float = 2e-2
    adamw_rate: float = 2e-3
    average_decay: float = 0.995
    unprompted: float = 0.1
    shift: float = 3.0
    gradient_clip: float = 1.0
    seed: int = 20260102


class VideoModel(torch.nn.Module):
    """Transformer and word vectors, which are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = WanTransformer3DModel(**SHAPE)
        self.text_encoder = WordEmbedder(width=TEXT_WIDTH)

    def forward(self, x: torch.Tensor, t: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """The velocity at x [B, 3, F, H, W] and noise level t [B] in 0..1."""
        velocity: torch.Tensor = self.transformer(x, t * 1000, self.text_encoder(words)).sample
        return velocity


def share_at(recipe: Recipe, step: int) -> float:
    """Share of the full learning rates that is used at `step`: up, level, then down."""
    left = (recipe.steps - step) / (recipe.steps * recipe.fall_share)
    return min(1.0, (step + 1) / recipe.warmup_steps, max(0.02, left))


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        noisy: float32 [B, 3, F, H, W].
        level: share of noise, float32 [B] in 0..1.
        words: int64 [B, 4].
        velocity: float32, as `noisy`; what is to be predicted.
    """

    noisy: torch.Tensor
    level: torch.Tensor
    words: torch.Tensor
    velocity: torch.Tensor


def batch_at(recipe: Recipe, step: int) -> Batch:
    """The batch of a step."""
    dice = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    scenes = random_scenes(recipe.batch, dice)
    videos = draw(scenes, dice)
    noise = torch.randn(videos.shape, generator=dice)
    level = torch.sigmoid(0.5 + torch.randn(recipe.batch, generator=dice))
    shifted = recipe.shift * level / (1 + (recipe.shift - 1) * level)
    level = (level + shifted) / 2
    words = torch.tensor([scene.words for scene in scenes])
    words[torch.rand(recipe.batch, generator=dice) < recipe.unprompted] = 0
    share = level[:, None, None, None, None]
    return Batch((1 - share) * videos + share * noise, level, words, noise - videos)


def new_optimizers(model: VideoModel, recipe: Recipe) -> Optimizers:
    """Muon for the matrices of the blocks, AdamW for the rest, each with its full rate."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        in_block = name.startswith("transformer.blocks.") and parameter.ndim == 2
        (matrices if in_block else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=recipe.muon_rate, momentum=0.95, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=recipe.adamw_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [(muon, recipe.muon_rate), (adamw, recipe.adamw_rate)]


def take_step(
    model: VideoModel,
    optimizers: Optimizers,
    recipe: Recipe,
    step: int,
) -> float:
    """One update; the loss before it. Products of matrices run in bfloat16."""
    batch = batch_at(recipe, step)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(batch.noisy, batch.level, batch.words).float()
    loss = (velocity - batch.velocity).square().mean()
    loss.backward()
    update(model, optimizers, share_at(recipe, step), recipe.gradient_clip)
    return loss.item()


def train(recipe: Recipe, cache: Path, until: int | None = None) -> None:
    """Train from the checkpoint in `cache`, if there is one, and leave one there.

    Prints the loss. Stops after step `until`, to be resumed, or when the recipe is done.

    Raises:
        ValueError: for a checkpoint that another recipe made.
    """
    cache.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    model = VideoModel()
    average = _average(model, recipe)
    both = torch.nn.ModuleDict({"model": model, "average": average})
    optimizers = new_optimizers(model, recipe)
    checkpoint = Checkpoint(cache)
    progress = checkpoint.progress() or {"step": 0, "seconds": 0.0, "curve": []}
    if progress["step"]:
        if progress["recipe"] != asdict(recipe):
            raise ValueError(
                f"{cache}: holds a run of {progress['recipe']}, not of {asdict(recipe)}; "
                "go on with that recipe, or remove the checkpoint"
            )
        checkpoint.load_model(both)
        checkpoint.load_optimizers(optimizers)
    progress |= {"recipe": asdict(recipe), "versions": VERSIONS}
    stop = recipe.steps if until is None else min(until, recipe.steps)
    losses: list[float] = []
    began = time.monotonic() - progress["seconds"]
    for step in range(progress["step"], stop):
        losses.append(take_step(model, optimizers, recipe, step))
        average.update_parameters(model)
        done = step + 1
        if done % LOG_STEPS == 0 or done == stop:
            row = {"step": done, "seconds": round(time.monotonic() - began),
                   "loss": round(sum(losses) / len(losses), 4)}  # fmt: skip
            progress["curve"].append(row)
            print(*row.values(), flush=True)
            losses.clear()
        if done % SAVE_STEPS == 0 or done == stop:
            progress |= {"step": done, "seconds": time.monotonic() - began}
            checkpoint.save(both, optimizers, progress)


def averaged_model(cache: Path) -> tuple[VideoModel, dict[str, Any]]:
    """The averaged weights of the run in `cache`, and its progress.

    Raises:
        FileNotFoundError: if there is none.
    """
    checkpoint = Checkpoint(cache)
    progress = checkpoint.progress()
    if progress is None:
        raise FileNotFoundError(
            f"{cache}: holds no checkpoint; run python -m demo.video.train.train"
        )
    model = VideoModel()
    average = _average(model, Recipe(**progress["recipe"]))
    checkpoint.load_model(torch.nn.ModuleDict({"model": model, "average": average}))
    averaged: VideoModel = average.module
    return averaged.eval(), progress


def _average(model: VideoModel, recipe: Recipe) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average_decay))


def main(
    steps: Annotated[int, typer.Option(help="length of the whole run")] = Recipe.steps,
    cache: Annotated[Path, typer.Option(help="folder for the checkpoint")] = CACHE,
    until: Annotated[int | None, typer.Option(help="stop here, to be resumed")] = None,
) -> None:
    """Train the small video model on drawn moving shapes."""
    train(Recipe(steps=steps), cache, until)


if __name__ == "__main__":
    typer.run(main)
