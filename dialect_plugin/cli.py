"""The command ``blockdialect``: a table of commands; every room renders its own results."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from pydantic import ValidationError

from dialect_kernels.formatbook import BLOCK_SIZES

from .checkpoint.options import ConvertOptions, read_overrides
from .evaluation import arguments as of_evaluation
from .evaluation.options import EvaluationOptions
from .scheme import (
    ActivationFormat,
    AttentionFormat,
    BlockSize,
    BookName,
    KvCacheFormat,
    Rotation,
    Scheme,
    first_fault,
)

if TYPE_CHECKING:
    from dialect_kernels.verify import CheckResult

    from .calibration.calibrator import Calibrator
    from .calibration.options import CalibrationOptions

__all__ = ["app", "main"]

app = typer.Typer(
    name="blockdialect",
    help="4-bit dialect formats: convert, inspect and compare checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from dialect_kernels import __version__

        print(f"blockdialect {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_the_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    """Turn an expected error into one sentence on stderr and exit status 1."""
    try:
        yield
    except ValidationError as error:
        field, value, reason = first_fault(error)
        message = f"--{field.replace('_', '-')}: {f'{value}; ' if value else ''}{reason}"
    except (ValueError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; run the same command again to continue"
    else:
        return
    print(f"blockdialect: {message}", file=sys.stderr)
    raise typer.Exit(1)


def _one_of(option: str, literal: Any, text: str) -> Any:
    """An option that takes the values of a ``Literal``: --help lists them, errors name them.

    Typer's own choices end with a usage screen; here a wrong value is one sentence like any other.
    """
    values = {str(value): value for value in get_args(literal)}

    def parse(given: str) -> Any:
        with _one_sentence_errors():
            if str(given) not in values:
                *others, last = values
                allowed = f"{', '.join(others)} or {last}" if others else last
                raise ValueError(f"{option}: {given!r}; it must be {allowed}")
        return values[str(given)]

    return typer.Option(option, parser=parse, metavar="|".join(values), help=text)


_Source = Annotated[str, typer.Argument(help="Directory or hub id of a 16-bit checkpoint.")]
_Destination = Annotated[
    Path, typer.Argument(help="Directory to write: new, empty, or an unfinished conversion.")
]
_Packed = Annotated[Path, typer.Argument(help="Directory of a packed checkpoint.")]
_BlockSizeOption = Annotated[
    BlockSize, _one_of("--block-size", BlockSize, "Elements that share a dialect and a scale.")
]
_DEFAULT_BOOK = Scheme().book
_Book = Annotated[BookName, _one_of("--book", BookName, "Formatbook of weights and activations.")]
_Activations = Annotated[
    ActivationFormat,
    _one_of("--activation-format", ActivationFormat, "Activations that engines use by default."),
]
_PlannedBook = Annotated[
    BookName | None,
    _one_of(
        "--book",
        BookName,
        f"Formatbook of weights and activations; default: {_DEFAULT_BOOK}, and with --calibrate "
        "the other one for layers that clearly lose less with it.",
    ),
]
_PlannedRotation = Annotated[
    Rotation | None,
    _one_of(
        "--rotation",
        Rotation,
        "Rotation of weights and activations; default: none, and with --calibrate hadamard_32 but "
        "for layers that clearly lose less without.",
    ),
]
_RotationOrDefault = Annotated[
    Rotation | None,
    _one_of(
        "--rotation",
        Rotation,
        "Rotation of weights and activations; default: hadamard_32 with --calibrate, else none.",
    ),
]
_Ignore = Annotated[
    list[str] | None, typer.Option(help="Layer, or re:PATTERN, to leave in 16 bit; repeatable.")
]
_Override = Annotated[
    list[str] | None,
    typer.Option(
        help="PATTERN=BLOCK_SIZE, or PATTERN=KEY:VALUE with a key of overrides: what the layers "
        "that match have instead; repeatable."
    ),
]
_Overrides = Annotated[Path | None, typer.Option(help="File of overrides, as `plan` writes it.")]
_Targets = Annotated[
    list[str] | None,
    typer.Option(
        help="Layer, or re:PATTERN, to quantize instead of the architecture's; repeatable."
    ),
]
_Experts = Annotated[
    bool, typer.Option("--experts/--no-experts", help="Quantize the routed experts of a mixture.")
]
_LmHead = Annotated[bool, typer.Option(help="Quantize the output projection too.")]
_Embeddings = Annotated[
    bool,
    typer.Option(
        help="Quantize the embeddings of tokens too; one matrix with a tied output projection."
    ),
]
_KvCache = Annotated[
    KvCacheFormat,
    _one_of(
        "--kv-cache",
        KvCacheFormat,
        "KV cache that vLLM keeps by default; dialect: 4 bits, with --calibrate around means.",
    ),
]
_Attention = Annotated[
    AttentionFormat,
    _one_of(
        "--attention",
        AttentionFormat,
        "Queries and probabilities of attention in vLLM; dialect: 4 bits, with --kv-cache dialect.",
    ),
]
_Strict = Annotated[
    bool,
    typer.Option(help="Refuse layers whose columns do not fit their block size or rotation."),
]
_Overwrite = Annotated[bool, typer.Option(help="Replace the files in DST.")]
_Workers = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all.")]
_Calibrate = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Choose the bytes by what they do to a layer's output on this text: a text file, a "
        "JSONL file of texts or chat messages, a data set `owner/name:split:column`, or `default`.",
    ),
]
_MeasureOn = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Measure what rounding does to the layers' outputs on this text, given as for "
        "`quantize`.",
    ),
]
_WindowsToMeasure = Annotated[
    int | None,
    typer.Option(
        help="Most windows of calibration text, of which one in four is measured and the others "
        "calibrate; default: 32."
    ),
]
_Samples = Annotated[
    int | None, typer.Option(help="Most windows of calibration text; default: 128.")
]
_SequenceLength = Annotated[
    int | None, typer.Option(help="Tokens in a window of calibration text; default: 512.")
]
_Damping = Annotated[
    float | None,
    typer.Option(
        help="Share of their mean that is added to the diagonal of the second moments of a layer's "
        "inputs; default: 0.01."
    ),
]
_Balance = Annotated[
    bool,
    typer.Option(
        "--balance",
        help="Move powers of two between a layer's input channels and the norm or layer in front, "
        "so that less is lost; adapters trained on SRC then do not fit.",
    ),
]
_Device = Annotated[str | None, typer.Option(help="Where calibration computes; default: cpu.")]
_MaxRows = Annotated[
    int | None,
    typer.Option(
        min=1, help="Measure at most this many rows of a layer, evenly spread; default: 256."
    ),
]
_AllRows = Annotated[bool, typer.Option(help="Measure every row of every layer.")]
_Html = Annotated[Path | None, typer.Option(help="Write table and plots as one HTML page.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")]
_Bits = Annotated[float | None, typer.Option(help="Bits per weight on average, scales included.")]
_Fp8Share = Annotated[
    float | None,
    typer.Option(
        help="Most of the weights, as a share such as 0.15, whose layers take FP8 activations "
        "(W4A8); with --calibrate."
    ),
]
_Objective = Annotated[
    Literal["error", "relative"] | None,
    _one_of(
        "--objective",
        Literal["error", "relative"],
        "Error of the weights to make small: the summed squared error (default), or that relative "
        "to each layer; without --calibrate.",
    ),
]
_Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="File to write, for `quantize --overrides`.")
]


@app.command()
def quantize(
    src: _Source,
    dst: _Destination,
    block_size: _BlockSizeOption = 32,
    book: _Book = _DEFAULT_BOOK,
    activation_format: _Activations = "dialect",
    rotation: _RotationOrDefault = None,
    ignore: _Ignore = None,
    override: _Override = None,
    overrides: _Overrides = None,
    targets: _Targets = None,
    experts: _Experts = True,
    lm_head: _LmHead = False,
    embeddings: _Embeddings = False,
    kv_cache: _KvCache = "none",
    attention: _Attention = "none",
    strict: _Strict = False,
    overwrite: _Overwrite = False,
    workers: _Workers = None,
    calibrate: _Calibrate = None,
    samples: _Samples = None,
    sequence_length: _SequenceLength = None,
    damping: _Damping = None,
    balance: _Balance = False,
    device: _Device = None,
) -> None:
    """Quantize a 16-bit checkpoint. After a crash, the same command continues."""
    with _one_sentence_errors():
        calibration = _calibration(
            calibrate,
            samples=samples,
            sequence_length=sequence_length,
            damping=damping,
            balance=balance or None,
            device=device,
        )
        chosen = _book_and_rotation(book, rotation, calibration)
        chosen |= {"block_size": block_size, "activation_format": activation_format}
        chosen |= {"lm_head": lm_head, "embeddings": embeddings, "kv_cache": kv_cache}
        chosen |= {"attention": attention}
        chosen |= {"ignore": ignore or [], "overrides": read_overrides(override or [], overrides)}
        options = _options(targets, strict, experts, **chosen)
    from .checkpoint.convert import convert, render  # after the options: torch takes seconds
    from .checkpoint.progress import ProgressBar

    with _one_sentence_errors(), ProgressBar() as progress:
        result = convert(
            src,
            dst,
            options,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
            calibration=None if calibration is None else _calibrator(calibration),
        )
    print(render(result))


@app.command()
def inspect(dst: _Packed) -> None:
    """Show a packed checkpoint and check every byte of it."""
    from .checkpoint.inspection import inspect_checkpoint, render
    from .checkpoint.progress import ProgressBar

    with _one_sentence_errors(), ProgressBar() as progress:
        found = inspect_checkpoint(dst, progress)
    print(render(found))


@app.command()
def report(
    src: _Source,
    html: _Html = None,
    as_json: _Json = False,
    book: _Book = _DEFAULT_BOOK,
    rotation: _RotationOrDefault = None,
    ignore: _Ignore = None,
    targets: _Targets = None,
    lm_head: _LmHead = False,
    embeddings: _Embeddings = False,
    max_rows: _MaxRows = None,
    all_rows: _AllRows = False,
    calibrate: _MeasureOn = None,
    samples: _WindowsToMeasure = None,
    sequence_length: _SequenceLength = None,
    damping: _Damping = None,
    device: _Device = None,
) -> None:
    """Compare 4-bit formats on a checkpoint's weights or, with text, outputs, layer by layer."""
    with _one_sentence_errors():
        _check_rows(max_rows, all_rows)
        if html is not None:
            _check_file("--html", html)
        calibration = _calibration(
            calibrate,
            samples=_windows(calibrate, samples),
            sequence_length=sequence_length,
            damping=damping,
            device=device,
        )
        chosen = _book_and_rotation(book, rotation, calibration)
        vocabulary = {"lm_head": lm_head, "embeddings": embeddings}
        options = _options(targets, ignore=ignore or [], **chosen, **vocabulary)
    from .analysis.commands import report_on
    from .analysis.report_page import check_plots
    from .checkpoint.progress import ProgressBar
    from .checkpoint.writer import write_text

    with _one_sentence_errors():
        if html is not None:
            check_plots()
        rows = _measured_rows(max_rows, all_rows)
        with ProgressBar() as progress:
            found = report_on(src, options, calibration, rows, progress)
        if html is not None:
            write_text(html, found.page())
    if as_json:
        print(json.dumps(found.data, indent=1, allow_nan=False))
    else:
        print(found.table)


