"""Converting a 16-bit checkpoint to a packed one, shard by shard, without building the model.

Everything is checked before the first byte is written. Each output file is written under a
temporary name, flushed to disk and renamed; config.json and the index come last. A journal in the
destination remembers finished shards, so that a rerun after a crash continues and ends with the
same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from dialect_kernels import PackedTensor, quantize
from dialect_kernels.reference import blocks_below_window

from .journal import FinishedShard, Journal, LayerRecord, fingerprint, open_journal
from .layer_choice import ConvertOptions, LayerPlan, plan_layers
from .loss import signal_and_noise
from .model_card import model_card
from .reader import (
    CONFIG,
    INDEX,
    JOURNAL,
    PACKED_SUFFIXES,
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    open_checkpoint,
)
from .workers import Workers
from .writer import (
    ShardWriter,
    StoredTensor,
    check_destination,
    check_disk_space,
    copied_files,
    exclusive,
    remove_temporary,
    sync_directory,
    write_file,
    write_text,
)

__all__ = ["ConversionResult", "LayerRecord", "Progress", "convert"]

_PACKED_DTYPES = ("U8", "U8", "I8")
_CHUNK_ELEMENTS = 1 << 18  # fits in the cache; memory is some 16 bytes per element and worker
_COPY_BYTES = 1 << 24


class Progress(Protocol):
    """Receives what a conversion is doing."""

    def begin(self, what: str, tensors: int, nbytes: int) -> None:
        """A pass over `tensors` tensors of `nbytes` bytes together begins."""

    def advance(self, nbytes: int) -> None:
        """One tensor of `nbytes` bytes is done."""


class _Silent:
    def begin(self, what: str, tensors: int, nbytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...


@dataclass(frozen=True)
class ConversionResult:
    """A finished conversion.

    Attributes:
        destination: the packed checkpoint.
        layers: one record per quantized layer.
        plan: what was decided, with the layers that were adapted or left in 16 bit.
        source_bytes, packed_bytes: bytes of all tensors before and after.
        resumed: shards that an earlier, unfinished run had written.
    """

    destination: Path
    layers: tuple[LayerRecord, ...]
    plan: LayerPlan
    source_bytes: int
    packed_bytes: int
    resumed: int


def convert(
    source: str | Path,
    destination: str | Path,
    options: ConvertOptions | None = None,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ConversionResult:
    """Quantize a checkpoint.

    Args:
        source: directory or hub id of a 16-bit safetensors checkpoint.
        destination: directory to write; must not exist, be empty, or hold this same conversion
            unfinished.
        options: what to quantize and how.
        overwrite: replace what is in `destination`.
        workers: CPU threads, default all; the bytes do not depend on it.
        progress: is told about every tensor.

    Raises:
        CheckpointError, SchemeError, ValueError: one sentence, before anything is written, if
            source, options or destination cannot be used or a weight holds NaN or Inf.
        OSError: if writing fails; a rerun continues.
    """
    options = options or ConvertOptions()
    progress = progress or _Silent()
    destination = Path(destination)
    checkpoint = open_checkpoint(find_checkpoint(source))
    plan = plan_layers(checkpoint, options)
    check_destination(checkpoint.path, destination)
    journal = open_journal(destination, fingerprint(checkpoint, options), overwrite)
    resumed = len(journal.shards)
    layouts = [_layout(checkpoint, s, plan) for s in checkpoint.shards if s not in journal.shards]
    check_disk_space(destination, sum(t.nbytes for layout in layouts for t in layout.values()))
    with Workers(workers) as pool:
        _check_weights(checkpoint, plan, journal, progress, pool)
        destination.mkdir(parents=True, exist_ok=True)
        with exclusive(destination):
            if overwrite and not resumed:
                _empty(destination)
            remove_temporary(destination)
            journal.write(destination)
            _convert_shards(checkpoint, plan, destination, journal, progress, pool)
            return _finish(checkpoint, plan, destination, journal, resumed)


def _convert_shards(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    destination: Path,
    journal: Journal,
    progress: Progress,
    workers: Workers,
) -> None:
    sizes = [info.nbytes for info in checkpoint.tensors.values()]
    progress.begin("quantizing", len(sizes), sum(sizes))
    for shard in checkpoint.shards:
        if shard in journal.shards:
            for info in checkpoint.tensors.values():
                if info.shard == shard:
                    progress.advance(info.nbytes)
            continue
        records: list[LayerRecord] = []
        write = partial(_write_shard, checkpoint, shard, plan, progress, workers, records)
        write_file(destination / shard, write)
        journal.shards[shard] = FinishedShard(
            records=records,
            tensors={name: t.nbytes for name, t in _layout(checkpoint, shard, plan).items()},
            file_bytes=(destination / shard).stat().st_size,
        )
        journal.write(destination)


def _layout(checkpoint: Checkpoint, shard: str, plan: LayerPlan) -> dict[str, StoredTensor]:
    """What the output shard holds."""
    stored = {}
    for name, info in checkpoint.tensors.items():
        if info.shard != shard:
            continue
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in plan.block_sizes:
            rows, columns = info.shape
            blocks = columns // plan.block_sizes[layer]
            shapes = ((rows, columns // 2), (rows, blocks), (rows,))
            for suffix, dtype, shape in zip(PACKED_SUFFIXES, _PACKED_DTYPES, shapes, strict=True):
                stored[layer + suffix] = StoredTensor(dtype, shape, math.prod(shape))
        else:
            stored[name] = StoredTensor(info.dtype, info.shape, info.nbytes)
    return stored


def _write_shard(
    checkpoint: Checkpoint,
    shard: str,
    plan: LayerPlan,
    progress: Progress,
    workers: Workers,
    records: list[LayerRecord],
    path: Path,
) -> None:
    """Write an output shard to `path` and add what was done to `records`."""
    with path.open("wb") as file:
        writer = ShardWriter(file, _layout(checkpoint, shard, plan))
        for name, info in checkpoint.tensors.items():
            if info.shard != shard:
                continue
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer in plan.block_sizes:
                records.append(_write_layer(checkpoint, layer, plan, writer, workers))
            else:
                for chunk in checkpoint.read_bytes(name, _COPY_BYTES):
                    writer.append(name, chunk)
            progress.advance(info.nbytes)
        writer.finish()


def _write_layer(
    checkpoint: Checkpoint, layer: str, plan: LayerPlan, writer: ShardWriter, workers: Workers
) -> LayerRecord:
    """Quantize a layer group of rows by group of rows, which gives the bytes of the whole."""
    name, block_size = f"{layer}.weight", plan.block_sizes[layer]
    book = plan.scheme.formatbook

    def quantize_rows(weight: torch.Tensor) -> tuple[PackedTensor, float, float, int]:
        packed = quantize(weight, book, block_size, name=name)
        signal, noise = signal_and_noise(weight, packed.dequantize)
        return packed, signal, noise, _rows_below_window(weight, packed)

    packed_bytes, signal, noise, below = 0, 0.0, 0.0, 0
    groups = checkpoint.read_rows(name, _CHUNK_ELEMENTS)
    for packed, group_signal, group_noise, group_below in workers.map(quantize_rows, groups):
        parts = (packed.codes, packed.meta, packed.row_exponent)
        for suffix, part in zip(PACKED_SUFFIXES, parts, strict=True):
            writer.append(layer + suffix, part.numpy().tobytes())
        packed_bytes += packed.nbytes
        signal, noise, below = signal + group_signal, noise + group_noise, below + group_below
    rows, columns = checkpoint.tensors[name].shape
    return LayerRecord(layer, rows, columns, block_size, packed_bytes, signal, noise, below)


def _rows_below_window(weight: torch.Tensor, packed: PackedTensor) -> int:
    window = packed.book.largest_stored_delta
    rows, blocks = packed.meta.shape
    # a block below the window has the largest delta, or became zeros: only such rows are counted
    zeros = (packed.codes.view(torch.int64).view(rows, blocks, -1) == 0).all(dim=2)
    suspects = ((packed.deltas() == window) | zeros).any(dim=1)
    if not bool(suspects.any()):
        return 0
    below = blocks_below_window(weight[suspects], packed.block_size, window)
    return int((below > 0).sum())


def _finish(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    destination: Path,
    journal: Journal,
    resumed: int,
) -> ConversionResult:
    """Write everything but the shards, config.json and the index last, and drop the journal."""
    records = tuple(
        record for shard in checkpoint.shards for record in journal.shards[shard].records
    )
    stored = {
        name: (shard, nbytes)
        for shard in checkpoint.shards
        for name, nbytes in journal.shards[shard].tensors.items()
    }
    result = ConversionResult(
        destination=destination,
        layers=records,
        plan=plan,
        source_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        packed_bytes=sum(nbytes for _, nbytes in stored.values()),
        resumed=resumed,
    )
    for file in copied_files(checkpoint.path):
        write_file(destination / file.name, partial(shutil.copyfile, file))
    write_text(destination / "README.md", model_card(checkpoint, result.layers, plan))
    if (checkpoint.path / INDEX).exists():
        index = {
            "metadata": {"total_size": result.packed_bytes},
            "weight_map": {name: shard for name, (shard, _) in sorted(stored.items())},
        }
        write_text(destination / INDEX, json.dumps(index, indent=2) + "\n")
    config = dict(checkpoint.config)
    config.pop("auto_map", None)  # names Python files, which are never copied
    config["quantization_config"] = plan.scheme.to_config()
    write_text(destination / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (destination / JOURNAL).unlink()
    sync_directory(destination)
    return result


def _check_weights(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    journal: Journal,
    progress: Progress,
    workers: Workers,
) -> None:
    """Raise CheckpointError at the first NaN or Inf in a weight that will be quantized."""
    infos = {f"{name}.weight": checkpoint.tensors[f"{name}.weight"] for name in plan.block_sizes}
    infos = {name: info for name, info in infos.items() if info.shard not in journal.shards}
    progress.begin("checking", len(infos), sum(info.nbytes for info in infos.values()))
    for name, info in infos.items():
        groups = checkpoint.read_rows(name, _CHUNK_ELEMENTS)
        first_row = 0
        for rows, fault in workers.map(_first_not_finite, groups):
            if fault is not None:
                row, column, value = fault
                raise CheckpointError(
                    f"{name} in {info.shard}: {value} at [{first_row + row}, {column}]; only "
                    "finite weights can be quantized: repair the checkpoint, or --ignore "
                    f"{name.removesuffix('.weight')}"
                )
            first_row += rows
        progress.advance(info.nbytes)


def _first_not_finite(weight: torch.Tensor) -> tuple[int, tuple[int, int, float] | None]:
    """The number of rows, and row, column and value of the first NaN or Inf."""
    rows = weight.shape[0]
    if not weight.numel() or all(bool(end.isfinite()) for end in torch.aminmax(weight)):
        return rows, None  # minimum and maximum are NaN if any element is
    row, column = (~weight.isfinite()).nonzero()[0].tolist()
    return rows, (row, column, float(weight[row, column]))


def _empty(destination: Path) -> None:
    """Delete the files `overwrite` replaces, config.json first: what is left is no checkpoint."""
    (destination / CONFIG).unlink(missing_ok=True)
    for file in destination.iterdir():
        file.unlink()
