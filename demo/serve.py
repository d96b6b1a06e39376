"""What `make serve` runs: `vllm serve` with BlockDialect, left running.

python -m demo.serve --model DIR [-- further arguments of vllm serve]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dialect_plugin.checkpoint import CONFIG, CheckpointError, read_json
from dialect_plugin.scheme import QUANT_METHOD

from .server import serve_command, serve_environment

__all__ = ["main"]


def main(
    model: Annotated[str, typer.Option(help="Directory of a checkpoint, 16-bit or packed.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="For vllm serve.")] = None,
) -> None:
    """Serve a model with BlockDialect until it is interrupted."""
    further = arguments or []
    try:
        existing = read_json(Path(model) / CONFIG).get("quantization_config")
    except CheckpointError as error:
        print(f"serve: {error}; name the model with make serve MODEL=DIR", file=sys.stderr)
        raise typer.Exit(1) from None
    packed = isinstance(existing, dict) and existing.get("quant_method") == QUANT_METHOD
    if not packed and not any(a in {"-q", "--quantization"} for a in further):
        further = ["--quantization", QUANT_METHOD, *further]
    command = serve_command(model, *further)
    print("starting:", " ".join(["vllm", *command[1:]]), flush=True)
    os.execve(command[0], command, serve_environment())


if __name__ == "__main__":
    typer.run(main)