@app.command()
def plan(
    src: _Source,
    bits: _Bits = None,
    output: _Output = None,
    objective: _Objective = None,
    fp8_share: _Fp8Share = None,
    book: _PlannedBook = None,
    rotation: _PlannedRotation = None,
    ignore: _Ignore = None,
    targets: _Targets = None,
    lm_head: _LmHead = False,
    embeddings: _Embeddings = False,
    max_rows: _MaxRows = None,
    all_rows: _AllRows = False,
    calibrate: _MeasureOn = None,
    samples: _WindowsToMeasure = None,
    sequence_length: _SequenceLength = None,
    damping: _Damping = None,
    device: _Device = None,
) -> None:
    """Choose each layer's format under a budget of bits, or of layers with FP8 activations."""
    with _one_sentence_errors():
        calibration = _calibration(
            calibrate,
            samples=_windows(calibrate, samples),
            sequence_length=sequence_length,
            damping=damping,
            device=device,
        )
        _check_budgets(bits, fp8_share, objective, calibration)
        _check_rows(max_rows, all_rows)
        if output is not None:
            _check_file("--output", output)
        chosen = _book_and_rotation(book or _DEFAULT_BOOK, rotation, calibration)
        vocabulary = {"lm_head": lm_head, "embeddings": embeddings}
        options = _options(targets, ignore=ignore or [], **chosen, **vocabulary)
    from .analysis.commands import other_forms, plan_by_outputs, plan_by_weights
    from .checkpoint.progress import ProgressBar
    from .checkpoint.writer import write_text

    with _one_sentence_errors():
        rows = _measured_rows(max_rows, all_rows)
        with ProgressBar() as progress:
            if calibration is not None:
                budgets = bits, fp8_share
                others = other_forms(options.scheme, books=book is None, rotations=rotation is None)
                found = plan_by_outputs(src, options, calibration, rows, progress, *budgets, others)
            elif bits is not None:
                found = plan_by_weights(src, options, rows, progress, bits, objective or "error")
        if output is not None:
            write_text(output, json.dumps(found.overrides, indent=1) + "\n")
    print(found.table)
    if output is not None:
        text = "" if calibrate is None else f" --calibrate {shlex.quote(calibrate)}"
        usual = _book_and_rotation(_DEFAULT_BOOK, None, calibration)
        other = "".join(f" --{key} {value}" for key, value in chosen.items() if value != usual[key])
        other += "".join(
            f" --{key.replace('_', '-')}" for key, wanted in vocabulary.items() if wanted
        )
        print(f"use it with: blockdialect quantize {src} DST{text} --overrides {output}{other}")


