"""Moving shapes: prompts are understood, and a drawn video is read back as its prompt."""

from __future__ import annotations

import itertools

import pytest
import torch

from demo.video.scenes import (
    ASPECTS,
    FRAMES,
    SIZE,
    SPEEDS,
    WORDS,
    Scene,
    draw,
    parse,
    random_scenes,
    read,
)

ALL = [Scene(*words) for words in itertools.product(*ASPECTS.values())]


def test_every_prompt_is_understood_as_the_scene_that_wrote_it() -> None:
    assert [parse(scene.prompt) for scene in ALL] == ALL


def test_other_words_are_free() -> None:
    asked = parse("SLOWLY and quietly, some Cyan square drifts down-left")
    assert asked == Scene("cyan", "square", "down-left", "slowly")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red circle moves up", "names no speed; it must name one speed of slowly, fast"),
        ("a red blue circle moves up, fast", "names red and blue; it must name one colour"),
        ("", "names no colour"),
        ("a red circle moves up-and-away, fast", "names no direction"),
    ],
)
def test_a_prompt_without_one_word_of_each_kind_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(prompt)
    assert str(caught.value).startswith("prompt: ")
    assert "for example" in str(caught.value)


def test_words_are_positions_in_the_vocabulary() -> None:
    scene = Scene("blue", "triangle", "left", "fast")
    assert [WORDS[i] for i in scene.words] == ["blue", "triangle", "left", "fast"]
    assert WORDS[0] == ""


def test_what_is_drawn_is_read_back() -> None:
    videos = draw(ALL, torch.Generator().manual_seed(3))
    assert videos.shape == (len(ALL), 3, FRAMES, SIZE, SIZE)
    assert videos.abs().max() <= 1
    for scene, seen in zip(ALL, read(videos), strict=True):
        assert seen.colour == scene.colour
        assert seen.angle_error(scene) < 6
        assert seen.speed == pytest.approx(SPEEDS[scene.speed], rel=0.12)


def test_reading_does_not_take_a_reversed_video_for_the_right_one() -> None:
    videos = draw(ALL[:48], torch.Generator().manual_seed(4)).flip(2)
    for scene, seen in zip(ALL[:48], read(videos), strict=True):
        assert seen.angle_error(scene) > 170


def test_scenes_follow_from_the_seed() -> None:
    dice = [torch.Generator().manual_seed(seed) for seed in (5, 5, 6)]
    first, same, other = (random_scenes(20, each) for each in dice)
    assert first == same != other
    for aspect, words in ASPECTS.items():
        many = random_scenes(200, torch.Generator().manual_seed(7))
        assert {getattr(scene, aspect) for scene in many} == set(words)
