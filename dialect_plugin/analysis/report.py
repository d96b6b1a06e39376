"""Comparing 4-bit formats layer by layer, before anything is converted.

Each weight is rounded to BlockDialect with blocks of 16, 32 and 64 (dialects by exact error), to
MXFP4 with blocks of 32 and to NVFP4 with blocks of 16. Sums over some rows of a layer, evenly
spread, stand for all its rows. The report measures the error of the weights, not of the model:
formats that take different numbers of bits, or have similar errors, can be compared by perplexity
only. With a rotation, all formats round the rotated weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from dialect_kernels import PackedTensor
from dialect_kernels.baselines import quantize_mxfp4, quantize_nvfp4
from dialect_kernels.formatbook import (
    BLOCK_SIZES,
    DIALECT_FP4,
    ROTATION_GROUP,
    Formatbook,
    Rotation,
)
from dialect_kernels.ops import dequantize, quantize_counted
from dialect_kernels.rotation import rotate_weight

from ..architectures import is_embedding
from ..checkpoint.loss import signal_and_noise, sqnr
from ..checkpoint.progress import Progress
from ..checkpoint.reader import Checkpoint
from ..checkpoint.tables import layer_table, shape_cell
from ..checkpoint.workers import Workers
from ..experts import expert_of, name_for_all, stacks

__all__ = [
    "SAMPLED_ROWS",
    "Format",
    "FormatLoss",
    "LayerReport",
    "Report",
    "dialect_bits",
    "dialect_format",
    "dialect_name",
    "measure_layers",
    "render",
    "report_formats",
    "sample_note",
    "sampled_rows",
    "sqnr_cells",
]

SAMPLED_ROWS = 256
"""Rows of a layer that are measured by default."""
_FEWEST = 16
"""Rows of each expert that are measured, where the experts of a decoder layer share the rows."""


class _Rounded(NamedTuple):
    """Some rows of a weight after rounding."""

    values: torch.Tensor
    """Fresh, float32."""
    dialects: torch.Tensor | None
    """Blocks per dialect id, if the format has dialects."""


@dataclass(frozen=True)
class Format:
    """A format to compare.

    Attributes:
        name: what tables call it.
        columns: the multiple of columns that it needs.
        bits: (rows, columns) -> stored bits per weight, scales included.
        round: (some rows, the largest magnitude of the weight) -> the rounded rows.
    """

    name: str
    columns: int
    bits: Callable[[int, int], float]
    round: Callable[[torch.Tensor, torch.Tensor], _Rounded]


@dataclass(frozen=True)
class FormatLoss:
    """The loss of a layer in a format.

    Attributes:
        bits_per_weight: stored bits per weight, scales included.
        noise: sum of the squared error over all rows (an estimate if rows were sampled).
        sqnr_db: signal to quantization noise.
        dialects: blocks per dialect id among the measured rows, or None for other formats.
    """

    bits_per_weight: float
    noise: float
    sqnr_db: float
    dialects: tuple[int, ...] | None


@dataclass(frozen=True)
class LayerReport:
    """One layer in all formats whose blocks divide its columns.

    Attributes:
        name: the layer; of routed experts, the name of a matrix of all of them.
        rows, columns: shape of its weight; of one expert's.
        measured_rows: how many of these rows were measured.
        signal: sum of x**2 over all rows (an estimate if rows were sampled).
        losses: format -> its loss.
        matrices: how many weights of this shape it has: one, or as many as experts.
    """

    name: str
    rows: int
    columns: int
    measured_rows: int
    signal: float
    losses: dict[str, FormatLoss]
    matrices: int = 1

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.matrices * self.rows * self.columns


@dataclass(frozen=True)
class Report:
    """A checkpoint's layers in all formats.

    Attributes:
        source: name of the checkpoint.
        formats: names of the formats, in the order to show them.
        layers: one entry per layer that a conversion would quantize.
        rotation: of the weights in which it divides the columns.
    """

    source: str
    formats: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    rotation: Rotation = "none"

    def totals(self) -> dict[str, FormatLoss]:
        """Each format over all layers that have it: bits by weight, SQNR of the summed error."""
        return {name: _together(self.layers, name) for name in self.formats}

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON data; an SQNR without noise, which is infinite, is None."""
        totals = {name: _loss_to_json(loss) for name, loss in self.totals().items()}
        layers = [
            asdict(layer)
            | {"losses": {name: _loss_to_json(loss) for name, loss in layer.losses.items()}}
            for layer in self.layers
        ]
        return {
            "source": self.source,
            "formats": list(self.formats),
            "rotation": self.rotation,
            "layers": layers,
            "totals": totals,
        }