@app.command()
def export(
    src: _Packed,
    dst: Annotated[Path, typer.Argument(help="Directory to write: new or empty.")],
    to: Annotated[
        str, _one_of("--to", Literal["fp8"], "fp8: a compressed-tensors FP8 checkpoint.")
    ] = "fp8",
) -> None:
    """Write a packed checkpoint, bit for bit, for engines that do not know the format."""
    from .checkpoint.export_fp8 import export_fp8, render
    from .checkpoint.progress import ProgressBar
    from .checkpoint.reader import open_packed

    with _one_sentence_errors(), ProgressBar() as progress:
        result = export_fp8(open_packed(src), dst, progress)
    print(render(result))


@app.command()
def evaluate(
    dst: _Packed,
    against: of_evaluation.Against,
    text: of_evaluation.Text,
    windows: of_evaluation.Windows = 16,
    sequence_length: of_evaluation.SequenceLength = 512,
    activations: of_evaluation.Activations = "own",
    formats: of_evaluation.Formats = None,
    calibrate: of_evaluation.Calibrate = None,
    samples: _Samples = None,
    scope: of_evaluation.Scope = "linear",
    query_key_block_size: of_evaluation.QueryKeyBlockSize = None,
    ratio_to: of_evaluation.RatioTo = None,
    worst: of_evaluation.Worst = 10,
    json_file: of_evaluation.Json = None,
    plot: of_evaluation.Plot = None,
    device: _Device = None,
) -> None:
    """Measure on text what a packed checkpoint loses against its 16-bit original."""
    with _one_sentence_errors():
        for option, file in (("--json", json_file), ("--plot", plot)):
            if file is not None:
                _check_file(option, file)
        if samples is not None and calibrate is None:
            _calibration(None, samples=samples)
        given = {
            "text": text,
            "windows": windows,
            "sequence_length": sequence_length,
            "activations": activations,
            "formats": formats,
            "calibrate": calibrate,
            "samples": samples,
            "scope": scope,
            "query_key_block_size": query_key_block_size,
            "ratio_to": ratio_to,
            "worst": worst,
            "device": device,
        }
        options = EvaluationOptions.model_validate(
            {name: value for name, value in given.items() if value is not None}
        )
    from .checkpoint.writer import write_text
    from .evaluation.evaluator import evaluate as run
    from .evaluation.plot import check_plot
    from .evaluation.plot import plot as draw
    from .evaluation.progress import Bar
    from .evaluation.result import render

    with _one_sentence_errors():
        if plot is not None:
            check_plot(plot)
        with Bar() as progress:
            found = run([dst], against, options, progress)
        if json_file is not None:
            write_text(json_file, json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n")
        if plot is not None:
            draw(found, plot)
    print(render(found))


@app.command()
def verify() -> None:
    """Run the golden vectors against the installed back ends."""
    from dialect_kernels.verify import verify as run

    by_backend: dict[str, list[CheckResult]] = {}
    for result in run():
        by_backend.setdefault(result.backend, []).append(result)
    for backend, results in by_backend.items():
        wrong = [result for result in results if not result.passed]
        for result in wrong:
            print(f"{backend}: {result.case}: {result.detail}")
        agreed = len(results) - len(wrong)
        print(f"{backend}: {agreed} of {len(results)} agree with the golden vectors")
    if not all(result.passed for results in by_backend.values() for result in results):
        raise typer.Exit(1)


def _options(
    targets: list[str] | None, strict: bool = False, experts: bool = True, **scheme: Any
) -> ConvertOptions:
    """The options of a conversion from those of the command line."""
    return ConvertOptions(
        scheme=Scheme.model_validate(scheme),
        targets=targets or [],
        strict=strict,
        experts=experts,
    )


def _calibration(text: str | None, **given: Any) -> CalibrationOptions | None:
    """The options of a calibration; None without one."""
    from .calibration.options import CalibrationOptions

    chosen = {name: value for name, value in given.items() if value is not None}
    if text is not None:
        return CalibrationOptions(calibrate=text, **chosen)
    for name, value in chosen.items():
        raise ValueError(
            f"--{name.replace('_', '-')}: {value} has no effect without --calibrate; give both, or "
            "leave it out"
        )
    return None


def _windows(text: str | None, samples: int | None) -> int | None:
    """How many windows to measure on; None for none, or for a number without text."""
    return 32 if text is not None and samples is None else samples


def _book_and_rotation(
    book: BookName, rotation: Rotation | None, calibration: CalibrationOptions | None
) -> dict[str, Any]:
    """Those of a conversion, which by default rotates only with calibration."""
    return {"book": book, "rotation": rotation or ("hadamard_32" if calibration else "none")}


def _calibrator(options: CalibrationOptions) -> Calibrator:
    from .calibration.calibrator import Calibrator

    return Calibrator(options)


def _check_budgets(
    bits: float | None,
    fp8_share: float | None,
    objective: str | None,
    calibration: CalibrationOptions | None,
) -> None:
    """Refuse, before torch is imported, budgets that are missing or out of reach anywhere."""
    if calibration is None and fp8_share is not None:
        raise ValueError(
            f"--fp8-share: {fp8_share:g} has no effect without --calibrate; give both, or leave it "
            "out"
        )
    if calibration is not None and objective is not None:
        raise ValueError(
            f"--objective: {objective} has no effect with --calibrate; give one of the two"
        )
    if fp8_share is not None and not 0 < fp8_share <= 1:
        raise ValueError(
            f"--fp8-share: {fp8_share:g}; it must be above 0 and at most 1, such as 0.15 for 15 % "
            "of the weights"
        )
    if bits is not None:
        _check_bits(bits)
    elif fp8_share is None:
        raise ValueError(
            "--bits: is missing; give a budget in bits per weight, such as 4.4, or with "
            "--calibrate an --fp8-share"
        )


def _check_bits(bits: float) -> None:
    """Refuse a budget that is out of reach whatever the shapes are."""
    smallest, largest = min(BLOCK_SIZES), max(BLOCK_SIZES)
    # a block has a meta byte, a row an exponent, and a row has one block at least
    least, most = 4 + 8 / largest, 4 + 8 / smallest + 8 / smallest
    if not bits > least:  # NaN too
        raise ValueError(
            f"--bits: {bits:g}; blocks of {largest} need more than {least:g} bits per weight in "
            "every model: give more"
        )
    if bits > most:
        raise ValueError(
            f"--bits: {bits:g}; blocks of {smallest} never need more than {most:g} bits per "
            f"weight: give less, or convert with --block-size {smallest}"
        )


def _check_rows(max_rows: int | None, all_rows: bool) -> None:
    if all_rows and max_rows is not None:
        raise ValueError(
            f"--max-rows: {max_rows} has no effect with --all-rows; give one of the two"
        )


def _measured_rows(max_rows: int | None, all_rows: bool) -> int | None:
    """How many rows of a layer to measure; None for all."""
    from .analysis.report import SAMPLED_ROWS

    return None if all_rows else max_rows or SAMPLED_ROWS


def _check_file(option: str, path: Path) -> None:
    """Refuse, before anything is measured, a path at which no file can be written."""
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a directory; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"{option}: {path} lies in a directory that is not there; make it or give another path"
        )


def main() -> None:
    """Entry point for ``python -m dialect_plugin.cli``."""
    app()


if __name__ == "__main__":
    main()
