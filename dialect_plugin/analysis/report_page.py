"""A report as one self-contained HTML page: table, plots as inline SVG, no scripts, no links."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from io import StringIO
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from dialect_kernels import __version__

from ..scheme import METHODS
from .output_error import FINEST_FIRST, LayerOutput
from .output_report import (
    SHOWN,
    OutputReport,
    expert_cells,
    expert_notes,
    nats_of,
    sqnr_of_output,
)
from .report import Report, dialect_name, sqnr_cells

__all__ = ["check_plots", "output_page", "report_page"]

_SHOWN_BLOCK_SIZE = 32


def report_page(report: Report) -> str:
    """The page's text. Names of layers and of the checkpoint are escaped.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    layers = [(layer, sqnr_cells(layer.losses, report.formats)) for layer in report.layers]
    return _template("report.html").render(
        report=report,
        totals=report.totals(),
        layers=layers,
        sampled=any(layer.measured_rows < layer.rows for layer in report.layers),
        sqnr_plot=_svg(_draw_sqnr, report),
        dialect_plot=_svg(_draw_dialects, report),
        block_size=_SHOWN_BLOCK_SIZE,
        version=__version__,
    )


def output_page(report: OutputReport) -> str:
    """The page's text; as :func:`report_page`."""
    methods = [(METHODS[activations].bits, activations) for activations in FINEST_FIRST]
    rows = [(layer, report.share([layer]), _output_cells(report, layer)) for layer in report.layers]
    return _template("output_report.html").render(
        report=report,
        rows=rows,
        methods=[name for name, _ in methods],
        totals=[
            (name, report.bits(name), [nats_of(report.layers, name, a) for _, a in methods])
            for name in report.formats
        ],
        sampled=any(layer.measured_rows < layer.rows for layer in report.layers),
        experts=[(layer.name, expert_cells(layer)) for layer in report.layers if layer.experts],
        notes=expert_notes(report.layers, report.unseen),
        plot=_svg(_draw_losses, report),
        version=__version__,
    )


def _output_cells(report: OutputReport, layer: LayerOutput) -> list[tuple[str, str]]:
    """Loss in thousandths of a nat and SQNR in dB, for every format and method."""
    cells = []
    for name in report.formats:
        for activations in FINEST_FIRST:
            nats, ratio = (of([layer], name, activations) for of in (nats_of, sqnr_of_output))
            cells.append(
                (
                    "–" if nats is None else f"{1000 * nats:.3f}",
                    "" if ratio is None else f"{ratio:.1f}",
                )
            )
    return cells


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("dialect_plugin"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def check_plots() -> None:
    """Raise ValueError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "--html: the plots need matplotlib; install it with pip install 'blockdialect[report]'"
        )


def _svg(draw: Callable[[Any, Any], None], report: Report | OutputReport) -> Markup:
    """A plot as SVG; it holds no text of the checkpoint, only the names of formats and numbers."""
    check_plots()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    draw(figure.add_subplot(), report)
    out = StringIO()
    # a fixed salt and no date: the same report gives the same bytes
    with rc_context({"svg.hashsalt": "blockdialect"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])  # without the XML declaration


def _draw_sqnr(axes: Any, report: Report) -> None:
    for name in report.formats:
        points = [
            (number, layer.losses[name].sqnr_db)
            for number, layer in enumerate(report.layers, start=1)
            if name in layer.losses
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, lw=1, label=name)
    axes.set_xlabel("layer, in the order of the table")
    axes.set_ylabel("SQNR, dB")
    axes.grid(alpha=0.3)
    if report.layers:
        axes.figure.legend(fontsize="small", ncols=len(report.formats), loc="outside upper center")


def _draw_losses(axes: Any, report: OutputReport) -> None:
    for activations in METHODS:
        losses = [nats_of([layer], SHOWN, activations) for layer in report.layers]
        points = [(n, 1000 * y) for n, y in enumerate(losses, start=1) if y is not None]
        if points:
            label = f"{SHOWN}, {METHODS[activations].bits}"
            axes.bar(*zip(*points, strict=True), width=1.0, label=label)
    axes.set_xlabel("layer, in the order of the table")
    axes.set_ylabel("estimated loss, nats / 1000")
    axes.grid(axis="y", alpha=0.3)
    if report.layers:
        axes.figure.legend(fontsize="small", ncols=len(METHODS), loc="outside upper center")


def _draw_dialects(axes: Any, report: Report) -> None:
    loss = report.totals().get(dialect_name(_SHOWN_BLOCK_SIZE))
    counts = loss.dialects if loss is not None and loss.dialects is not None else ()
    total = max(1, sum(counts))
    axes.bar(range(len(counts)), [100 * count / total for count in counts])
    axes.set_xticks(range(len(counts)))
    axes.set_xlabel("dialect")
    axes.set_ylabel("% of all blocks")
    axes.grid(axis="y", alpha=0.3)
