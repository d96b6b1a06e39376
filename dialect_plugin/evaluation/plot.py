"""The divergence of formats against their bits per weight, as a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .result import Evaluation, Row

__all__ = ["check_plot", "plot"]

_OURS, _PEERS = "tab:blue", "0.55"


def check_plot(path: Path) -> None:
    """Raise ValueError unless a plot can be written to a file of this name."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "--plot: needs matplotlib; install it with pip install 'blockdialect[report]'"
        )
    if path.suffix not in {".png", ".svg", ".pdf"}:
        raise ValueError(f"--plot: {path}; its name must end in .png, .svg or .pdf")


def plot(found: Evaluation, path: Path) -> None:
    """Draw KL against bits per weight, one panel for each kind of activations.

    Args:
        found: formats of this project are drawn in colour, all others grey.
        path: PNG, SVG or PDF.
    """
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(row.activations for row in found.rows))
    figure = Figure(figsize=(1.5 + 4.5 * len(labels), 4.2), layout="constrained")
    panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for axes, label in zip(panels, labels, strict=True):
        for row in found.rows:
            if row.activations == label:
                _draw(axes, row)
        axes.set_title(label, fontsize="medium")
        axes.set_xlabel("bits per weight")
        axes.set_yscale("log")
        axes.margins(x=0.25)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("KL to the 16-bit model, nats")
    figure.suptitle(f"{found.source}, {found.text}", fontsize="medium")
    figure.savefig(path)


def _draw(axes: Any, row: Row) -> None:
    colour = _OURS if row.ours else _PEERS
    axes.errorbar(
        [row.bits],
        [row.mean_divergence],
        yerr=None if row.standard_error is None else [row.standard_error],
        fmt="o",
        color=colour,
    )
    axes.annotate(
        row.name,
        (row.bits, row.mean_divergence),
        xytext=(5, 4),
        textcoords="offset points",
        fontsize="x-small",
        color=colour,
    )
