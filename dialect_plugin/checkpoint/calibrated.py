"""Layers that were quantized on calibration text, on their way into the shards.

Calibration goes through a model block by block, a conversion through its shards. So the layers of a
block wait in a file of their own in the destination, until the shards that hold them are written.
The files are also what a rerun after a crash continues from.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dialect_kernels import PackedTensor
from dialect_kernels.packed import STORED_FIELDS

from ..experts import expert_of
from ..scheme import LayerFormat
from .json_files import read_json
from .layer_choice import LayerChoice
from .progress import Progress
from .reader import Checkpoint
from .tables import folded
from .writer import write_file, write_text

__all__ = [
    "CACHE_MEANS",
    "EXPERTS",
    "CalibratedLayers",
    "Calibration",
    "CalibrationRecord",
    "ChannelScales",
    "Rescaled",
    "recorded_fingerprint",
    "rescaled_tensors",
]

EXPERTS = "experts"
"""Key of a calibration's identity: whether routed experts were calibrated, too."""

CACHE_MEANS = "cache_means"
"""Key of a calibration's identity: whether means of keys and values were measured."""

_PREFIX = ".blockdialect-block-"
_MEANS_OF = "means_of_block"
"""Key in the metadata of a file that holds means instead of layers."""
_RESCALED = "rescaled_tensors"
_ROWS, _COLUMNS, _REPLACED = ":rows", ":columns", ":replaced"
"""Behind the names of tensors in these files that belong to no packed weight."""
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


@dataclass(frozen=True)
class ChannelScales:
    """What a weight [N, K] was multiplied by before it was quantized: powers of two.

    Attributes:
        rows: float32 [N].
        columns: float32 [K].
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def times(
        self, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> ChannelScales:
        """The same with further factors."""
        return ChannelScales(
            self.rows if rows is None else self.rows * rows.cpu(),
            self.columns if columns is None else self.columns * columns.cpu(),
        )

    def applied(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """The rows `first`, ... of the source's weight as they were quantized, float32."""
        return weight.float() * self.rows[first : first + len(weight), None] * self.columns