def _together(layers: Sequence[LayerReport], name: str) -> FormatLoss:
    """A format over all layers that have it: bits by weight, SQNR of the summed error."""
    having = [layer for layer in layers if name in layer.losses]
    losses = [layer.losses[name] for layer in having]
    counts = [loss.dialects for loss in losses if loss.dialects is not None]
    weights = sum(layer.weights for layer in having)
    noise = sum(loss.noise for loss in losses)
    return FormatLoss(
        bits_per_weight=sum(x.weights * x.losses[name].bits_per_weight for x in having)
        / max(1, weights),
        noise=noise,
        sqnr_db=sqnr(sum(layer.signal for layer in having), noise),
        dialects=tuple(map(sum, zip(*counts, strict=True))) if counts else None,
    )


class _Sampled(Protocol):
    """A layer of which some rows were measured."""

    @property
    def rows(self) -> int: ...
    @property
    def measured_rows(self) -> int: ...


def _loss_to_json(loss: FormatLoss) -> dict[str, Any]:
    finite = loss.sqnr_db if math.isfinite(loss.sqnr_db) else None
    return asdict(loss) | {"sqnr_db": finite}


def dialect_name(block_size: int) -> str:
    """The name of the format with blocks of `block_size` in tables."""
    return f"BlockDialect-{block_size}"


def dialect_bits(rows: int, columns: int, block_size: int) -> float:
    """Stored bits per weight of a layer in blocks of `block_size`."""
    packed = PackedTensor.empty((rows, columns), DIALECT_FP4, block_size, "meta")
    return packed.bits_per_element


def dialect_format(block_size: int, book: Formatbook = DIALECT_FP4) -> Format:
    """Dialects chosen by exact error, in blocks of `block_size`."""

    def round_(rows: torch.Tensor, largest: torch.Tensor) -> _Rounded:
        packed = quantize_counted(rows, book, block_size, finite=True).packed
        counts = torch.bincount(packed.ids().flatten().int(), minlength=len(book))
        return _Rounded(dequantize(packed), counts)

    return Format(
        dialect_name(block_size), block_size, partial(dialect_bits, block_size=block_size), round_
    )


def report_formats(book: Formatbook = DIALECT_FP4) -> tuple[Format, ...]:
    """The formats of ``blockdialect report``."""
    return (
        *(dialect_format(block_size, book) for block_size in BLOCK_SIZES),
        Format(
            "MXFP4-32",
            32,
            lambda rows, columns: 4 + 8 / 32,
            lambda rows, largest: _Rounded(quantize_mxfp4(rows), None),
        ),
        Format(
            "NVFP4-16",
            16,
            lambda rows, columns: 4 + 8 / 16,
            lambda rows, largest: _Rounded(quantize_nvfp4(rows, largest=largest), None),
        ),
    )


def measure_layers(
    checkpoint: Checkpoint,
    layers: Sequence[str],
    formats: Sequence[Format],
    progress: Progress,
    max_rows: int | None = None,
    rotation: Rotation = "none",
) -> tuple[LayerReport, ...]:
    """Round each layer's weight to each format whose blocks divide its columns, on all cores.

    Args:
        checkpoint: the 16-bit source.
        layers: names of the layers, matrices of experts among them.
        formats: the formats.
        progress: receives every layer.
        max_rows: measure at most this many rows of a layer, spread evenly and always the same ones
            (NVFP4's scale of the tensor is then that of the sample); None for all. Experts share
            them (:func:`sampled_rows`).
        rotation: of the weights before they are rounded, where it divides their columns; embeddings
            are not rotated.

    Returns:
        One entry for each layer, and one for each matrix of all experts of a decoder layer.

    Raises:
        ValueError: naming tensor and position, if a measured row holds NaN or Inf.
        CheckpointError: if a file is damaged.
    """
    infos = [checkpoint.weights[name] for name in layers]
    progress.begin("measuring", len(layers), sum(info.nbytes for info in infos))
    members = stacks(layers)

    def measure(name: str) -> LayerReport:
        count = sampled_rows(
            checkpoint.weights[name].shape[0], max_rows, len(members[name_for_all(name)])
        )
        own = "none" if is_embedding(name) else rotation
        if expert_of(name) is not None:
            (weight,) = checkpoint.read_rows(name, 1 << 62)  # all rows
            return _measure_layer(name, weight, formats, count, own)
        with checkpoint.open_shard(checkpoint.tensors[f"{name}.weight"].shard) as file:
            weight = file.get_tensor(f"{name}.weight")  # a map of the file: rows are read when used
        return _measure_layer(name, weight, formats, count, own)

    reports = {}
    with Workers() as workers:
        for info, report in zip(infos, workers.map(measure, layers), strict=True):
            reports[report.name] = report
            progress.advance(info.nbytes)
    return tuple(
        _layer_report(name, [reports[member] for member in parts])
        for name, parts in members.items()
    )


