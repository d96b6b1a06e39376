"""Packed checkpoints of the tests of this room."""

import shutil
from pathlib import Path

import pytest

from dialect_plugin.checkpoint.convert import convert
from tests.support.conversions import options_of


@pytest.fixture(scope="session")
def packed(tiny_model, tmp_path_factory):
    """A function that converts tiny models, each once per session; `model` has their options."""
    made = {}

    def make(architecture="LlamaForCausalLM", model=(), **options):
        key = (architecture, tuple(model), repr(options))
        if key not in made:
            destination = tmp_path_factory.mktemp("packed") / architecture
            convert(tiny_model(architecture, **dict(model)), destination, options_of(**options))
            made[key] = destination
        return made[key]

    return make


@pytest.fixture
def damaged(packed, tmp_path):
    """A copy of the packed LLaMA that a test may damage."""
    return Path(shutil.copytree(packed(), tmp_path / "damaged"))
