"""The shipped video model: what its files promise, measured again from the files alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from demo.video.check import PROMPTS, check
from demo.video.pipeline import MODEL, MovingShapesPipeline
from demo.video.scenes import ASPECTS
from demo.video.train import train
from demo.video.train.publish import card, export
from demo.video.train.train import Recipe

TRAIN = MODEL.parent / "train"
SIZE_LIMIT = 8_000_000


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return json.loads((TRAIN / "run.json").read_text())


def test_weights_are_small_and_bfloat16(run: dict[str, Any]) -> None:
    files = sorted(MODEL.rglob("*.safetensors"))
    assert [path.parent.name for path in files] == ["text_encoder", "transformer"]
    assert sum(path.stat().st_size for path in files) == run["model"]["bytes"] <= SIZE_LIMIT
    tensors = [tensor for path in files for tensor in load_file(path).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors) == run["model"]["weights"]


def test_prompts_of_the_check_use_every_word() -> None:
    for aspect, words in ASPECTS.items():
        assert {getattr(scene, aspect) for scene in PROMPTS} == set(words)
    assert len(PROMPTS) == 8


@pytest.mark.parametrize("seed", [7, 21])
def test_it_shows_what_is_asked_for(seed: int) -> None:
    pipe = MovingShapesPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    found = check(pipe, seed=seed)
    assert found.colours == 8
    assert found.directions >= 7
    assert found.passed


def test_without_words_it_does_not_know_what_to_show() -> None:
    """The check can fail: a model that ignores its prompts does not pass."""
    pipe = MovingShapesPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.text_encoder.table.weight[:] = pipe.text_encoder.table.weight[0].clone()
    assert not check(pipe).passed


def test_the_card_says_what_the_run_was(run: dict[str, Any]) -> None:
    assert (MODEL / "README.md").read_text(encoding="utf-8") == card(run)
    assert run["check"]["colours"] == 8
    assert run["recipe"] == train.asdict(Recipe())
    assert run["steps"] == Recipe.steps


def test_the_curve_is_the_whole_run(run: dict[str, Any]) -> None:
    with (TRAIN / "loss.csv").open() as opened:
        curve = list(csv.DictReader(opened))
    assert int(curve[-1]["step"]) == run["steps"]
    assert float(curve[-1]["loss"]) == run["loss"] < float(curve[0]["loss"]) / 5


def test_a_stopped_run_is_the_run_that_was_not(tmp_path: Path) -> None:
    recipe = Recipe(steps=3, batch=2, warmup_steps=1)
    train.train(recipe, tmp_path / "whole")
    train.train(recipe, tmp_path / "stopped", until=1)
    train.train(recipe, tmp_path / "stopped")
    whole, progress = train.averaged_model(tmp_path / "whole")
    stopped, _ = train.averaged_model(tmp_path / "stopped")
    assert progress["step"] == 3
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, stopped.state_dict()[name]), name
    with pytest.raises(ValueError, match="holds a run of"):
        train.train(Recipe(steps=4), tmp_path / "whole")
    export(tmp_path / "whole", tmp_path / "model")
    assert MovingShapesPipeline.from_pretrained(tmp_path / "model").transformer is not None


def test_without_a_checkpoint_there_is_nothing_to_publish(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run python -m demo\.video\.train"):
        train.averaged_model(tmp_path)
