"""The training script: what a batch holds, and that a stopped run goes on as if it had not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo.language.train.tokenizer import BEGIN, END, train_tokenizer
from demo.language.train.train import (
    Data,
    Recipe,
    batch_at,
    held_out_loss,
    learning_rate_at,
    new_model,
    train,
)
from demo.training import Checkpoint

RECIPE = Recipe(steps=4, batch=512, warmup_steps=2, fall_share=0.5, float32=True)


@pytest.fixture(scope="module")
def data() -> Data:
    text = "".join(f"def function_{i}(x):\n    return x + {i}\n\n\n" for i in range(400))
    tokenizer = train_tokenizer([text])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return Data(tokenizer, torch.tensor(ids), ids[:100])


def test_tokenizer_starts_every_prompt(data: Data) -> None:
    assert data.tokenizer.convert_tokens_to_ids([BEGIN, END]) == [0, 1]
    assert data.tokenizer("x").input_ids[0] == 0


def test_learning_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(steps=10, warmup_steps=4, fall_share=0.4)
    shares = [learning_rate_at(recipe, step) for step in range(10)]
    assert shares == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_learning_rate_lands_early() -> None:
    recipe = Recipe(steps=10, warmup_steps=1, fall_share=0.4, landing=8, landing_steps=2)
    shares = [learning_rate_at(recipe, step) for step in range(recipe.end)]
    assert shares == [1, 1, 1, 1, 1, 1, 1, 0.75 / 2]


@pytest.mark.parametrize(("step", "context"), [(0, 256), (2, 512)])
def test_windows_start_with_begin_and_continue_the_stream(step: int, context: int) -> None:
    stream = torch.arange(10, 8000)
    windows = batch_at(RECIPE, stream, 0, step)
    assert windows.shape == (512 // context, context + 1)
    assert windows[:, 0].tolist() == [0] * len(windows)
    assert (windows[:, 2:] - windows[:, 1:-1] == 1).all()


def test_one_pass_sees_no_token_twice_and_nearly_all() -> None:
    recipe = Recipe(steps=1000, batch=512)
    stream = torch.arange(512 * 20)
    steps = (len(stream) // 256 - 1) // 2
    seen = torch.cat([batch_at(recipe, stream, 0, i)[:, 1:].flatten() for i in range(steps)])
    assert len(seen.unique()) == len(seen) == steps * 512
    second = batch_at(recipe, stream, 0, steps + 1)
    assert not torch.equal(second, batch_at(recipe, stream, 0, 1))


def test_held_out_loss_of_a_model_that_knows_nothing(data: Data) -> None:
    model = new_model(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    loss = held_out_loss(model, data.held_out, 0, 32)
    assert loss == pytest.approx(torch.tensor(2048.0).log().item(), abs=1e-5)


def test_a_stopped_run_resumes_bit_for_bit(data: Data, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    train(RECIPE, data, whole)
    train(RECIPE, data, halves, until=3)
    train(RECIPE, data, halves)
    expected, found = (load_file(path / "checkpoint.safetensors") for path in (whole, halves))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    progress = Checkpoint(halves).progress()
    assert progress is not None
    assert [row["step"] for row in progress["curve"]] == [3, 4]


def test_another_recipe_is_refused(data: Data, tmp_path: Path) -> None:
    train(RECIPE, data, tmp_path, until=3)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match="at step 3, and from step 2 on it was trained otherwise"):
        train(replace(RECIPE, steps=8), data, tmp_path)
    with pytest.raises(ValueError, match="go on with that recipe, or remove the checkpoint"):
        train(replace(RECIPE, seed=1), data, tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