class Rescaled(NamedTuple):
    """What balancing the channels of a block has changed."""

    layers: dict[str, ChannelScales]
    tensors: dict[str, torch.Tensor]
    """Tensors of the checkpoint, such as norms, by their names there."""

    def of(self, layer: str, weight: torch.Tensor) -> ChannelScales:
        """The scales of a layer up to now."""
        rows, columns = weight.shape
        return self.layers.get(layer) or ChannelScales(torch.ones(rows), torch.ones(columns))


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
        self._others: dict[str, Path] = {}  # scales of layers, and tensors that are not packed
        self._means: dict[int, Path] = {}
        self.dampings: dict[str, float | None] = {}
        """Layer -> the damping that was used; None for one that was rounded to nearest."""
        for path in sorted(directory.glob(f"{_PREFIX}*")):
            self._open(path)

    def __contains__(self, layer: str) -> bool:
        return layer in self._files

    def add(
        self,
        block: int,
        packed: Mapping[str, PackedTensor],
        dampings: Mapping[str, float | None],
        rescaled: Rescaled,
    ) -> None:
        """Write finished layers of a block, so that they are there whole or not at all."""
        tensors = {
            f"{layer}.{name}": tensor
            for layer, weight in packed.items()
            for name, tensor in weight.to("cpu").stored.items()
        }
        for layer, scales in rescaled.layers.items():
            tensors |= {f"{layer}{_ROWS}": scales.rows, f"{layer}{_COLUMNS}": scales.columns}
        tensors |= {f"{name}{_REPLACED}": tensor for name, tensor in rescaled.tensors.items()}
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        self._write(block, tensors, {"dampings": json.dumps(dict(dampings))})

    def add_means(self, block: int, means: Mapping[str, torch.Tensor]) -> None:
        """Write the means of a block's keys and values, of which there may be none."""
        self._write(block, dict(means), {_MEANS_OF: str(block)})

    def has_means(self, block: int) -> bool:
        """Whether the means of a block's keys and values are known."""
        return block in self._means

    def means(self) -> dict[str, torch.Tensor]:
        """The means of all blocks' keys and values by their names in the checkpoint."""
        found: dict[str, torch.Tensor] = {}
        for _, path in sorted(self._means.items()):
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return found

    def _write(
        self, block: int, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
    ) -> None:
        path = self._free_file(block)
        # save_file has an error of its own for a full disk
        contents = save(tensors, {"fingerprint": self._fingerprint, **metadata})
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

    def scales(self, layer: str) -> ChannelScales | None:
        """What a layer's weight was multiplied by; None where it was not."""
        rows, columns = self._other(f"{layer}{_ROWS}"), self._other(f"{layer}{_COLUMNS}")
        return None if rows is None or columns is None else ChannelScales(rows, columns)

    def replaced(self, tensor: str) -> torch.Tensor | None:
        """What stands in the place of one of the source's tensors; None for a copy."""
        return self._other(f"{tensor}{_REPLACED}")

    def _other(self, name: str) -> torch.Tensor | None:
        if name not in self._others:
            return None
        with safe_open(self._others[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
            return found

    def record(self, identity: Mapping[str, Any], layers: Iterable[str]) -> CalibrationRecord:
        """What the `layers` of a checkpoint were calibrated on."""
        dampings = {name: self.dampings.get(name) for name in layers}
        nearest = tuple(name for name, damping in dampings.items() if damping is None)
        raised = {name: d for name, d in dampings.items() if d and d > identity["damping"]}
        ending = len(_REPLACED)
        replaced = sorted(name[:-ending] for name in self._others if name.endswith(_REPLACED))
        experts = sum(expert_of(name) is not None for name in dampings)
        means = len(self.means()) // 2
        return CalibrationRecord(identity, nearest, raised, tuple(replaced), experts, means)

    def remove(self) -> None:
        """Delete the files."""
        for path in list(self._directory.glob(f"{_PREFIX}*")):
            path.unlink()
        self._files.clear()
        self._others.clear()
        self._means.clear()

    def _free_file(self, block: int) -> Path:
        """A file that holds no layers of this conversion."""
        held = {*self._files.values(), *self._means.values()}
        paths = (self._directory / f"{_PREFIX}{block:05}-{part:03}" for part in count())
        return next(path for path in paths if path not in held)

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != self._fingerprint:
                    return
                if _MEANS_OF in metadata:
                    self._means[int(metadata[_MEANS_OF])] = path
                else:
                    dampings = json.loads(metadata["dampings"])
                    self.dampings |= dampings
                    self._files |= dict.fromkeys(dampings, path)
                    others = (n for n in file.keys() if n.endswith((_ROWS, _COLUMNS, _REPLACED)))  # noqa: SIM118
                    self._others |= dict.fromkeys(others, path)
        except SafetensorError:
            return  # cut off by a crash of the machine: the block is calibrated again


def recorded_fingerprint(destination: Path) -> str | None:
    """The fingerprint of the calibrated conversion that a directory holds; None without one."""
    try:
        found = read_json(destination / _RECORD).get("fingerprint")
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def rescaled_tensors(packed: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a packed checkpoint that balanced channels have scaled, such as norms."""
    try:
        names = read_json(packed.path / _RECORD).get(_RESCALED, [])
    except ValueError:
        return {}
    found = {}
    for name in names if isinstance(names, list) else []:
        if name in packed.tensors:
            with packed.open_shard(packed.tensors[name].shard) as file:
                found[name] = file.get_tensor(name)
    return found


@dataclass(frozen=True)
class CalibrationRecord:
    """What the layers of a checkpoint were calibrated on.

    Attributes:
        identity: what :meth:`Calibration.prepare` has returned.
        nearest: layers that were rounded without calibration, because the text did not reach them
            or gave too few tokens.
        damped: layers that needed more damping than the others -> their damping.
        replaced: tensors that are not the source's: balancing has scaled them.
        experts: how many matrices of routed experts were quantized.
        means: of how many attention modules the means of keys and values are known.
    """

    identity: Mapping[str, Any]
    nearest: tuple[str, ...]
    damped: Mapping[str, float]
    replaced: tuple[str, ...] = ()
    experts: int = 0
    means: int = 0

    def lines(self) -> Iterator[str]:
        """The record in words; one fact a line."""
        of = self.identity
        yield (
            f"calibrated on {of['samples']} windows of {of['sequence_length']} tokens of "
            f"{of['text']} (rule {of['rule']}{', balanced channels' if 'balance' in of else ''})"
        )
        experts = [name for name in self.nearest if expert_of(name) is not None]
        others = [name for name in self.nearest if expert_of(name) is None]
        if others:
            yield f"rounded without calibration: {folded(others)}"
        if experts and EXPERTS in of:
            yield (
                f"{len(experts)} of {self.experts} matrices of experts saw too few tokens and were "
                f"rounded without calibration: {folded(experts)}"
            )
        elif experts:
            yield (
                "transformers does not show what each expert of this model sees; rounded without "
                f"calibration: {folded(experts)}"
            )
        if self.damped:
            yield f"needed more damping than {of['damping']}: {folded(self.damped)}"
        if self.means:
            yield f"means of keys and values of {self.means} attention modules for the KV cache"
        elif CACHE_MEANS in of:
            yield (
                "transformers does not show the keys and values of this model, or no 4-bit KV "
                "cache can hold them: they have no means"
            )

    def write(self, destination: Path, fingerprint: str) -> None:
        """Write the record into the directory of the checkpoint."""
        record = {
            **self.identity,
            "rounded_to_nearest": list(self.nearest),
            "damping_raised": dict(self.damped),
            **({_RESCALED: list(self.replaced)} if self.replaced else {}),
            "fingerprint": fingerprint,
        }
        write_text(destination / _RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
