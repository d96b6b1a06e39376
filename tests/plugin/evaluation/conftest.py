"""A tiny model, packed, and a text."""

import pytest

from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.scheme import Scheme


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text of some 5,000 tokens of the tiny models."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("".join(f"def f{n}(a):\n    return a * {n * n}\n" for n in range(400)))
    return path


@pytest.fixture(scope="session")
def packed(tiny_model, tmp_path_factory):
    """A function that packs a tiny model, each once per session."""
    made = {}

    def make(architecture="LlamaForCausalLM", **scheme):
        key = (architecture, repr(scheme))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "packed"
            convert(tiny_model(architecture), made[key], Scheme(**scheme))
        return made[key]

    return make
