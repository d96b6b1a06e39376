"""Converting a 16-bit checkpoint to a packed one, shard by shard, without building the model.

Everything is checked before the first byte is written. Each output file is written under a
temporary name, flushed to disk and renamed; config.json and the index come last. A journal in the
destination remembers finished shards, so that a rerun after a crash continues and ends with the
same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from dialect_kernels import __version__, quantize
from dialect_kernels.formatbook import Formatbook
from dialect_kernels.reference import blocks_below_window

from .checkpoint import CONFIG, INDEX, Checkpoint, CheckpointError, find_checkpoint, open_checkpoint
from .files import (
    check_destination,
    check_disk_space,
    copied_files,
    is_temporary,
    remove_temporary,
    sync_directory,
    write_file,
    write_text,
)
from .loss import signal_and_noise
from .model_card import model_card
from .plan_layers import ConvertOptions, LayerPlan, plan_layers
from .scheme import FORMAT_VERSION

__all__ = ["ConversionResult", "LayerRecord", "Progress", "convert"]

JOURNAL = ".blockdialect-journal.json"


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
    fingerprint = _fingerprint(checkpoint, options)
    journal = _open_journal(destination, fingerprint, overwrite)
    with _threads(workers):
        _check_weights(checkpoint, plan, progress)
        _check_disk_space(checkpoint, plan, destination)
        if overwrite and not journal["shards"]:
            _empty(destination)
        destination.mkdir(parents=True, exist_ok=True)
        remove_temporary(destination)
        resumed = len(journal["shards"])
        _write_journal(destination, journal)
        _convert_shards(checkpoint, plan, destination, journal, progress)
    return _finish(checkpoint, plan, destination, journal, resumed)


def _convert_shards(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    destination: Path,
    journal: dict[str, Any],
    progress: Progress,
) -> None:
    sizes = [info.nbytes for info in checkpoint.tensors.values()]
    progress.begin("quantizing", len(sizes), sum(sizes))
    for shard in checkpoint.shards:
        if shard in journal["shards"]:
            for info in checkpoint.tensors.values():
                if info.shard == shard:
                    progress.advance(info.nbytes)
            continue
        tensors, records = _convert_shard(checkpoint, shard, plan, progress)
        stored = {name: tensor.nbytes for name, tensor in tensors.items()}
        write_file(destination / shard, partial(save_file, tensors, metadata={"format": "pt"}))
        del tensors
        journal["shards"][shard] = {"records": [asdict(r) for r in records], "tensors": stored}
        _write_journal(destination, journal)


def _convert_shard(
    checkpoint: Checkpoint, shard: str, plan: LayerPlan, progress: Progress
) -> tuple[dict[str, torch.Tensor], list[LayerRecord]]:
    """The tensors of an output shard, and what was done."""
    book = plan.scheme.formatbook
    tensors: dict[str, torch.Tensor] = {}
    records = []
    with checkpoint.open_shard(shard) as file:
        for name, info in checkpoint.tensors.items():
            if info.shard != shard:
                continue
            layer = name.removesuffix(".weight")
            tensor = file.get_tensor(name)
            if name.endswith(".weight") and layer in plan.block_sizes:
                packed, record = _quantize_layer(tensor, layer, book, plan.block_sizes[layer])
                tensors |= packed
                records.append(record)
            else:
                tensors[name] = tensor
            progress.advance(info.nbytes)
    return tensors, records


def _quantize_layer(
    weight: torch.Tensor, layer: str, book: Formatbook, block_size: int
) -> tuple[dict[str, torch.Tensor], LayerRecord]:
    packed = quantize(weight, book, block_size, name=f"{layer}.weight")
    signal, noise = signal_and_noise(weight, packed.dequantize)
    below = blocks_below_window(weight, block_size, book.largest_stored_delta)
    record = LayerRecord(
        name=layer,
        rows=weight.shape[0],
        columns=weight.shape[1],
        block_size=block_size,
        packed_bytes=packed.nbytes,
        signal=signal,
        noise=noise,
        rows_below_window=int((below > 0).sum()),
    )
    tensors = {
        f"{layer}.weight_packed": packed.codes,
        f"{layer}.weight_meta": packed.meta,
        f"{layer}.weight_row_exponent": packed.row_exponent,
    }
    return tensors, record


def _finish(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    destination: Path,
    journal: dict[str, Any],
    resumed: int,
) -> ConversionResult:
    """Write everything but the shards, config.json and the index last, and drop the journal."""
    records = tuple(
        LayerRecord(**record)
        for shard in checkpoint.shards
        for record in journal["shards"][shard]["records"]
    )
    stored = {
        name: (shard, nbytes)
        for shard in checkpoint.shards
        for name, nbytes in journal["shards"][shard]["tensors"].items()
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
    config = dict(checkpoint.config)
    config.pop("auto_map", None)  # names Python files, which are never copied
    config["quantization_config"] = plan.scheme.to_config()
    write_text(destination / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if (checkpoint.path / INDEX).exists():
        index = {
            "metadata": {"total_size": result.packed_bytes},
            "weight_map": {name: shard for name, (shard, _) in sorted(stored.items())},
        }
        write_text(destination / INDEX, json.dumps(index, indent=2) + "\n")
    (destination / JOURNAL).unlink()
    sync_directory(destination)
    return result


def _open_journal(destination: Path, fingerprint: str, overwrite: bool) -> dict[str, Any]:
    """The journal of this same conversion, or a new one.

    Raises:
        CheckpointError: if the destination holds anything else and `overwrite` is not given.
    """
    fresh: dict[str, Any] = {"fingerprint": fingerprint, "shards": {}}
    if not destination.exists() or all(is_temporary(path) for path in destination.iterdir()):
        return fresh
    try:
        journal = json.loads((destination / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        journal = {}
    if journal.get("fingerprint") == fingerprint:
        kept = {k: v for k, v in journal["shards"].items() if (destination / k).is_file()}
        return {"fingerprint": fingerprint, "shards": kept}
    if overwrite:
        return fresh
    if journal:
        raise CheckpointError(
            f"{destination}: holds an unfinished conversion of another source or with other "
            "options; finish that one, choose another directory, or use --overwrite"
        )
    raise CheckpointError(
        f"{destination}: is not empty; choose another directory, or use --overwrite"
    )


def _fingerprint(checkpoint: Checkpoint, options: ConvertOptions) -> str:
    """Identifies source, options and what writes the bytes."""
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(checkpoint.path.iterdir())
        if file.is_file()
    ]
    parts = [str(checkpoint.path.resolve()), files, options.model_dump(mode="json"), __version__]
    return hashlib.sha256(json.dumps([*parts, FORMAT_VERSION]).encode()).hexdigest()


def _check_weights(checkpoint: Checkpoint, plan: LayerPlan, progress: Progress) -> None:
    """Raise ValueError at the first NaN or Inf in a weight that will be quantized."""
    infos = {f"{name}.weight": checkpoint.tensors[f"{name}.weight"] for name in plan.block_sizes}
    progress.begin("checking", len(infos), sum(info.nbytes for info in infos.values()))
    for shard in checkpoint.shards:
        with checkpoint.open_shard(shard) as file:
            for name, info in infos.items():
                if info.shard != shard:
                    continue
                weight = file.get_tensor(name)
                finite = weight.isfinite()
                if not bool(finite.all()):
                    position = (~finite).nonzero()[0].tolist()
                    raise CheckpointError(
                        f"{name} in {shard}: {float(weight[tuple(position)])} at {position}; only "
                        "finite weights can be quantized: repair the checkpoint, or --ignore "
                        f"{name.removesuffix('.weight')}"
                    )
                progress.advance(info.nbytes)


def _check_disk_space(checkpoint: Checkpoint, plan: LayerPlan, destination: Path) -> None:
    needed = 0
    for name, info in checkpoint.tensors.items():
        layer = name.removesuffix(".weight")
        if layer in plan.block_sizes and name.endswith(".weight"):
            rows, columns = info.shape
            needed += rows * (columns // 2 + columns // plan.block_sizes[layer] + 1)
        else:
            needed += info.nbytes
    check_disk_space(destination, needed)


def _empty(destination: Path) -> None:
    """Delete what `overwrite` replaces, config.json first: what is left is no checkpoint."""
    if not destination.exists():
        return
    for name in (CONFIG, INDEX, JOURNAL):
        (destination / name).unlink(missing_ok=True)
    for entry in destination.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write_journal(destination: Path, journal: dict[str, Any]) -> None:
    write_text(destination / JOURNAL, json.dumps(journal))


@contextmanager
def _threads(workers: int | None) -> Iterator[None]:
    """Run with `workers` CPU threads (default: all this process may use)."""
    before = torch.get_num_threads()
    torch.set_num_threads(workers or _usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _usable_cores() -> int:
    """Cores this process may use; systems other than Linux do not tell, so all of them there."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