def _layer_report(name: str, parts: Sequence[LayerReport]) -> LayerReport:
    """A layer, or a matrix of all experts, of which each has one."""
    first = parts[0]
    losses = {format_name: _together(parts, format_name) for format_name in first.losses}
    signal = sum(part.signal for part in parts)
    shape = first.rows, first.columns
    return LayerReport(name, *shape, first.measured_rows, signal, losses, len(parts))


def sampled_rows(rows: int, max_rows: int | None, experts: int = 1) -> int:
    """How many rows of a weight are measured.

    Args:
        rows: of the weight.
        max_rows: at most so many of a layer; None for all. Experts share them, but no fewer than 16
            of each are measured.
        experts: as many as have a matrix in the layer.
    """
    if max_rows is None:
        return rows
    return min(rows, max_rows, max(_FEWEST, max_rows // experts))


def _measure_layer(
    name: str,
    weight: torch.Tensor,
    formats: Sequence[Format],
    count: int,
    rotation: Rotation,
) -> LayerReport:
    """One weight, measured on `count` of its rows."""
    rows, columns = weight.shape
    chosen = torch.arange(count) * rows // max(1, count)
    if count < rows:
        weight = weight[chosen]
    largest = _largest(f"{name}.weight", weight, chosen)
    scale = rows / max(1, count)
    if rotation != "none" and columns % ROTATION_GROUP == 0:
        weight = rotate_weight(weight, rotation)
        largest = _largest(f"{name}.weight, rotated", weight, chosen)
        scale /= ROTATION_GROUP  # a rotated weight has so many times the energy
    signal, losses = 0.0, {}
    for entry in formats:
        if columns % entry.columns:
            continue
        counts: list[torch.Tensor] = []

        def rounded(
            start: int, stop: int, entry: Format = entry, counts: list[torch.Tensor] = counts
        ) -> torch.Tensor:
            values, dialects = entry.round(weight[start:stop], largest)
            if dialects is not None:
                counts.append(dialects)
            return values

        signal, noise = signal_and_noise(weight, rounded)
        dialects = tuple(torch.stack(counts).sum(dim=0).tolist()) if counts else None
        bits = entry.bits(rows, columns)
        losses[entry.name] = FormatLoss(bits, noise * scale, sqnr(signal, noise), dialects)
    return LayerReport(name, rows, columns, count, signal * scale, losses)


def _largest(name: str, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of the `chosen` rows of a weight, float32 [].

    Raises:
        ValueError: naming the position in the whole tensor, if they hold NaN or Inf.
    """
    if not rows.numel():
        return torch.zeros(())
    ends = [end.abs() for end in torch.aminmax(rows)]  # NaN if any element is
    if all(bool(end.isfinite()) for end in ends):
        return torch.maximum(*ends).to(torch.float32)
    row, column = (~rows.isfinite()).nonzero()[0].tolist()
    raise ValueError(
        f"{name}: {float(rows[row, column])} at [{int(chosen[row])}, {column}]; only finite values "
        "can be quantized: repair the tensor or leave it in 16 bit"
    )


def render(report: Report) -> str:
    """SQNR over all layers, per projection, per decoder layer and per layer."""
    heads = [
        name.replace("BlockDialect", "Block\nDialect").replace("-", "\n") for name in report.formats
    ]

    def cells(layers: Sequence[LayerReport]) -> list[str]:
        having = {name for layer in layers for name in layer.losses}
        totals = Report(report.source, report.formats, tuple(layers)).totals()
        losses = {name: loss for name, loss in totals.items() if name in having}
        return [shape_cell(layers), *sqnr_cells(losses, report.formats)]

    bits = [f"{loss.bits_per_weight:.3f}" for loss in report.totals().values()]
    first = [("bits per weight", "", *bits)]
    table = layer_table(["shape", *heads], report.layers, cells, first=first)
    rotated = "" if report.rotation == "none" else f", rotated by {report.rotation},"
    return f"SQNR of the weights{rotated} in dB\n{sample_note(report.layers)}\n\n{table}"


def sample_note(layers: Sequence[_Sampled]) -> str:
    """Which rows of the layers were measured, in a line."""
    sampled = [layer.measured_rows for layer in layers if layer.measured_rows < layer.rows]
    if not sampled:
        return "measured on all rows of every layer"
    return f"measured on at most {max(sampled)} rows of a layer, evenly spread (--all-rows: on all)"


def sqnr_cells(losses: Mapping[str, FormatLoss], formats: Sequence[str]) -> list[str]:
    """A cell per format; a dash where its blocks do not divide the columns."""
    return [f"{losses[name].sqnr_db:.2f}" if name in losses else "–" for name in formats]
