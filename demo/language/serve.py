"""What `make serve` runs: `vllm serve` with BlockDialect, left running.

    python -m demo.language.serve --model DIR [-- further arguments of vllm serve]

A 16-bit model is quantized while it loads, a packed one is served as it is.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dialect_plugin.checkpoint.json_files import CheckpointError, read_json
from dialect_plugin.checkpoint.reader import CONFIG
from dialect_plugin.scheme import QUANT_METHOD

from .server import serve_command, serve_environment

_OPTIONS = ("-q", "--quantization")


def arguments_for(model: Path, further: list[str]) -> list[str]:
    """The arguments of `vllm serve`: `further`, and `--quantization` for a 16-bit model.

    Raises:
        CheckpointError: if `model` is no directory of a model, or is quantized by another method.
    """
    if not model.is_dir():
        raise CheckpointError(
            f"{model}: is not a directory; name the directory of a model: make serve MODEL=DIR"
        )
    existing = read_json(model / CONFIG).get("quantization_config")
    if isinstance(existing, dict):
        method = existing.get("quant_method")
        if method != QUANT_METHOD:
            raise CheckpointError(
                f"{model}: is quantized already ({method}); serve it with vllm serve, or give its "
                "16-bit original"
            )
        return further
    if any(argument.partition("=")[0] in _OPTIONS for argument in further):
        return further
    return ["--quantization", QUANT_METHOD, *further]


def main(
    model: Annotated[Path, typer.Option(help="Directory of a checkpoint, 16-bit or packed.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Further arguments of vllm serve.")
    ] = None,
) -> None:
    """Serve a model with BlockDialect until it is interrupted."""
    try:
        command = serve_command(model, *arguments_for(model, arguments or []))
    except CheckpointError as error:
        print(f"serve: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print("starting:", shlex.join(["vllm", *command[1:]]), flush=True)
    os.execve(command[0], command, serve_environment())


if __name__ == "__main__":
    typer.run(main)
