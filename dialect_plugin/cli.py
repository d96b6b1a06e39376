"""The command ``blockdialect``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from .scheme import LayerOverride

if TYPE_CHECKING:
    from dialect_kernels.verify import CheckResult

    from .analysis.report import Format, LayerReport

__all__ = ["app", "main"]

app = typer.Typer(
    name="blockdialect",
    help="4-bit dialect formats: convert, inspect and compare checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Source = Annotated[str, typer.Argument(help="Directory or hub id of a 16-bit checkpoint.")]
Packed = Annotated[Path, typer.Argument(help="Directory of a packed checkpoint.")]
Ignore = Annotated[
    list[str] | None, typer.Option(help="Layer, or re:PATTERN, to leave in 16 bit; repeatable.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="Layer, or re:PATTERN, to quantize instead of the table; repeatable."),
]
LmHead = Annotated[bool, typer.Option(help="Quantize the output projection too.")]
MaxRows = Annotated[
    int | None,
    typer.Option(
        min=1, help="Measure at most so many rows of a layer, evenly spread; default all."
    ),
]


@app.command()
def quantize(
    src: Source,
    dst: Annotated[Path, typer.Argument(help="Directory to write.")],
    block_size: Annotated[int, typer.Option(help="16, 32 or 64.")] = 32,
    book: Annotated[str, typer.Option(help="dialect_fp4 or semantic_32.")] = "dialect_fp4",
    activation_format: Annotated[
        str, typer.Option(help="What engines use by default: dialect, fp8 or none.")
    ] = "dialect",
    ignore: Ignore = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=BLOCK_SIZE for the layers that match; repeatable."),
    ] = None,
    overrides: Annotated[
        Path | None, typer.Option(help="File of overrides, as `plan` writes it.")
    ] = None,
    targets: Targets = None,
    lm_head: LmHead = False,
    strict: Annotated[
        bool, typer.Option(help="Refuse layers that the block size does not divide.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what DST holds.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="CPU threads; default all.")] = None,
) -> None:
    """Quantize a 16-bit checkpoint; run it again after a crash and it continues."""
    from .checkpoint.convert import convert
    from .checkpoint.layer_choice import ConvertOptions

    with _one_sentence_errors(), _RichProgress() as progress:
        options = ConvertOptions.model_validate(
            {
                "block_size": block_size,
                "book": book,
                "activation_format": activation_format,
                "ignore": ignore or [],
                "overrides": _overrides(override or [], overrides),
                "targets": targets or [],
                "lm_head": lm_head,
                "strict": strict,
            }
        )
        result = convert(src, dst, options, overwrite=overwrite, workers=workers, progress=progress)
    console = Console()
    if result.resumed:
        console.print(f"continued an unfinished conversion ({result.resumed} files were there)")
    weights = sum(layer.rows * layer.columns for layer in result.layers)
    bits = 8 * sum(layer.packed_bytes for layer in result.layers) / weights
    console.print(
        f"{len(result.layers)} layers at {bits:.3f} bits per weight; tensors "
        f"{result.source_bytes / 1e6:,.1f} MB -> {result.packed_bytes / 1e6:,.1f} MB"
    )
    if result.plan.adapted:
        console.print("other block size than asked for:", ", ".join(result.plan.adapted))
    if result.plan.indivisible:
        console.print("left in 16 bit, not divisible:", ", ".join(result.plan.indivisible))
    if result.plan.has_experts:
        console.print("the experts are left in 16 bit: vLLM's plugin does not serve them packed")
    below = [layer for layer in result.layers if layer.rows_below_window]
    for layer in below:
        console.print(
            f"{layer.name}: {layer.rows_below_window} rows have blocks below the exponent window"
        )
    console.print(f"serve it with: vllm serve {dst}", soft_wrap=True)


@app.command()
def inspect(dst: Packed) -> None:
    """Show a packed checkpoint and verify every byte of it."""
    from .checkpoint.inspection import inspect_checkpoint, render

    with _one_sentence_errors(), _RichProgress() as progress:
        found = inspect_checkpoint(dst, progress)
    Console().print(render(found))


@app.command()
def report(
    src: Source,
    html: Annotated[
        Path | None, typer.Option(help="Write table and plots as one HTML page.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
    ignore: Ignore = None,
    targets: Targets = None,
    lm_head: LmHead = False,
    max_rows: MaxRows = None,
) -> None:
    """Compare 4-bit formats on a checkpoint's weights, layer by layer."""
    from .analysis.report import FORMATS, Report, render
    from .analysis.report_page import report_page
    from .checkpoint.reader import find_checkpoint
    from .checkpoint.writer import write_text

    with _one_sentence_errors():
        layers = _measured(src, FORMATS, ignore, targets, lm_head, max_rows)
        name = find_checkpoint(src).resolve().name
        found = Report(name, tuple(entry.name for entry in FORMATS), layers)
        if html is not None:
            write_text(html, report_page(found))
    if as_json:
        print(json.dumps(found.to_json(), indent=1, allow_nan=False))
    else:
        Console().print(render(found))


