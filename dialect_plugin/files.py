"""Writing a checkpoint's files so that each is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .checkpoint import CONFIG, INDEX, CheckpointError

__all__ = [
    "check_destination",
    "check_disk_space",
    "copied_files",
    "is_temporary",
    "remove_temporary",
    "sync_directory",
    "write_file",
    "write_text",
]

_TEMPORARY = ".blockdialect-tmp"
_COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is there whole or not at all, even after a power failure.

    Args:
        path: the file.
        write: writes the contents to the path it is given, a temporary one in the same directory.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    write(temporary)
    temporary.chmod(0o644)  # safetensors creates files that only their owner may read
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """:func:`write_file` with UTF-8 text."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sync_directory(path: Path) -> None:
    """Flush the directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether a killed run left this unfinished file."""
    return path.name.endswith(_TEMPORARY)


def remove_temporary(directory: Path) -> None:
    """Delete what killed runs left in `directory`."""
    for path in directory.iterdir():
        if is_temporary(path):
            path.unlink()


def copied_files(source: Path) -> list[Path]:
    """Files beside the weights that a converted checkpoint keeps: tokenizer, generation, licence.

    Never Python files, config.json or the index.
    """
    return [file for file in sorted(source.iterdir()) if file.is_file() and _is_copied(file.name)]


def check_destination(source: Path, destination: Path) -> None:
    """Raise CheckpointError if `destination` is a file, or is or overlaps the source."""
    inside, outside = destination.resolve(), source.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise CheckpointError(
            f"{destination}: is the source or overlaps it; choose another directory"
        )
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file; choose a directory")


def check_disk_space(destination: Path, needed: int) -> None:
    """Raise CheckpointError if less than `needed` bytes are free where `destination` will be."""
    existing = next(p for p in (destination, *destination.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{destination}: {free / 2**30:.1f} GiB are free, the converted checkpoint takes "
            f"{needed / 2**30:.1f}; free some space or choose another disk"
        )


def _is_copied(name: str) -> bool:
    if name in {CONFIG, INDEX} or name.startswith("."):
        return False
    return Path(name).suffix in _COPIED_SUFFIXES or name.startswith(_COPIED_NAMES)
