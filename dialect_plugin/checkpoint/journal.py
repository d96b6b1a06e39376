"""The journal of a conversion, from which a rerun after a crash continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dialect_kernels import __version__

from ..scheme import FORMAT_VERSION
from .loss import sqnr
from .options import ConvertOptions
from .reader import JOURNAL, Checkpoint, CheckpointError
from .writer import is_temporary, write_text

__all__ = ["FinishedShard", "Journal", "LayerRecord", "fingerprint", "open_journal"]


@dataclass(frozen=True)
class LayerRecord:
    """What quantizing did to one layer.

    Attributes:
        name: the layer.
        rows, columns: shape of its weight.
        block_size: its block size.
        packed_bytes: bytes it is stored in.
        signal, noise: sums of x**2 and of the squared error.
        rows_below_window: rows with a block more than the window below the row's top block.
    """

    name: str
    rows: int
    columns: int
    block_size: int
    packed_bytes: int
    signal: float
    noise: float
    rows_below_window: int

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise."""
        return sqnr(self.signal, self.noise)


class FinishedShard(BaseModel):
    """A shard that is on the disk, whole.

    Attributes:
        records: its quantized layers.
        tensors: stored tensor -> bytes.
        file_bytes: size of the file.
    """

    model_config = ConfigDict(extra="forbid")

    records: list[LayerRecord]
    tensors: dict[str, int]
    file_bytes: int


class Journal(BaseModel):
    """A conversion under way.

    Attributes:
        fingerprint: of source and options; a rerun with the same one continues.
        shards: file name -> what was written, in the order of writing.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    shards: dict[str, FinishedShard] = Field(default_factory=dict)

    def write(self, destination: Path) -> None:
        """Replace the journal in `destination`."""
        write_text(destination / JOURNAL, json.dumps(self.model_dump()))


def fingerprint(
    checkpoint: Checkpoint,
    options: ConvertOptions,
    companions: Iterable[PurePath] = (),
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """A hash of the source's files, the options and the release that writes the bytes.

    Args:
        checkpoint: the source.
        options: of the conversion.
        companions: paths inside the source of files in folders that are copied.
        calibration: what the bytes depend on beside these, as JSON; None without calibration.
    """
    names = {file.name for file in checkpoint.path.iterdir() if file.is_file()}
    names |= {str(name) for name in companions}
    status = {name: (checkpoint.path / name).stat() for name in sorted(names)}
    files = [(name, found.st_size, found.st_mtime_ns) for name, found in status.items()]
    parts = [str(checkpoint.path.resolve()), files, options.model_dump(mode="json"), __version__]
    further = [] if calibration is None else [dict(calibration)]
    return hashlib.sha256(json.dumps([*parts, FORMAT_VERSION, *further]).encode()).hexdigest()


def open_journal(
    destination: Path, own: str, overwrite: bool, companions: Collection[PurePath] = ()
) -> Journal:
    """The journal of the conversion with the fingerprint `own`, or a new one.

    Args:
        destination: directory to write.
        own: fingerprint of this conversion.
        overwrite: whether other files in `destination` are replaced.
        companions: paths inside `destination` of files in folders that this conversion writes.

    Raises:
        CheckpointError: if the destination holds anything else and `overwrite` is False, or holds
            directories with other files than `companions`, which `overwrite` never deletes.
    """
    fresh = Journal(fingerprint=own)
    if not destination.exists() or all(is_temporary(path) for path in destination.iterdir()):
        return fresh
    found = _read(destination)
    if found is not None and found.fingerprint == own:
        whole = {
            name: shard
            for name, shard in found.shards.items()
            if (destination / name).is_file()
            and (destination / name).stat().st_size == shard.file_bytes
        }
        return Journal(fingerprint=own, shards=whole)
    if not overwrite and found is not None:
        raise CheckpointError(
            f"{destination}: holds an unfinished conversion of another source or with other "
            "options; finish that one, choose another directory, or use --overwrite"
        )
    if not overwrite:
        raise CheckpointError(
            f"{destination}: is not empty; choose another directory, or use --overwrite"
        )
    for path in sorted(destination.iterdir()):
        if path.is_dir() and not _is_own_folder(path, destination, companions):
            raise CheckpointError(
                f"{destination}: holds the directory {path.name}, and --overwrite deletes files "
                "only; choose another directory"
            )
    return fresh


def _is_own_folder(folder: Path, destination: Path, companions: Collection[PurePath]) -> bool:
    """Whether a folder holds nothing but what this conversion writes there."""
    files = [path.relative_to(destination) for path in folder.rglob("*") if not path.is_dir()]
    own = {str(name) for name in companions}
    return bool(files) and all(is_temporary(file) or str(file) in own for file in files)


def _read(destination: Path) -> Journal | None:
    try:
        return Journal.model_validate_json((destination / JOURNAL).read_bytes())
    except (OSError, ValueError):
        return None