@app.command()
def plan(
    src: Source,
    bits: Annotated[float, typer.Option(help="Bits per weight, scales included, on average.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for `quantize --overrides`.")
    ] = None,
    objective: Annotated[
        Literal["error", "relative"],
        typer.Option(help="Make the summed squared error small, or that relative to each layer."),
    ] = "error",
    ignore: Ignore = None,
    targets: Targets = None,
    lm_head: LmHead = False,
    max_rows: MaxRows = None,
) -> None:
    """Choose blocks of 16, 32 or 64 for every layer under a bit budget."""
    from dialect_kernels.formatbook import BLOCK_SIZES

    from .analysis.bit_budget import plan_bits, render
    from .analysis.report import dialect_format
    from .checkpoint.writer import write_text

    with _one_sentence_errors():
        formats = [dialect_format(block_size) for block_size in BLOCK_SIZES]
        layers = _measured(src, formats, ignore, targets, lm_head, max_rows)
        found = plan_bits(layers, bits, objective)
        if output is not None:
            write_text(output, json.dumps(found.overrides(), indent=1) + "\n")
    console = Console()
    console.print(render(found))
    if output is not None:
        console.print(f"use it with: blockdialect quantize {src} DST --overrides {output}")


@app.command()
def export(
    src: Packed,
    dst: Annotated[Path, typer.Argument(help="Directory to write; new or empty.")],
    to: Annotated[str, typer.Option(help="fp8: a compressed-tensors FP8 checkpoint.")] = "fp8",
) -> None:
    """Write a packed checkpoint, bit for bit, for engines that do not know the format."""
    from .checkpoint.export_fp8 import export_fp8
    from .checkpoint.reader import CheckpointError, open_packed

    with _one_sentence_errors(), _RichProgress() as progress:
        if to != "fp8":
            raise CheckpointError(f"--to: {to!r}; allowed is fp8")
        result = export_fp8(open_packed(src), dst, progress)
    Console().print(
        f"{result.layers} layers in FP8, no weight changed; tensors "
        f"{result.source_bytes / 1e6:,.1f} MB -> {result.exported_bytes / 1e6:,.1f} MB"
    )


@app.command()
def verify() -> None:
    """Run the golden vectors against the installed back ends."""

    from dialect_kernels.verify import verify as run

    by_backend: dict[str, list[CheckResult]] = {}
    for result in run():
        by_backend.setdefault(result.backend, []).append(result)
    failed = 0
    for backend, results in by_backend.items():
        wrong = [result for result in results if not result.passed]
        failed += len(wrong)
        for result in wrong:
            print(f"{backend}: {result.case}: {result.detail}")
        agreed = len(results) - len(wrong)
        print(f"{backend}: {agreed} of {len(results)} agree with the golden vectors")
    if failed:
        raise typer.Exit(1)


def _measured(
    src: str,
    formats: Sequence[Format],
    ignore: list[str] | None,
    targets: list[str] | None,
    lm_head: bool,
    max_rows: int | None,
) -> tuple[LayerReport, ...]:
    """The losses of the layers that a conversion with these options would quantize."""
    from .analysis.report import measure_layers
    from .checkpoint.layer_choice import ConvertOptions, plan_layers
    from .checkpoint.reader import find_checkpoint, open_checkpoint

    checkpoint = open_checkpoint(find_checkpoint(src))
    options = ConvertOptions(ignore=ignore or [], targets=targets or [], lm_head=lm_head)
    layers = list(plan_layers(checkpoint, options).block_sizes)
    with _RichProgress() as progress:
        return measure_layers(checkpoint, layers, formats, progress, max_rows)


def _overrides(options: list[str], file: Path | None) -> dict[str, Any]:
    """Overrides of a file and of the command line; the command line goes before the file."""
    from .checkpoint.reader import CheckpointError, read_json

    merged: dict[str, Any] = {}
    for option in options:
        pattern, _, size = option.rpartition("=")
        if not pattern or not size.isdigit():
            raise CheckpointError(
                f"--override: {option!r}; it must be PATTERN=BLOCK_SIZE, such as "
                "'re:.*down_proj=16'"
            )
        merged[pattern] = LayerOverride.model_validate({"block_size": int(size)})
    for pattern, override in (read_json(file) if file else {}).items():
        merged.setdefault(pattern, override)
    return merged


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    """Turn an expected error into one sentence on stderr and exit status 1."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]).replace("_", "-")
        reason = first["msg"].replace("Input should be", "it must be")
        message = f"--{field}: {first['input']!r}; {reason}"
    except (ValueError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; run the same command again to continue"
    else:
        return
    print(f"blockdialect: {message}", file=sys.stderr)
    raise typer.Exit(1)


class _RichProgress:
    """A progress bar with tensors, bytes and the time that is left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[tensors]} tensors"),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None
        self._done = 0

    def __enter__(self) -> _RichProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def begin(self, what: str, tensors: int, nbytes: int) -> None:
        """A pass begins: a bar of its own."""
        self._progress.start()  # not earlier: an empty display would put a line before an error
        self._done = 0
        self._task = self._progress.add_task(what, total=nbytes, done=0, tensors=tensors)

    def advance(self, nbytes: int) -> None:
        """One tensor is done."""
        if self._task is not None:
            self._done += 1
            self._progress.update(self._task, advance=nbytes, done=self._done)


def main() -> None:
    """Entry point for ``python -m dialect_plugin.cli``."""
    app()


if __name__ == "__main__":
    main()
