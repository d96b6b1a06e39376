"""Comparing 4-bit formats layer by layer, before anything is converted.

Each weight is rounded to BlockDialect with blocks of 16, 32 and 64 (dialects by exact error), to
MXFP4 with blocks of 32 and to NVFP4 with blocks of 16. The report measures the error of the
weights, not of the model: formats that take different numbers of bits, or have similar errors, can
be compared by perplexity only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from dialect_kernels import quantize
from dialect_kernels.baselines import quantize_mxfp4, quantize_nvfp4
from dialect_kernels.formatbook import BLOCK_SIZES, DIALECT_FP4, Formatbook
from dialect_kernels.ops import dequantize

from ..checkpoint.loss import signal_and_noise, sqnr
from ..checkpoint.progress import Progress
from ..checkpoint.reader import Checkpoint

__all__ = [
    "FORMATS",
    "Format",
    "FormatLoss",
    "LayerReport",
    "Report",
    "dialect_format",
    "dialect_name",
    "measure_layers",
    "render",
    "sqnr_cells",
]

_Rounded = tuple[Callable[[int, int], torch.Tensor], float, tuple[int, ...] | None]
"""Rows start..stop-1 of the rounded weight (fresh, float32), stored bits per weight, and blocks per
dialect if any."""


@dataclass(frozen=True)
class Format:
    """A format to compare: its name, the multiple of columns it needs, and how it rounds."""

    name: str
    columns: int
    round: Callable[[torch.Tensor, str], _Rounded]


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
        name: the layer.
        rows, columns: shape of its weight.
        measured_rows: how many of its rows were measured.
        signal: sum of x**2 over all rows (an estimate if rows were sampled).
        losses: format -> its loss.
    """

    name: str
    rows: int
    columns: int
    measured_rows: int
    signal: float
    losses: dict[str, FormatLoss]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Report:
    """A checkpoint's layers in all formats.

    Attributes:
        source: name of the checkpoint.
        formats: names of the formats, in the order to show them.
        layers: one entry per layer that a conversion would quantize.
    """

    source: str
    formats: tuple[str, ...]
    layers: tuple[LayerReport, ...]

    def totals(self) -> dict[str, FormatLoss]:
        """Each format over all layers that have it: bits by weight, SQNR of the summed error."""
        totals = {}
        for name in self.formats:
            having = [layer for layer in self.layers if name in layer.losses]
            losses = [layer.losses[name] for layer in having]
            counts = [loss.dialects for loss in losses if loss.dialects is not None]
            weights = sum(layer.weights for layer in having)
            bits = sum(x.weights * x.losses[name].bits_per_weight for x in having)
            noise = sum(loss.noise for loss in losses)
            totals[name] = FormatLoss(
                bits_per_weight=bits / max(1, weights),
                noise=noise,
                sqnr_db=sqnr(sum(layer.signal for layer in having), noise),
                dialects=tuple(map(sum, zip(*counts, strict=True))) if counts else None,
            )
        return totals

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
            "layers": layers,
            "totals": totals,
        }


def _loss_to_json(loss: FormatLoss) -> dict[str, Any]:
    finite = loss.sqnr_db if math.isfinite(loss.sqnr_db) else None
    return asdict(loss) | {"sqnr_db": finite}


def dialect_name(block_size: int) -> str:
    """The name of the format with blocks of `block_size` in tables."""
    return f"BlockDialect-{block_size}"


def dialect_format(block_size: int, book: Formatbook = DIALECT_FP4) -> Format:
    """Dialects chosen by exact error, in blocks of `block_size`."""

    def round_(weight: torch.Tensor, name: str) -> _Rounded:
        packed = quantize(weight, book, block_size, name=f"{name}.weight")
        counts = torch.bincount(packed.ids().flatten().int(), minlength=len(book))

        def rows(start: int, stop: int) -> torch.Tensor:
            return dequantize(packed.slice_rows(start, stop))

        return rows, packed.bits_per_element, tuple(counts.tolist())

    return Format(dialect_name(block_size), block_size, round_)


