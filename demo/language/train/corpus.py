"""The demo model's text: Python's own standard library, split by module and de-duplicated.

Every Python installation carries this text, so the recipe needs no download. A *module* here is
the top-level name in the library folder (`json`, `argparse`): a package goes to one side whole,
and `_pyio` goes where `io` goes. The split depends on the names and on `SEED` alone; what it came
to, with the SHA-256 of every file, is written to `manifest.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "SEED",
    "SourceFile",
    "Split",
    "manifest",
    "module_of",
    "read_sources",
    "split_by_module",
]

SEED = 20_260_101
HELD_OUT_BYTES = 200_000
# One held-out module may fill at most a sixth of the held-out text, so that the figure measured on
# it is about the library and not about one author.
HELD_OUT_MODULE_BYTES = HELD_OUT_BYTES // 6
SHINGLE_LINES = 4
DUPLICATE_SHARE = 0.5
LEAK_SHARE = 0.05

# Not prose and not programs: third-party code, tests with their data (absent from many
# installations), character tables, and files generated for one machine.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class SourceFile:
    """One file of the library: its path inside the library folder and its text."""

    path: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def size(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True)
class Split:
    """The files of both sides, sorted by path, and those dropped as copies, with the reason."""

    train: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]
    dropped: tuple[tuple[SourceFile, str], ...]


def module_of(path: str) -> str:
    """Name of the top-level module that `path` belongs to, the same for `_pyio.py` and `io.py`."""
    name = path.split("/")[0].removesuffix(".py")
    for prefix in ("_py", "_"):
        if name.startswith(prefix) and not name.startswith("__"):
            return name.removeprefix(prefix)
    return name


def read_sources(root: Path | None = None) -> Iterator[SourceFile]:
    """Yield the library's UTF-8 Python files, sorted by path, line ends as LF."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(relative.parts):
            continue
        if any(part.startswith(EXCLUDED_PREFIXES) for part in relative.parts):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        text = text.replace("\r\n", "\n").strip("\n")
        if text:
            yield SourceFile(relative.as_posix(), text + "\n")


def shingles(text: str) -> set[int]:
    """Hashes of every run of `SHINGLE_LINES` non-blank lines, white space at the ends ignored."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    runs = ("\n".join(lines[i : i + SHINGLE_LINES]) for i in range(len(lines) - SHINGLE_LINES + 1))
    return {int.from_bytes(hashlib.sha1(run.encode()).digest()[:8], "big") for run in runs}


def _share(part: set[int], whole: set[int]) -> float:
    return len(part & whole) / len(part) if part else 0.0


def choose_held_out(sizes: dict[str, int], seed: int = SEED) -> set[str]:
    """Modules to hold out, given the bytes of every file by path: at random, up to the limits."""
    modules: dict[str, int] = {}
    for path, size in sizes.items():
        modules[module_of(path)] = modules.get(module_of(path), 0) + size
    order = sorted(modules)
    random.Random(seed).shuffle(order)
    chosen: set[str] = set()
    total = 0
    for module in order:
        fits = total + modules[module] <= HELD_OUT_BYTES + HELD_OUT_MODULE_BYTES // 2
        if total < HELD_OUT_BYTES and modules[module] <= HELD_OUT_MODULE_BYTES and fits:
            chosen.add(module)
            total += modules[module]
    return chosen


def split_by_module(sources: Iterator[SourceFile], seed: int = SEED) -> Split:
    """Choose held-out modules at random, then drop copies so that none is on both sides.

    A file is a copy when more than half of its shingles were already seen on its own side, and
    leaks when more than `LEAK_SHARE` of its shingles occur in the held-out text; leaks leave the
    *training* side, so the held-out text stays as chosen.
    """
    files = list(sources)
    chosen = choose_held_out({file.path: file.size for file in files}, seed)
    dropped: list[tuple[SourceFile, str]] = []
    kept: dict[bool, list[SourceFile]] = {True: [], False: []}
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for held_out in (True, False):
        for file in files:
            if (module_of(file.path) in chosen) is not held_out:
                continue
            marks = shingles(file.text)
            if _share(marks, seen[held_out]) > DUPLICATE_SHARE:
                dropped.append((file, "copy"))
                continue
            if not held_out and _share(marks, seen[True]) > LEAK_SHARE:
                dropped.append((file, "leaks held-out text"))
                continue
            seen[held_out] |= marks
            kept[held_out].append(file)
    return Split(tuple(kept[False]), tuple(kept[True]), tuple(dropped))


def manifest(split: Split) -> dict[str, Any]:
    """What the split came to, for `manifest.json`: seed, limits, bytes and SHA-256 of every file.

    Bytes and hashes are those of the text as trained on: line ends LF, no blank lines at the ends.
    """
    held_out_marks: set[int] = set().union(*(shingles(f.text) for f in split.held_out))
    train_marks: set[int] = set().union(*(shingles(f.text) for f in split.train))

    def listed(files: tuple[SourceFile, ...]) -> dict[str, Any]:
        return {
            "bytes": sum(file.size for file in files),
            "files": {file.path: [file.size, file.sha256] for file in files},
        }

    return {
        "source": f"standard library of {platform.python_implementation()} "
        f"{platform.python_version()}",
        "seed": SEED,
        "shingle_lines": SHINGLE_LINES,
        "held_out_shingles_in_train": round(_share(held_out_marks, train_marks), 5),
        "train": listed(split.train),
        "held_out": listed(split.held_out),
        "dropped": {file.path: [file.size, reason] for file, reason in split.dropped},
    }


def main() -> None:
    """Write `manifest.json` beside this file and the held-out text to `demo/heldout.txt`."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--manifest", type=Path, default=here / "manifest.json")
    parser.add_argument("--held-out", type=Path, default=here.parents[1] / "heldout.txt")
    args = parser.parse_args()
    split = split_by_module(read_sources())
    lines = json.dumps(manifest(split), indent=1)
    # One line a file: [bytes, hash] would otherwise take four.
    lines = re.sub(r"\[\s+(\d+),\s+(\"[^\"]*\")\s+\]", r"[\1, \2]", lines)
    args.manifest.write_text(lines + "\n", encoding="utf-8")
    args.held_out.write_text("".join(file.text for file in split.held_out), encoding="utf-8")
    for side, files in (("train", split.train), ("held out", split.held_out)):
        print(f"{side}: {len(files)} files, {sum(file.size for file in files):,} bytes")
    print(f"dropped: {len(split.dropped)} files")


if __name__ == "__main__":
    main()
