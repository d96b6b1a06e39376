"""Layers that were quantized on calibration text, on their way into the shards.

Calibration goes through a model block by block, a conversion through its shards. So the layers of a
block wait in a file of their own in the destination, until the shards that hold them are written.
The files are also what a rerun after a crash continues from.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dialect_kernels import PackedTensor
from dialect_kernels.packed import STORED_FIELDS

from ..scheme import LayerFormat
from .json_files import read_json
from .layer_choice import LayerChoice
from .progress import Progress
from .reader import Checkpoint
from .tables import folded
from .writer import write_file, write_text

__all__ = ["CalibratedLayers", "Calibration", "CalibrationRecord", "recorded_fingerprint"]

_PREFIX = ".blockdialect-block-"
_RECORD = "blockdialect_calibration.json"
"""What a finished calibrated checkpoint says of its calibration."""


class Calibration(Protocol):
    """What quantizes layers on calibration text; :mod:`dialect_plugin.calibration` does."""

    def prepare(self, checkpoint: Checkpoint, choice: LayerChoice) -> Mapping[str, Any]:
        """Check everything that can be checked before anything is written.

        Returns:
            What the bytes depend on beside source and options, as JSON.

        Raises:
            ValueError: one sentence, if text, tokenizer, model or device cannot be used.
        """

    def run(self, layers: Collection[str], done: CalibratedLayers, progress: Progress) -> None:
        """Quantize those of `layers` that are not `done` and that text can reach."""


class CalibratedLayers:
    """The files of finished blocks in the destination of a conversion.

    Args:
        directory: the destination.
        fingerprint: of the conversion; files of another one are not used.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._files: dict[str, Path] = {}
        self.dampings: dict[str, float | None] = {}
        """Layer -> the damping that was used; None for one that was rounded to nearest."""
        for path in sorted(directory.glob(f"{_PREFIX}*")):
            self._open(path)

    def __contains__(self, layer: str) -> bool:
        return layer in self._files

    def add(
        self, block: int, packed: Mapping[str, PackedTensor], dampings: Mapping[str, float | None]
    ) -> None:
        """Write the layers of a finished block, so that they are there whole or not at all."""
        tensors = {
            f"{layer}.{name}": tensor
            for layer, weight in packed.items()
            for name, tensor in weight.to("cpu").stored.items()
        }
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        metadata = {"fingerprint": self._fingerprint, "dampings": json.dumps(dict(dampings))}
        path = self._directory / f"{_PREFIX}{block:05}"
        contents = save(tensors, metadata)  # save_file has an error of its own for a full disk
        write_file(path, lambda temporary: temporary.write_bytes(contents))
        self._open(path)

    def read(self, layer: str, columns: int, form: LayerFormat) -> PackedTensor | None:
        """A layer's weight; None if no block holds it."""
        path = self._files.get(layer)
        if path is None:
            return None
        names = {field.stored: f"{layer}.{field.stored}" for field in STORED_FIELDS}
        with safe_open(path, framework="pt") as file:
            tensors = {stored: file.get_tensor(name) for stored, name in names.items()}
        return PackedTensor.from_stored(
            tensors, columns, form.formatbook, form.block_size, form.rotation
        )

    def record(self, identity: Mapping[str, Any], layers: Iterable[str]) -> CalibrationRecord:
        """What the `layers` of a checkpoint were calibrated on."""
        dampings = {name: self.dampings.get(name) for name in layers}
        nearest = tuple(name for name, damping in dampings.items() if damping is None)
        raised = {name: d for name, d in dampings.items() if d and d > identity["damping"]}
        return CalibrationRecord(identity, nearest, raised)

    def remove(self) -> None:
        """Delete the files."""
        for path in list(self._directory.glob(f"{_PREFIX}*")):
            path.unlink()
        self._files.clear()

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") == self._fingerprint:
                    dampings = json.loads(metadata["dampings"])
                    self.dampings |= dampings
                    self._files |= dict.fromkeys(dampings, path)
        except SafetensorError:
            return  # cut off by a crash of the machine: the block is calibrated again


def recorded_fingerprint(destination: Path) -> str | None:
    """The fingerprint of the calibrated conversion that a directory holds; None without one."""
    try:
        found = read_json(destination / _RECORD).get("fingerprint")
    except ValueError:
        return None
    return found if isinstance(found, str) else None


@dataclass(frozen=True)
class CalibrationRecord:
    """What the layers of a checkpoint were calibrated on.

    Attributes:
        identity: what :meth:`Calibration.prepare` has returned.
        nearest: layers that were rounded without calibration, because the text did not reach them
            or gave too few tokens.
        damped: layers that needed more damping than the others -> their damping.
    """

    identity: Mapping[str, Any]
    nearest: tuple[str, ...]
    damped: Mapping[str, float]

    def lines(self) -> Iterator[str]:
        """The record in words; one fact a line."""
        of = self.identity
        yield (
            f"calibrated on {of['samples']} windows of {of['sequence_length']} tokens of "
            f"{of['text']} (rule {of['rule']})"
        )
        if self.nearest:
            yield f"rounded without calibration: {folded(self.nearest)}"
        if self.damped:
            yield f"needed more damping than {of['damping']}: {folded(self.damped)}"

    def write(self, destination: Path, fingerprint: str) -> None:
        """Write the record into the directory of the checkpoint."""
        record = {
            **self.identity,
            "rounded_to_nearest": list(self.nearest),
            "damping_raised": dict(self.damped),
            "fingerprint": fingerprint,
        }
        write_text(destination / _RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
