"""What a step leaves behind: measurements line by line, and the parcel that comes back.

A step writes each measurement to disk before it begins the next. After every step, and every few
seconds in between, all of it is packed into one small archive in the folder that comes back.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PARCEL", "Lines", "Work", "pack", "read_lines", "take_over"]

PARCEL = "session.tar.gz"
_MOST_BYTES = 16 << 20
_REHEARSED = "rehearsal"


class Lines:
    """Measurements of a step, one JSON object a line."""

    def __init__(self, file: Path, common: Mapping[str, Any]) -> None:
        """
        Args:
            file: is appended to.
            common: stands in every line.
        """
        self._file = file
        self._common = dict(common)

    def add(self, **found: Any) -> None:
        """Write a line, to disk."""
        line = json.dumps(self._common | found)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)


@dataclass(frozen=True)
class Work:
    """What a step gets.

    Attributes:
        results: folder for its files, small ones.
        lines: for its measurements.
        rehearsal: there is no GPU; times are made up.
        until_s: value of ``time.monotonic()`` at which the step is ended.
    """

    results: Path
    lines: Lines
    rehearsal: bool
    until_s: float

    def left_s(self) -> float:
        """Seconds until the step is ended."""
        return self.until_s - time.monotonic()


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a step; one that was cut off is left out."""
    found = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def pack(results: Path, out: Path, rehearsal: bool) -> Path:
    """Pack all results into the folder that comes back, in the place of an older parcel.

    Files that would make it larger than 16 MiB stay out, the largest first, and are named in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    name = f"{_REHEARSED}-{PARCEL}" if rehearsal else PARCEL
    files = sorted((path for path in results.rglob("*") if path.is_file()), key=_size)
    kept, total = [], 0
    for path in files:
        total += _size(path) + 1024
        if total <= _MOST_BYTES:
            kept.append(path)
    (results / "left_out.txt").write_text(
        "".join(f"{path.relative_to(results)}\n" for path in files if path not in kept),
        encoding="utf-8",
    )
    temporary = results.parent / "parcel.tmp"
    with tarfile.open(temporary, "w:gz", compresslevel=3) as archive:
        for path in sorted({*kept, results / "left_out.txt"}):
            if path.exists():
                archive.add(path, str(path.relative_to(results)))
    shutil.copyfile(temporary, out / f"{name}.new")
    target = (out / f"{name}.new").replace(out / name)
    temporary.unlink()
    return target


def take_over(folder: Path, results: Path) -> set[str]:
    """Unpack the parcel of an earlier session; the names of the steps that it finished.

    Raises:
        FileNotFoundError: if there is no parcel.
    """
    results.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / PARCEL, "r:gz") as archive:
        archive.extractall(results, filter="data")
    return {path.name.removesuffix(".done") for path in results.glob("*.done")}


def _size(path: Path) -> int:
    return path.stat().st_size
