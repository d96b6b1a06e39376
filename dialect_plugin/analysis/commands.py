"""What the commands ``report`` and ``plan`` do, between their options and their output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from dialect_kernels.formatbook import BLOCK_SIZES, ROTATIONS, BookName, book_by_name

from ..calibration.options import CalibrationOptions
from ..checkpoint.layer_choice import choose_layers
from ..checkpoint.options import ConvertOptions
from ..checkpoint.progress import Progress
from ..checkpoint.reader import Checkpoint, find_checkpoint, open_checkpoint
from ..checkpoint.tables import natural_order
from ..experts import stacks
from ..scheme import LayerFormat, Scheme
from . import bit_budget, output_report, precision, report
from .output_error import measure_outputs
from .output_formats import output_formats
from .report_page import output_page, report_page

__all__ = [
    "FoundPlan",
    "FoundReport",
    "other_forms",
    "plan_by_outputs",
    "plan_by_weights",
    "report_on",
]


@dataclass(frozen=True)
class FoundReport:
    """A report in three forms.

    Attributes:
        table: plain text.
        data: JSON data.
        page: makes the HTML page.
    """

    table: str
    data: dict[str, Any]
    page: Callable[[], str]


@dataclass(frozen=True)
class FoundPlan:
    """A plan.

    Attributes:
        table: plain text.
        overrides: the layers that differ, as ``quantize --overrides`` reads them.
    """

    table: str
    overrides: dict[str, dict[str, Any]]


def report_on(
    source: str,
    options: ConvertOptions,
    calibration: CalibrationOptions | None,
    max_rows: int | None,
    progress: Progress,
) -> FoundReport:
    """Compare formats on the weights of a checkpoint or, with text, on its layers' outputs.

    Args:
        source: directory or hub id of a 16-bit checkpoint.
        options: choose layers, book and rotation.
        calibration: the text; None for the weights.
        max_rows: measure at most this many rows of a layer; None for all.
        progress: receives every layer.

    Raises:
        ValueError: one sentence, if source, options or text cannot be used.
    """
    checkpoint, layers = _chosen(source, options)
    name, scheme = checkpoint.path.resolve().name, options.scheme
    book = book_by_name(scheme.book)
    if calibration is None:
        formats = report.report_formats(book)
        measured = report.measure_layers(
            checkpoint, list(layers), formats, progress, max_rows, scheme.rotation
        )
        found = report.Report(name, tuple(f.name for f in formats), measured, scheme.rotation)
        return FoundReport(report.render(found), found.to_json(), partial(report_page, found))
    compared = output_formats(book, peers=True)
    seen = measure_outputs(checkpoint, layers, compared, calibration, progress, max_rows)
    outputs = output_report.OutputReport(
        name,
        calibration.calibrate,
        tuple(entry.name for entry in compared),
        seen,
        scheme.book,
        scheme.rotation,
        output_report.unseen_experts(layers, seen),
    )
    return FoundReport(
        output_report.render(outputs), outputs.to_json(), partial(output_page, outputs)
    )


def other_forms(scheme: Scheme, *, books: bool, rotations: bool) -> list[precision.Form]:
    """What a plan may choose beside the scheme's book, or rotation, or both."""
    found = [
        precision.Form(
            None if book == scheme.book else book, None if turn == scheme.rotation else turn
        )
        for turn in (ROTATIONS if rotations else (scheme.rotation,))
        for book in (get_args(BookName) if books else (scheme.book,))
    ]
    return [form for form in found if form != precision.SCHEME]


def plan_by_weights(
    source: str,
    options: ConvertOptions,
    max_rows: int | None,
    progress: Progress,
    bits: float,
    objective: bit_budget.Objective,
) -> FoundPlan:
    """Choose block sizes by the errors of the weights; arguments as for :func:`report_on`."""
    checkpoint, layers = _chosen(source, options)
    _check_budget(checkpoint, layers, bits)
    book, rotation = book_by_name(options.scheme.book), options.scheme.rotation
    formats = [report.dialect_format(block_size, book) for block_size in BLOCK_SIZES]
    measured = report.measure_layers(
        checkpoint, list(layers), formats, progress, max_rows, rotation
    )
    found = bit_budget.allocate_bits(measured, bits, objective)
    return FoundPlan(bit_budget.render(found), found.overrides())


def plan_by_outputs(
    source: str,
    options: ConvertOptions,
    calibration: CalibrationOptions,
    max_rows: int | None,
    progress: Progress,
    bits: float | None,
    fp8_share: float | None,
    others: Sequence[precision.Form] = (),
) -> FoundPlan:
    """Choose block sizes, activations and `others` by the outputs on text; they and the budgets as
    for :func:`.precision.plan_precision`, the rest as for :func:`report_on`."""
    checkpoint, layers = _chosen(source, options)
    if bits is not None:
        _check_budget(checkpoint, layers, bits)
    formats = precision.planned_formats(options.scheme.book, others)
    measured = measure_outputs(checkpoint, layers, formats, calibration, progress, max_rows)
    found = precision.plan_precision(measured, bits, fp8_share, others)
    unseen = output_report.unseen_experts(layers, measured)
    return FoundPlan(precision.render(found, unseen), found.overrides())


def _chosen(source: str, options: ConvertOptions) -> tuple[Checkpoint, dict[str, LayerFormat]]:
    """A checkpoint, and the layers that a conversion with these options would quantize, and how."""
    checkpoint = open_checkpoint(find_checkpoint(source))
    layers = choose_layers(checkpoint, options).formats
    return checkpoint, {name: layers[name] for name in sorted(layers, key=natural_order)}


def _check_budget(checkpoint: Checkpoint, layers: dict[str, LayerFormat], bits: float) -> None:
    shapes = {
        name: (len(members), *checkpoint.weights[members[0]].shape)
        for name, members in stacks(layers).items()
    }
    bit_budget.check_budget(shapes, bits)
