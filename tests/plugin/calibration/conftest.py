"""Checkpoints of the tests of this room."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def source(tiny_model, tmp_path):
    """A copy of the tiny LLaMA that a test may damage."""
    return Path(shutil.copytree(tiny_model(), tmp_path / "source"))
