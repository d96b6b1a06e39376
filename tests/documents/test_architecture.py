"""The architecture page knows the house: every named module exists, every room is named."""

from __future__ import annotations

import re

import pytest

from tests.documents.markdown import ROOT

TEXT = (ROOT / "docs" / "design" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = {
    "The ground floor: `dialect_kernels`": ROOT / "triton_kernels" / "dialect_kernels",
    "The serving wing: `dialect_plugin`": ROOT / "dialect_plugin",
    "The video wing: `diffusers_hook`": ROOT / "diffusers_hook",
}


def rooms(heading):
    """The names in the first column of a section's table."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([\w/]+)`", cell)}


@pytest.mark.parametrize("heading", PACKAGES)
def test_rooms_are_those_of_the_package(heading):
    package = PACKAGES[heading]
    there = {
        f"{path.name}/" if path.is_dir() else path.stem
        for path in package.iterdir()
        if (path / "__init__.py").is_file() or (path.suffix == ".py" and path.stem != "__init__")
    }
    data = {"golden/"}
    assert rooms(heading) - data == there


def test_every_package_stands_in_the_table_of_imports():
    table = TEXT.partition("| folder |")[2].partition("\n\n")[0]
    assert all(f"`{package.relative_to(ROOT)}/`" in table for package in PACKAGES.values())
