"""The arguments of ``blockdialect evaluate`` on the command line; Typer shows their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Activations",
    "Against",
    "Calibrate",
    "Formats",
    "Json",
    "Plot",
    "QueryKeyBlockSize",
    "RatioTo",
    "Scope",
    "SequenceLength",
    "Text",
    "Windows",
    "Worst",
]

Against = Annotated[
    str, typer.Option(help="Directory or hub id of the 16-bit checkpoint that DST was made from.")
]
Text = Annotated[
    str,
    typer.Option(
        help="Text to evaluate on: a text file, a JSONL file of texts or chat messages, or a data "
        "set `owner/name:split:column`."
    ),
]
Windows = Annotated[int, typer.Option(help="Most windows of the text, evenly spread.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens in a window.")]
Activations = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="Activations of DST and of every format: some of own, w4a4, w4a8 and w4a16, separated "
        "by commas.",
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Formats to emulate in the same layers, separated by commas: fp8, mxfp4-32, mxfp4-16, "
        "nvfp4-16, dialect_fp4-32, semantic_32-32 and so on, with +rotation and, for formats of "
        "others, +gptq.",
    ),
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help="Calibration text of formats with +gptq, as `quantize` takes it."
    ),
]
Scope = Annotated[
    str,
    typer.Option(
        metavar="linear|all", help="Round the linear layers, or the products of attention too."
    ),
]
QueryKeyBlockSize = Annotated[
    int | None,
    typer.Option(
        metavar="16|32|64",
        help="Block size of Q and K with --scope all, in formats of this project; default: that of "
        "the format.",
    ),
]
RatioTo = Annotated[
    str | None, typer.Option(help="Name of the row by whose divergence the others are divided.")
]
Worst = Annotated[int, typer.Option(help="How many positions of the largest divergence to show.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]
Plot = Annotated[
    Path | None, typer.Option(help="Draw KL against bits per weight: a PNG, SVG or PDF.")
]
