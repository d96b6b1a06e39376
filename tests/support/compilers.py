"""A C++ compiler that leaves the optimizer off: four fifths of the time of the CPU kernel's."""

from __future__ import annotations

import shutil
from pathlib import Path

COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
"""The one that a build finds by itself."""


def unoptimized(folder: Path) -> str:
    """A command for `$CXX` whose last flag, which decides, is -O0."""
    script = folder / "unoptimized"
    script.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n', encoding="utf-8")
    script.chmod(0o755)
    return str(script)
