"""Draw a block of 32 numbers and the sixteen grids of DIALECT_FP4, for docs/concepts.md.

    python docs/pictures/block_and_dialects.py [FILE]

FILE ends in .svg or .png; without it the committed picture is drawn anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dialect_kernels import DIALECT_FP4, quantize

__all__ = ["BLOCK", "draw", "errors"]

FILE = Path(__file__).with_name("block-and-dialects.svg")
CHOSEN, OTHER = "#c0392b", "#7f8c8d"

BLOCK = torch.randn(32, generator=torch.Generator().manual_seed(5))
"""The block of the picture, float32 [32]."""


def errors(scaled: torch.Tensor) -> list[float]:
    """Squared error of a scaled block, [32], on each dialect's grid of DIALECT_FP4."""
    found = []
    for half_units in DIALECT_FP4.half_units:
        grid = torch.tensor(half_units) / 2
        found.append(((scaled.abs()[:, None] - grid).abs().amin(dim=1) ** 2).sum().item())
    return found


def draw(figure: Figure) -> None:
    """Draw the block above, the grids below."""
    packed = quantize(BLOCK[None])
    scale = 2 * packed.block_scale()[0, 0]  # the value of one scaled unit: two half-units
    chosen = int(packed.ids()[0, 0])
    above, below = figure.subplots(2, 1, height_ratios=(2, 3))
    _draw_block(above, BLOCK / scale, packed.dequantize()[0] / scale, chosen)
    _draw_grids(below, errors(BLOCK / scale), chosen)


def _draw_block(axes: Axes, scaled: torch.Tensor, rounded: torch.Tensor, chosen: int) -> None:
    levels = [sign * h / 2 for h in DIALECT_FP4.half_units[chosen] for sign in (-1, 1)]
    axes.hlines(levels, -0.5, 31.5, color="#ecd9d6", linewidth=0.8, zorder=0)
    axes.vlines(range(32), 0, scaled, color=OTHER, linewidth=1)
    axes.plot(range(32), scaled, "o", color=OTHER, markersize=4, label="the number, scaled")
    axes.plot(range(32), rounded, "_", color=CHOSEN, markersize=9, label=f"on dialect {chosen}")
    axes.set(xlim=(-0.5, 31.5), xlabel="position in the block", ylabel="scaled value")
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def _draw_grids(axes: Axes, squared: list[float], chosen: int) -> None:
    for number, half_units in enumerate(DIALECT_FP4.half_units):
        color = CHOSEN if number == chosen else OTHER
        axes.axhline(number, color="#eeeeee", zorder=0)
        axes.plot([h / 2 for h in half_units], [number] * 8, "o", color=color, markersize=5)
        axes.text(7.8, number, f"{squared[number]:.2f}", color=color, va="center")
    axes.text(7.8, -1.1, "squared error", va="center")
    axes.set(xlim=(-0.2, 9), ylim=(15.7, -1.7), xticks=range(8), yticks=range(16))
    axes.set(xlabel="magnitude (a half-unit is 0.5)", ylabel="dialect")


def main() -> None:
    """Write the picture, byte for byte the same with the same matplotlib."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": FILE.stem, "font.size": 9}):
        figure = Figure(figsize=(7.2, 6.4), layout="constrained")
        draw(figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
        figure.savefig(target, dpi=110, metadata={"Date": None} if target.suffix == ".svg" else {})


if __name__ == "__main__":
    main()