def _mxfp4_32(weight: torch.Tensor, name: str) -> _Rounded:
    rounded = quantize_mxfp4(weight, 32)
    return lambda start, stop: rounded[start:stop], 4 + 8 / 32, None


def _nvfp4_16(weight: torch.Tensor, name: str) -> _Rounded:
    rounded = quantize_nvfp4(weight)  # whole, because its scale is that of the tensor
    return lambda start, stop: rounded[start:stop], 4 + 8 / 16, None


FORMATS = (
    *(dialect_format(block_size) for block_size in BLOCK_SIZES),
    Format("MXFP4-32", 32, _mxfp4_32),
    Format("NVFP4-16", 16, _nvfp4_16),
)
"""The formats of ``blockdialect report``."""


def measure_layers(
    checkpoint: Checkpoint,
    layers: Sequence[str],
    formats: Sequence[Format],
    progress: Progress,
    max_rows: int | None = None,
) -> tuple[LayerReport, ...]:
    """Round each layer's weight to each format whose blocks divide its columns.

    Args:
        checkpoint: the 16-bit source.
        layers: names of the layers.
        formats: the formats.
        progress: receives every layer.
        max_rows: measure at most this many rows of a layer, spread evenly and always the same ones
            (NVFP4's scale of the tensor is then that of the sample); None for all.

    Raises:
        ValueError: naming tensor and position, if a weight holds NaN or Inf.
        CheckpointError: if a file is damaged.
    """
    infos = [checkpoint.tensors[f"{name}.weight"] for name in layers]
    progress.begin("measuring", len(layers), sum(info.nbytes for info in infos))
    reports = []
    for name, info in zip(layers, infos, strict=True):
        with checkpoint.open_shard(info.shard) as file:
            weight = file.get_tensor(f"{name}.weight")
        reports.append(_measure_layer(name, weight, formats, max_rows))
        progress.advance(info.nbytes)
    return tuple(reports)


def _measure_layer(
    name: str, weight: torch.Tensor, formats: Sequence[Format], max_rows: int | None
) -> LayerReport:
    rows, columns = weight.shape
    if max_rows is not None and rows > max_rows:
        weight = weight[torch.arange(max_rows) * rows // max_rows]
    scale = rows / max(1, weight.shape[0])
    signal, losses = 0.0, {}
    for entry in formats:
        if columns % entry.columns:
            continue
        rounded, bits, dialects = entry.round(weight, name)
        signal, noise = signal_and_noise(weight, rounded)
        losses[entry.name] = FormatLoss(bits, noise * scale, sqnr(signal, noise), dialects)
    return LayerReport(name, rows, columns, weight.shape[0], signal * scale, losses)


def render(report: Report) -> Table:
    """SQNR per layer and format, and over all layers."""
    totals = report.totals()
    heads = [f"{name}\n{loss.bits_per_weight:.3f} bits" for name, loss in totals.items()]
    table = Table(title="SQNR of the weights, dB", show_footer=True)
    table.add_column("layer", footer="all layers", overflow="fold")
    table.add_column("shape", footer=f"{sum(layer.weights for layer in report.layers):,}")
    for head, loss in zip(heads, totals.values(), strict=True):
        table.add_column(head, footer=f"{loss.sqnr_db:.2f}", justify="right")
    for layer in report.layers:
        table.add_row(
            layer.name, f"{layer.rows} x {layer.columns}", *sqnr_cells(layer.losses, report.formats)
        )
    return table


def sqnr_cells(losses: Mapping[str, FormatLoss], formats: Sequence[str]) -> list[str]:
    """A cell per format; a dash where its blocks do not divide the columns."""
    return [f"{losses[name].sqnr_db:.2f}" if name in losses else "–" for name in formats]
