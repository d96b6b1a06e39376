"""Text tokens that are padding are not decomposed."""

import pytest
import torch

import diffusers_hook
from diffusers_hook.tokens.block_state import BlockState
from tests.video.support import hunyuan_cases, joint_cases
from tests.video.support.family_checks import JOINT, TEXT

CASES = {case.name: case for case in (*hunyuan_cases.CASES, joint_cases.MOCHI)}
IMAGES = {"HunyuanVideo Framepack": 3, "HunyuanVideo 1.5": 2, "Motif-Video": 2}
"""Tokens of images that stand before the text and are no padding."""


def arguments(name, real, batch=1):
    """Masks in which so many tokens of each text are real; in a batch one less of the others."""
    given = CASES[name].arguments(batch)
    masks = [argument for argument in given if argument.startswith("encoder_attention_mask")]
    for argument in masks:
        given[argument] = torch.zeros_like(given[argument])
        given[argument][:, : real - 1] = 1
        given[argument][0, real - 1] = 1
    return given, real * len(masks) + IMAGES.get(name, 0)


def text_rows(model, case, given, monkeypatch):
    """(stream, rows, decomposed rows behind the video, first row there) of each layer."""
    seen = []
    rows = BlockState.rows

    def record(self, stream, count, device):
        found = rows(self, stream, count, device)
        if stream in (TEXT, JOINT):
            first = self._generations.current.grid.sequence if stream == JOINT else 0
            chosen = [] if found.salient is None else found.salient[0].tolist()
            seen.append(
                (stream, found.tokens, sorted(row for row in chosen if row >= first), first)
            )
        return found

    with monkeypatch.context() as patch:
        patch.setattr(BlockState, "rows", record)
        case.run(model, given)
    return seen


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_padding_is_rounded_once(name, batch, monkeypatch):
    case = CASES[name]
    model = case.build()
    diffusers_hook.enable(model, **case.options)
    given, expected = arguments(name, 2, batch)
    seen = text_rows(model, case, given, monkeypatch)
    assert {stream for stream, *_ in seen} >= {TEXT}
    for stream, tokens, chosen, first in seen:
        if stream == JOINT and not chosen:
            continue  # of a decoder, which sees another video in the place of the text
        assert chosen == list(range(first, first + min(expected, tokens - first)))
    left_out = any(len(chosen) < tokens - first for _, tokens, chosen, first in seen)
    # Framepack itself cuts the padding of a single sample off
    assert left_out or (name, batch) == ("HunyuanVideo Framepack", 1)


@pytest.mark.parametrize("name", ["HunyuanVideo", "mochi"])
def test_padding_before_the_text_is_not_told_apart(name, monkeypatch):
    case = CASES[name]
    model = case.build()
    diffusers_hook.enable(model, **case.options)
    given, _ = arguments(name, 2)
    given["encoder_attention_mask"] = given["encoder_attention_mask"].flip(1)
    for _, tokens, chosen, first in text_rows(model, case, given, monkeypatch):
        assert chosen == list(range(first, tokens))


def test_features_of_no_image_are_padding(monkeypatch):
    """HunyuanVideo 1.5 takes zeros for no image."""
    name = "HunyuanVideo 1.5"
    case = CASES[name]
    model = case.build()
    diffusers_hook.enable(model, **case.options)
    given, expected = arguments(name, 2)
    given["image_embeds"] = torch.zeros_like(given["image_embeds"])
    for _, _, chosen, _ in text_rows(model, case, given, monkeypatch):
        assert len(chosen) == expected - IMAGES[name]


@pytest.mark.parametrize("name", ["HunyuanVideo", "HunyuanVideo 1.5", "mochi"])
def test_padding_does_not_change_the_video(name):
    """What is not decomposed is nothing that the model itself would see."""
    case = CASES[name]
    model = case.build()
    given, _ = arguments(name, 2)
    before = case.run(model, given)
    given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
    given["encoder_hidden_states"][:, 2:] += 1
    torch.testing.assert_close(case.run(model, given), before)
    given["encoder_hidden_states"][:, 1] += 1
    assert not torch.allclose(case.run(model, given), before)
