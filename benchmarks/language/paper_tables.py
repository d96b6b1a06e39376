"""The rows of BlockDialect's accuracy tables, measured on a model, beside the published numbers.

    python -m benchmarks.language.paper_tables MODEL [--text FILE] [--windows N] [--length 2048]

MODEL is the directory of a 16-bit checkpoint, or a name in `demo.language.real_models`. The paper
(arXiv 2501.01144v5) measured WikiText-2 in windows of 2048 tokens: give the test set as FILE to
compare with it; without one the text is Python's manual. Bits are in the paper's accounting, with a
block exponent of 5 bits. Every published number is marked; the others are measured here.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from demo.language.real_models import REAL_MODELS, RealModelError, prepare

from ..lib.render import markdown
from .bench_accuracy import write_text

__all__: list[str] = []

WINDOW = 2048
PUBLISHED_MODELS = ("LLaMA3-8B", "LLaMA2-7B", "Mistral-7B")
MIXED = "dialect_fp4-64, down_proj 16"
"""A checkpoint that is packed with blocks of two sizes; in attention, Q and K have small blocks."""


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper.

    Attributes:
        scope: ``"linear"`` or ``"all"``.
        method: as the paper calls it.
        bits: stored bits per weight, as published.
        published: perplexity and 7-task average of `PUBLISHED_MODELS`, as published.
        measured: name of the evaluation's row.
    """

    scope: str
    method: str
    bits: str
    published: tuple[str, str, str]
    measured: str


ROWS = (
    PaperRow("linear", "MXFP4-16", "4.31", ("8.20 / 68.53", "7.07 / 66.86", "6.49 / 70.33"),
             "mxfp4-16"),
    PaperRow("linear", "MXFP4-32", "4.16", ("8.23 / 68.31", "7.04 / 65.94", "6.42 / 70.72"),
             "mxfp4-32"),
    PaperRow("linear", "BlockDialect-16", "4.56", ("6.82 / 72.98", "5.76 / 69.91", "5.55 / 73.39"),
             "dialect_fp4-16"),
    PaperRow("linear", "BlockDialect-32", "4.28", ("7.05 / 72.24", "5.84 / 69.74", "5.65 / 73.46"),
             "dialect_fp4-32"),
    PaperRow("linear", "BlockDialect-64", "4.14", ("7.30 / 71.51", "5.96 / 68.95", "5.75 / 72.76"),
             "dialect_fp4-64"),
    PaperRow("linear", "BlockDialect-64, down_proj 16", "≈4.25",
             ("7.12 / 72.69", "5.88 / 69.51", "5.68 / 73.30"), MIXED),
    PaperRow("all", "MXFP4-32", "4.16", ("16.69 / 58.84", "11.14 / 59.76", "8.98 / 66.01"),
             "mxfp4-32"),
    PaperRow("all", "BlockDialect-32", "4.28", ("7.87 / 68.57", "6.33 / 67.68", "5.87 / 72.15"),
             "dialect_fp4-32"),
    PaperRow("all", "BlockDialect-64, down_proj/Q/K 16", "≈4.25",
             ("7.77 / 69.00", "6.35 / 68.25", "5.90 / 71.71"), MIXED),
)  # fmt: skip
FP16 = ("6.14 / 74.45", "5.47 / 70.94", "5.32 / 74.92")
"""The published models in 16 bit."""


def measured(model: Path, text: Path, windows: int, length: int) -> dict[str, list[Any]]:
    """Scope -> evaluations that hold the rows of that scope."""
    from dialect_plugin.checkpoint.convert import convert
    from dialect_plugin.checkpoint.reader import open_checkpoint
    from dialect_plugin.evaluation.evaluator import evaluate
    from dialect_plugin.evaluation.options import EvaluationOptions
    from dialect_plugin.evaluation.progress import Bar
    from dialect_plugin.scheme import Scheme

    config = open_checkpoint(model).config
    longest = config.get("text_config", config).get("max_position_embeddings", length)
    options = {
        "text": str(text),
        "windows": windows,
        "sequence_length": min(length, longest),
        "worst": 0,
    }
    found: dict[str, list[Any]] = {"linear": [], "all": []}
    with tempfile.TemporaryDirectory() as directory, Bar() as progress:
        mixed = Path(directory, MIXED)
        smaller = {"re:.*down_proj": {"block_size": 16}}
        scheme = {"book": "dialect_fp4", "block_size": 64, "overrides": smaller}
        convert(model, mixed, Scheme.parse(scheme))

        def add(scope: str, packed: list[Path], **others: Any) -> None:
            chosen = EvaluationOptions.model_validate(options | {"scope": scope} | others)
            found[scope].append(evaluate(packed, model, chosen, progress))

        names = {
            scope: ",".join(r.measured for r in ROWS if r.scope == scope and r.measured != MIXED)
            for scope in found
        }
        add("linear", [mixed], formats=names["linear"])
        add("all", [], formats=names["all"])
        add("all", [mixed], query_key_block_size=16)
    return found


def table(found: dict[str, list[Any]]) -> list[list[str]]:
    """The paper's rows, with a perplexity and a divergence that were measured beside them."""
    [linear] = found["linear"]
    title = linear.source
    heads = [f"{name}, published" for name in PUBLISHED_MODELS]
    rows = [["rounded", "method", "bits", *heads, f"{title}, measured", "KL to 16 bit, measured"]]
    rows.append(["nothing", "FP16", "16", *FP16, f"{linear.perplexity:.3f}", "–"])
    for row in ROWS:
        rows_of_it = (evaluation.row(row.measured, "W4A4") for evaluation in found[row.scope])
        own = next(entry for entry in rows_of_it if entry is not None)
        error = "" if own.standard_error is None else f" ± {own.standard_error:.4f}"
        cells = [f"{own.perplexity:.3f}", f"{own.mean_divergence:.4f}{error}"]
        scope = "linear layers" if row.scope == "linear" else "all products"
        rows.append([scope, row.method, row.bits, *row.published, *cells])
    return rows


def main(
    model: Annotated[
        str,
        typer.Argument(
            help=f"Directory of a 16-bit checkpoint, or one of {', '.join(REAL_MODELS)}."
        ),
    ],
    text: Annotated[
        Path | None, typer.Option(help="Text, e.g. WikiText-2's test set; else Python's manual.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Most windows of the text.")] = 1000,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = WINDOW,
) -> None:
    """Measure the rows of BlockDialect's accuracy tables on a model."""
    try:
        directory = prepare(model) if model in REAL_MODELS else Path(model)
        with tempfile.TemporaryDirectory() as made:
            found = measured(directory, text or write_text(Path(made)), windows, length)
    except (RealModelError, ValueError, OSError) as error:
        print(f"paper_tables: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    [one] = found["linear"]
    print(
        f"perplexity / average of 7 tasks in per cent, published on WikiText-2 in windows of "
        f"{WINDOW}; measured: perplexity on {one.text}, {one.windows} windows of "
        f"{one.sequence_length}\n"
    )
    print(markdown(table(found)), end="")


if __name__ == "__main__":
    typer.run(main)
