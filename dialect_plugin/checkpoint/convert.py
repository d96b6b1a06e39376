"""Converting a 16-bit checkpoint to a packed one, shard by shard, without building the model.

Everything is checked before the first byte is written. Each output file is written under a
temporary name, flushed to disk and renamed; config.json and the index come last. A journal in the
destination remembers finished shards, so that a rerun after a crash continues and ends with the
same bytes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from dialect_kernels import PackedTensor
from dialect_kernels.backend import Quantized
from dialect_kernels.formatbook import NAN_ROW, ROTATION_GROUP
from dialect_kernels.ops import quantize_counted, rounding_loss
from dialect_kernels.packed import STORED_FIELDS, bits_per_weight
from dialect_kernels.rotation import rotate_weight

from ..cache_means import MEANS_FILE
from ..scheme import LayerFormat, Rotation, Scheme
from .calibrated import CalibratedLayers, Calibration, CalibrationRecord, recorded_fingerprint
from .companions import Companions, find_companions
from .finish import finish_checkpoint
from .journal import FinishedShard, Journal, LayerRecord, fingerprint, open_journal
from .layer_choice import LayerChoice, choose_layers
from .model_card import model_card
from .options import ConvertOptions
from .progress import Progress, Silent
from .reader import (
    CONFIG,
    JOURNAL,
    PACKED_SUFFIXES,
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    open_checkpoint,
    open_packed,
)
from .tables import folded
from .workers import Workers
from .writer import (
    ShardWriter,
    StoredTensor,
    check_destination,
    check_disk_space,
    exclusive,
    make_directory,
    remove_temporary,
    sync_directory,
    write_file,
)

__all__ = ["ConversionResult", "convert", "render"]

_STORED_DTYPES = {torch.uint8: "U8", torch.int8: "I8"}
_CHUNK_ELEMENTS = 1 << 20  # memory is some 3 to 5 bytes per element for each worker and two more
_COPY_BYTES = 1 << 20
_ROTATES = torch.finfo(torch.float32).max / ROTATION_GROUP
"""Numbers up to this one never overflow when they are rotated."""


@dataclass(frozen=True)
class ConversionResult:
    """A finished conversion.

    Attributes:
        source, destination: directories of the 16-bit and of the packed checkpoint.
        layers: one record per quantized layer; empty if the conversion was finished before.
        choice: which layers were quantized, adapted or left in 16 bit.
        companions: files beside the weights that were copied or left out.
        unheld: tensors that the source's index lists and no file holds.
        source_bytes, packed_bytes: bytes of all tensors before and after.
        resumed: shards that an earlier, unfinished run had written.
        finished_before: whether an earlier run had finished, so that nothing was written.
        calibration: what its layers were calibrated on; None without calibration.
    """

    source: Path
    destination: Path
    layers: tuple[LayerRecord, ...]
    choice: LayerChoice
    companions: Companions
    unheld: tuple[str, ...]
    source_bytes: int
    packed_bytes: int
    resumed: int
    finished_before: bool = False
    calibration: CalibrationRecord | None = None


def convert(
    source: str | Path,
    destination: str | Path,
    options: ConvertOptions | Scheme | None = None,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> ConversionResult:
    """Quantize a checkpoint.

    Args:
        source: directory or hub id of a 16-bit safetensors checkpoint.
        destination: directory to write; must not exist, be empty, or hold this same conversion,
            finished or not.
        options: which layers to quantize and how; a scheme is short for options with this scheme.
        overwrite: replace what is in `destination`.
        workers: CPU threads, default all; the bytes do not depend on it without calibration.
        progress: receives every pass and tensor.
        calibration: quantizes layers on calibration text, e.g. a
            :class:`~dialect_plugin.calibration.calibrator.Calibrator`.

    Raises:
        CheckpointError, SchemeError, ValueError: one sentence, before anything is written, if
            source, options or destination cannot be used or a weight holds NaN or Inf.
        OSError: if writing fails; a rerun continues.
    """
    if not isinstance(options, ConvertOptions):
        options = ConvertOptions(scheme=options or Scheme())
    destination = Path(destination)
    checkpoint = open_checkpoint(find_checkpoint(source))
    choice = choose_layers(checkpoint, options)
    companions = find_companions(checkpoint)
    check_destination(checkpoint.path, destination)
    identity = None if calibration is None else calibration.prepare(checkpoint, choice)
    own = fingerprint(checkpoint, options, companions.copied, identity)
    calibrated = None if identity is None else own
    if not overwrite and _is_finished(checkpoint, choice, companions, destination, calibrated):
        CalibratedLayers(destination, own).remove()  # a crash at the very end leaves them there
        return _nothing_to_do(checkpoint, choice, companions, destination)
    journal = open_journal(destination, own, overwrite, companions.copied)
    resumed = len(journal.shards)
    _check_space(checkpoint, choice, destination, journal, calibrated)
    with Workers(workers) as pool:
        conversion = _Conversion(
            checkpoint, choice, companions, destination, journal, progress or Silent(), pool
        )
        conversion.check_weights()
        make_directory(destination)
        with exclusive(destination):
            if overwrite and not resumed:
                _empty(destination)
            remove_temporary(destination)
            journal.write(destination)
            if calibration is not None and identity is not None:
                conversion = conversion.calibrated(calibration, identity)
            conversion.write_shards()
            _refuse_changed(checkpoint, options, companions, own, identity)
            return conversion.finish(resumed)


def _check_space(
    checkpoint: Checkpoint,
    choice: LayerChoice,
    destination: Path,
    journal: Journal,
    calibrated: str | None,
) -> None:
    """Raise CheckpointError if the disk cannot hold what is still to be written."""
    missing = [shard for shard in checkpoint.shards if shard not in journal.shards]
    contents = [_contents(checkpoint, shard, choice) for shard in missing]
    needed = sum(tensor.nbytes for shard in contents for tensor in shard.values())
    if calibrated is not None:  # packed layers wait in files of their own
        tensors = (entry for shard in contents for entry in shard.items())
        needed += sum(t.nbytes for name, t in tensors if name.endswith(PACKED_SUFFIXES))
    check_disk_space(destination, needed)


class _Calibrated(NamedTuple):
    """The layers that were quantized on calibration text, and what that was."""

    layers: CalibratedLayers
    identity: Mapping[str, Any]


class _Rows(NamedTuple):
    """A group of quantized rows, the rounding loss of each, and how many are below the window."""

    packed: PackedTensor
    loss: torch.Tensor
    below_window: int


@dataclass(frozen=True)
class _Conversion:
    """A conversion under way: its source, its decisions and the tools it works with."""

    checkpoint: Checkpoint
    choice: LayerChoice
    companions: Companions
    destination: Path
    journal: Journal
    progress: Progress
    workers: Workers
    calibration: _Calibrated | None = None

    def calibrated(self, calibration: Calibration, identity: Mapping[str, Any]) -> _Conversion:
        """This conversion, with the layers of its missing shards quantized on calibration text."""
        done = CalibratedLayers(self.destination, self.journal.fingerprint)
        missing = [
            layer
            for layer in self.choice.formats
            if self.checkpoint.weights[layer].shard not in self.journal.shards
        ]
        with self.workers.set_aside():
            calibration.run(missing, done, self.progress)
        return replace(self, calibration=_Calibrated(done, identity))

    def check_weights(self) -> None:
        """Raise CheckpointError at the first NaN or Inf in a weight that will be quantized.

        It is in the weight, or in what its rotation makes of it.
        """
        infos = {name: self.checkpoint.weights[name] for name in self.choice.formats}
        infos = {n: info for n, info in infos.items() if info.shard not in self.journal.shards}
        self.progress.begin("checking", len(infos), sum(info.nbytes for info in infos.values()))
        for layer, info in infos.items():
            groups = self._groups(layer)
            check = partial(_first_not_finite, self.choice.formats[layer].rotation)
            first_row = 0
            for rows, fault in self.workers.map(check, groups):
                if fault is not None:
                    what, value, row, column = fault
                    raise CheckpointError(
                        f"{layer}.weight in {info.shard}: {what}{value} at "
                        f"[{first_row + row}, {column}]; only finite weights can be quantized: "
                        f"repair the checkpoint, or --ignore {layer}"
                    )
                first_row += rows
            self.progress.advance(info.nbytes)

    def write_shards(self) -> None:
        """Write the shards that the journal does not list yet, and list them."""
        sizes = [info.nbytes for info in self.checkpoint.tensors.values()]
        self.progress.begin("quantizing", len(sizes), sum(sizes))
        for shard in self.checkpoint.shards:
            if shard in self.journal.shards:
                for info in self.checkpoint.tensors.values():
                    if info.shard == shard:
                        self.progress.advance(info.nbytes)
                continue
            records: list[LayerRecord] = []
            path = self.destination / shard
            write_file(path, partial(self._write_shard, shard, records))
            contents = _contents(self.checkpoint, shard, self.choice)
            self.journal.shards[shard] = FinishedShard(
                records=records,
                tensors={name: tensor.nbytes for name, tensor in contents.items()},
                file_bytes=path.stat().st_size,
            )
            self.journal.write(self.destination)

    def _write_shard(self, shard: str, records: list[LayerRecord], path: Path) -> None:
        """Write an output shard to `path` and append its quantized layers to `records`."""
        with path.open("wb") as file:
            writer = ShardWriter(file, _contents(self.checkpoint, shard, self.choice))
            for name, info in self.checkpoint.tensors.items():
                if info.shard != shard:
                    continue
                layers = _packed_layers(self.checkpoint, name, self.choice)
                if layers:
                    records += [self._write_layer(layer, writer) for layer in layers]
                elif (tensor := self._replaced(name)) is not None:
                    writer.append(name, tensor.flatten().view(torch.uint8).numpy().data)
                else:
                    for chunk in self.checkpoint.read_bytes(name, _COPY_BYTES):
                        writer.append(name, chunk)
                self.progress.advance(info.nbytes)
            writer.finish()

    def _replaced(self, name: str) -> torch.Tensor | None:
        """What calibration has put in the place of one of the source's tensors."""
        return None if self.calibration is None else self.calibration.layers.replaced(name)

    def _write_layer(self, layer: str, writer: ShardWriter) -> LayerRecord:
        """Quantize a layer group of rows by group of rows, which gives the bytes of the whole."""
        packed_bytes, below = 0, 0
        losses = [torch.zeros(1, 2, dtype=torch.float64)]
        for group in self._quantized_groups(layer):
            for field, tensor in zip(STORED_FIELDS, group.packed.tensors, strict=True):
                writer.append(f"{layer}.{field.stored}", tensor.flatten().numpy().data)
            packed_bytes += group.packed.nbytes
            losses.append(group.loss)
            below += group.below_window
        signal, noise = map(math.fsum, torch.cat(losses).T.tolist())  # exact, whatever the groups
        rows, columns = self.checkpoint.weights[layer].shape
        block_size = self.choice.formats[layer].block_size
        return LayerRecord(layer, rows, columns, block_size, packed_bytes, signal, noise, below)

    def _quantized_groups(self, layer: str) -> Iterator[_Rows]:
        """Groups of rows of a layer, quantized by the workers, in order."""
        name, form = f"{layer}.weight", self.choice.formats[layer]
        columns = self.checkpoint.weights[layer].shape[1]
        whole = self.calibration and self.calibration.layers.read(layer, columns, form)
        scales = self.calibration and self.calibration.layers.scales(layer)

        def quantize_rows(group: tuple[int, torch.Tensor]) -> _Rows:
            first, weight = group
            if scales is not None:
                weight = scales.applied(weight, first)
            packed, below = _quantized(weight, form, name)
            if bool((packed.row_exponent == NAN_ROW).any()):  # checked before: it has changed
                shard = self.checkpoint.path / self.checkpoint.weights[layer].shard
                raise CheckpointError(
                    f"{shard}: {name} changed while it was converted and holds NaN or Inf now; "
                    "leave the source alone during a conversion, and convert it again"
                )
            if whole is not None:
                packed = whole.slice_rows(first, first + len(weight))
            return _Rows(packed, rounding_loss(weight, packed), int((below > 0).sum()))

        return self.workers.map(quantize_rows, _numbered(self._groups(layer)))

    def _groups(self, layer: str) -> Iterator[torch.Tensor]:
        """Groups of rows of a weight: several for each worker, unless they would be very small."""
        share = math.prod(self.checkpoint.weights[layer].shape) // (4 * self.workers.count)
        elements = min(_CHUNK_ELEMENTS, max(_CHUNK_ELEMENTS // 4, share))
        return self.checkpoint.read_rows(layer, elements)

    def _write_means(self) -> dict[str, tuple[str, int]]:
        """Write the means of keys and values, if there are any: tensor -> (file, bytes)."""
        means = {} if self.calibration is None else self.calibration.layers.means()
        if means:
            contents = save(means, {"format": "pt"})
            write_file(self.destination / MEANS_FILE, lambda path: path.write_bytes(contents))
        return {name: (MEANS_FILE, mean.nbytes) for name, mean in means.items()}

    def finish(self, resumed: int) -> ConversionResult:
        """Write everything but the shards, and drop the journal."""
        finished = [(shard, self.journal.shards[shard]) for shard in self.checkpoint.shards]
        layers = tuple(layer for _, shard in finished for layer in shard.records)
        record = None
        if self.calibration is not None:
            done, identity = self.calibration
            record = done.record(identity, (layer.name for layer in layers))
            record.write(self.destination, self.journal.fingerprint)
        stored = {
            name: (file, nbytes)
            for file, shard in finished
            for name, nbytes in shard.tensors.items()
        }
        packed_bytes = finish_checkpoint(
            self.checkpoint,
            self.destination,
            stored | self._write_means(),
            model_card(self.checkpoint, layers, self.choice, record),
            self.companions,
            self.choice.scheme.to_config(),
        )
        (self.destination / JOURNAL).unlink()
        if self.calibration is not None:
            self.calibration.layers.remove()
        sync_directory(self.destination)
        return ConversionResult(
            source=self.checkpoint.path,
            destination=self.destination,
            layers=layers,
            choice=self.choice,
            companions=self.companions,
            unheld=self.checkpoint.unheld,
            source_bytes=sum(info.nbytes for info in self.checkpoint.tensors.values()),
            packed_bytes=packed_bytes,
            resumed=resumed,
            calibration=record,
        )


def render(result: ConversionResult) -> str:
    """What a conversion did, and how to serve its result; one fact a line."""
    choice, layers = result.choice, result.layers
    serve = f"serve it with: vllm serve {result.destination}"
    if result.finished_before:
        return (
            f"{result.destination}: holds this conversion already, finished; nothing to do\n{serve}"
        )
    bits = bits_per_weight(
        sum(layer.packed_bytes for layer in layers),
        sum(layer.rows * layer.columns for layer in layers),
    )
    lines = [
        f"{len(layers)} layers at {bits:.3f} bits per weight; tensors "
        f"{result.source_bytes / 1e6:,.1f} MB -> {result.packed_bytes / 1e6:,.1f} MB"
    ]
    if result.resumed:
        lines.insert(
            0, f"continued an unfinished conversion that had written {result.resumed} files"
        )
    if result.calibration is not None:
        lines += result.calibration.lines()
    if choice.by_name:
        lines.append(
            "the table of architectures does not have this one, whose layers were chosen by their "
            f"names: {choice.by_name}"
        )
    if choice.adapted:
        lines.append(
            "the block size does not divide the columns of these layers, which have another one: "
            + folded(f"{name} ({choice.formats[name].block_size})" for name in choice.adapted)
        )
    if choice.unrotated:
        lines.append(
            f"the columns of these layers are not a multiple of {ROTATION_GROUP}, so that they are "
            "not rotated: " + folded(choice.unrotated)
        )
    if choice.indivisible:
        lines.append(
            "no block size divides the columns of these layers, which stay in 16 bit: "
            + folded(choice.indivisible)
        )
    if choice.incomplete:
        lines.append(
            "the checkpoint lacks parts of the fused layers of these, which stay in 16 bit: "
            + folded(choice.incomplete)
        )
    if choice.has_plain_experts:
        lines.append("experts stay in 16 bit")
    below = [layer for layer in layers if layer.rows_below_window]
    if below:
        most = max(below, key=lambda layer: layer.rows_below_window)
        lines.append(
            f"{sum(layer.rows_below_window for layer in below)} rows of {len(below)} layers have "
            f"blocks below the exponent window; {most.name} has {most.rows_below_window} of them"
        )
    return "\n".join([*lines, *_beside_the_weights(result), serve])


def _beside_the_weights(result: ConversionResult) -> Iterator[str]:
    """What the copy lacks that the source, or its index, has."""
    if result.unheld:
        yield "the index lists these tensors, which no file holds: " + ", ".join(result.unheld)
    if result.companions.left_out:
        yield "not copied: " + ", ".join(result.companions.left_out)
    if result.companions.code:
        entries = ", ".join(
            f"{name} ({', '.join(keys)})" for name, keys in result.companions.code.items()
        )
        yield (
            "auto_map entries that point to the model's own Python files were left out, because "
            f"code is never copied: {entries}; vLLM serves the copy with its own classes where it "
            f"has them, else copy the .py files and these entries from {result.source} and add "
            "--trust-remote-code"
        )


def _packed_layers(checkpoint: Checkpoint, tensor: str, choice: LayerChoice) -> list[str]:
    """The layers whose weights the tensor holds and that will be packed: all of them or none."""
    return [layer for layer in checkpoint.layers_in(tensor) if layer in choice.formats]


def _quantized(rows: torch.Tensor, form: LayerFormat, name: str) -> Quantized:
    """Rows of the weight `name`, which are finite."""
    return quantize_counted(
        rows, form.formatbook, form.block_size, name=name, rotation=form.rotation, finite=True
    )


def _numbered(groups: Iterator[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """Groups of rows of a matrix, each behind the number of its first row."""
    first = 0
    for rows in groups:
        yield first, rows
        first += len(rows)


def _contents(checkpoint: Checkpoint, shard: str, choice: LayerChoice) -> dict[str, StoredTensor]:
    """The tensors of the output shard."""
    stored = {}
    for name, info in checkpoint.tensors.items():
        if info.shard != shard:
            continue
        layers = _packed_layers(checkpoint, name, choice)
        if not layers:
            stored[name] = StoredTensor(info.dtype, info.shape, info.nbytes)
        for layer, field in product(layers, STORED_FIELDS):
            rows, columns = checkpoint.weights[layer].shape
            shape = field.shape(rows, columns, choice.formats[layer].block_size)
            dtype = _STORED_DTYPES[field.dtype]
            nbytes = math.prod(shape) * field.dtype.itemsize
            stored[f"{layer}.{field.stored}"] = StoredTensor(dtype, shape, nbytes)
    return stored


def _first_not_finite(
    rotation: Rotation, weight: torch.Tensor
) -> tuple[int, tuple[str, float, int, int] | None]:
    """The number of rows, and the first NaN or Inf: where it comes from, value, row and column."""
    rows, what = weight.shape[0], ""
    largest = _largest(weight)
    if rotation != "none" and _ROTATES < largest < math.inf:
        weight, what = rotate_weight(weight, rotation), f"rotated by {rotation}, "
        largest = _largest(weight)
    if largest < math.inf:  # which NaN is not
        return rows, None
    row, column = (~weight.isfinite()).nonzero()[0].tolist()
    return rows, (what, float(weight[row, column]), row, column)


def _largest(weight: torch.Tensor) -> float:
    """The largest magnitude; NaN if any element is."""
    ends = torch.aminmax(weight) if weight.numel() else ()
    return max((abs(float(end)) for end in ends), default=0.0)


def _refuse_changed(
    checkpoint: Checkpoint,
    options: ConvertOptions,
    companions: Companions,
    own: str,
    identity: Mapping[str, Any] | None,
) -> None:
    """Raise CheckpointError unless the source still has the fingerprint `own` and its headers.

    Its bytes may have been read from anywhere in a file that was replaced meanwhile.
    """
    try:
        same = (
            fingerprint(checkpoint, options, companions.copied, identity) == own
            and open_checkpoint(checkpoint.path).tensors == checkpoint.tensors
        )
    except (CheckpointError, OSError):
        same = False
    if not same:
        raise CheckpointError(
            f"{checkpoint.path}: changed while it was converted; leave the source alone during a "
            "conversion, and convert it again with --overwrite"
        )


def _empty(destination: Path) -> None:
    """Delete the files `overwrite` replaces, config.json first: what is left is no checkpoint."""
    (destination / CONFIG).unlink(missing_ok=True)
    for path in destination.iterdir():
        if path.is_dir():
            shutil.rmtree(path)  # open_journal has seen that it holds nothing of others
        else:
            path.unlink()


def _is_finished(
    checkpoint: Checkpoint,
    choice: LayerChoice,
    companions: Companions,
    destination: Path,
    calibrated: str | None,
) -> bool:
    """Whether `destination` holds this conversion whole.

    The headers and config.json are compared, and of each tensor the first rows; of a calibrated
    conversion, which would have to be calibrated for that, its fingerprint. No file of the source
    may be younger than config.json, which is written last.
    """
    try:
        packed = open_packed(destination)
    except ValueError:
        return False
    written = (destination / CONFIG).stat().st_mtime_ns
    names = [CONFIG, *checkpoint.shards, *map(str, companions.copied)]
    sources = [checkpoint.path / name for name in names]
    if (
        packed.scheme != choice.scheme
        or not all((destination / name).is_file() for name in companions.copied)
        or {*packed.checkpoint.shards} - {MEANS_FILE} != {*checkpoint.shards}
        or any(file.stat().st_mtime_ns > written for file in sources)
    ):
        return False
    held = packed.checkpoint.tensors
    for shard in checkpoint.shards:
        stored = {
            name: StoredTensor(info.dtype, info.shape, info.nbytes)
            for name, info in held.items()
            if info.shard == shard
        }
        if stored != _contents(checkpoint, shard, choice):
            return False
    if calibrated is not None or recorded_fingerprint(destination) is not None:
        return recorded_fingerprint(destination) == calibrated
    return all(
        _begins_alike(checkpoint, packed.checkpoint, name, choice) for name in checkpoint.tensors
    )


def _begins_alike(source: Checkpoint, packed: Checkpoint, name: str, choice: LayerChoice) -> bool:
    """Whether the first rows of a tensor are stored as this conversion stores them."""
    layers = _packed_layers(source, name, choice)
    if not layers:
        chunks = (file.read_bytes(name, _COPY_BYTES) for file in (source, packed))
        first, second = (next(chunk, b"") for chunk in chunks)
        return first == second
    layer = layers[0]
    rows = next(source.read_rows(layer, _CHUNK_ELEMENTS // 4))
    expected = _quantized(rows, choice.formats[layer], f"{layer}.weight").packed
    for field, tensor in zip(STORED_FIELDS, expected.tensors, strict=True):
        data = tensor.flatten().view(torch.uint8).numpy().tobytes()
        if data and next(packed.read_bytes(f"{layer}.{field.stored}", len(data))) != data:
            return False
    return True


def _nothing_to_do(
    checkpoint: Checkpoint, choice: LayerChoice, companions: Companions, destination: Path
) -> ConversionResult:
    stored = [_contents(checkpoint, shard, choice) for shard in checkpoint.shards]
    return ConversionResult(
        source=checkpoint.path,
        destination=destination,
        layers=(),
        choice=choice,
        companions=companions,
        unheld=checkpoint.unheld,
        source_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        packed_bytes=sum(tensor.nbytes for shard in stored for tensor in shard.values()),
        resumed=0,
        finished_before=True,
    )
