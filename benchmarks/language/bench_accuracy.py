"""What 4 bits cost on language models, calibrated and not, beside other formats in the same layers.

Every row is an evaluation by ``blockdialect evaluate``: the KL divergence of the next-token
distributions from those of the 16-bit model, on windows of Python's manual that no format was
calibrated on. Formats of others are emulated with the same care: the same calibration text, rule
and rotation.

    python -m benchmarks.language.bench_accuracy [--models smollm2,gemma3-270m,shipped]
        [--windows 16]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..lib.gate import golden_gate
from ..lib.harness import ROOT, Table, main_in_parts

if TYPE_CHECKING:
    from dialect_plugin.evaluation.result import Row

PACKAGES = ("torch", "transformers")
SHIPPED = "shipped"
MODELS = {"smollm2": "smollm2", "gemma3-270m": "gemma3", SHIPPED: SHIPPED}
"""Models -> how their results' files end."""
WINDOWS = 16
WINDOW = 512
ACTIVATIONS = ("W4A4", "W4A8", "W4A16")
OURS: dict[str, dict[str, Any]] = {
    "semantic_32-32+gptq": {"block_size": 32, "rotation": "none"},
    "semantic_32-32+rotation+gptq": {"block_size": 32, "rotation": "hadamard_32"},
    "semantic_32-32+balance+rotation+gptq": {"block_size": 32, "rotation": "hadamard_32"},
    "semantic_32-16+rotation+gptq": {"block_size": 16, "rotation": "hadamard_32"},
}
"""Our calibrated rows -> the scheme of their conversion; ``+balance`` balances channels, too."""
FORMATS = (
    "dialect_fp4-32",
    "semantic_32-32",
    "semantic_32-32+rotation",
    "mxfp4-32",
    "nvfp4-16",
    "mxfp4-32+gptq",
    "nvfp4-16+gptq",
    "mxfp4-32+rotation+gptq",
    "nvfp4-16+rotation+gptq",
    "fp8",
)
"""The other rows."""
PLANS: dict[str, tuple[float | None, float | None]] = {
    "plan, 4.4 bits": (4.4, None),
    "plan, FP8 in 15 %": (None, 0.15),
    "plan, 4.4 bits, FP8 in 15 %": (4.4, 0.15),
}
"""Our calibrated rows by ``blockdialect plan`` -> its budgets: bits per weight, share of FP8."""
SHORT = {
    "mxfp4-32": "MXFP4-32",
    "mxfp4-32+rotation+gptq": "MXFP4-32, calibrated and rotated",
    "nvfp4-16": "NVFP4-16",
    "nvfp4-16+gptq": "NVFP4-16, calibrated",
    "nvfp4-16+rotation+gptq": "NVFP4-16, calibrated and rotated",
    "dialect_fp4-32": "BlockDialect, `--book dialect_fp4`",
    "semantic_32-32": "BlockDialect",
    "semantic_32-32+rotation+gptq": "BlockDialect, `--calibrate`",
    "semantic_32-32+balance+rotation+gptq": "BlockDialect, `--calibrate --balance`",
    "semantic_32-16+rotation+gptq": "BlockDialect, `--calibrate --block-size 16`",
}
"""Rows of the short tables -> what they are called there."""
CALIBRATED = "semantic_32-32+rotation+gptq"
BALANCED = "semantic_32-32+balance+rotation+gptq"
UNCALIBRATED = "dialect_fp4-32"
GOALS = (
    ("W4A4", UNCALIBRATED, 0.35),
    ("W4A4", "nvfp4-16", 0.5),
    ("W4A4", "nvfp4-16+gptq", 0.6),
    ("W4A4", "nvfp4-16+rotation+gptq", 0.6),
    ("W4A8", "mxfp4-32+gptq", 1.0),
    ("W4A8", "nvfp4-16+gptq", 1.0),
    ("W4A16", "mxfp4-32+gptq", 1.0),
    ("W4A16", "nvfp4-16+gptq", 1.0),
)
"""Activations, and what a calibrated row's divergence should at most be of another row's."""
PLANNED = 0.75
"""What a plan's divergence should at most be of that of the calibrated row in W4A4."""


def options(parser: argparse.ArgumentParser) -> None:
    """Add the models and the number of windows."""
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of 512 tokens")


def parts(models: str) -> dict[str, str]:
    """Models, separated by commas -> how their results' files end.

    Raises:
        SystemExit: if a model is not known.
    """
    return {name: MODELS[name] for name in _chosen(MODELS, models)}


def measure(model: str, windows: int) -> dict[str, Any]:
    """Every window's figures of a model in every format.

    Raises:
        SystemExit: if the model cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as directory:
        found = _evaluated(model, write_text(Path(directory)), windows)
    return {**found, "windows": windows, "window": WINDOW}


def on_the_text(
    known: Collection[str],
    models: str,
    windows: int,
    evaluated: Callable[[str, Path, int], dict[str, Any]],
) -> dict[str, Any]:
    """Per model, separated by commas: what `evaluated` finds in so many windows of the text.

    Raises:
        SystemExit: if a model is not known.
    """
    chosen = _chosen(known, models)
    with tempfile.TemporaryDirectory() as directory:
        text = write_text(Path(directory))
        return {
            "models": {name: evaluated(name, text, windows) for name in chosen},
            "windows": windows,
            "window": WINDOW,
        }


def _chosen(known: Collection[str], models: str) -> list[str]:
    chosen = models.split(",")
    if not set(chosen) <= set(known):
        raise SystemExit(f"--models: {models!r}; it must be some of {', '.join(known)}")
    return chosen


def write_text(directory: Path) -> Path:
    """Python's manual as every Python brings it for its help, in one file."""
    from pydoc_data.topics import topics

    path = directory / "pydoc_data.topics"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def _evaluated(name: str, text: Path, windows: int) -> dict[str, Any]:
    # here, because rendering the tables needs none of it
    from demo.language.real_models import REAL_MODELS, RealModelError, prepare
    from dialect_plugin.calibration.calibrator import Calibrator
    from dialect_plugin.calibration.options import DEFAULT_TEXT, CalibrationOptions
    from dialect_plugin.checkpoint.convert import convert
    from dialect_plugin.evaluation.evaluator import evaluate
    from dialect_plugin.evaluation.options import EvaluationOptions
    from dialect_plugin.evaluation.progress import Bar
    from dialect_plugin.scheme import Scheme

    try:
        model = ROOT / "demo" / "model" if name == SHIPPED else prepare(name)
    except RealModelError as error:
        raise SystemExit(f"accuracy: {name}: {error}") from None
    chosen = EvaluationOptions.model_validate(
        {
            "text": str(text),
            "windows": windows,
            "sequence_length": WINDOW,
            "activations": "own,w4a8,w4a16",
            "formats": ",".join(FORMATS),
            "calibrate": DEFAULT_TEXT,
            "worst": 0,
        }
    )
    with tempfile.TemporaryDirectory() as directory:
        packed = [Path(directory, row) for row in OURS]
        for path, scheme in zip(packed, OURS.values(), strict=True):
            settings = CalibrationOptions(sequence_length=WINDOW, balance="+balance" in path.name)
            calibration = Calibrator(settings)
            convert(model, path, Scheme(book="semantic_32", **scheme), calibration=calibration)
        with Bar() as progress:
            found = evaluate(packed, model, chosen, progress)
        planned = _planned(model, Path(directory))
        with Bar() as progress:
            own = {"activations": ("own",), "formats": (), "calibrate": None}
            found_plans = evaluate(planned, model, chosen.model_copy(update=own), progress)
    title = "the model that ships, LLaMA of 3.4 million weights"
    return {
        "title": title if name == SHIPPED else REAL_MODELS[name].title,
        "gguf": None if name == SHIPPED else REAL_MODELS[name].storage,
        "found": found.to_json(),
        "planned": found_plans.to_json(),
    }


def _planned(model: Path, directory: Path) -> list[Path]:
    """The model converted by every plan."""
    from dialect_plugin.analysis.commands import other_forms
    from dialect_plugin.analysis.output_error import measure_outputs
    from dialect_plugin.analysis.precision import plan_precision, planned_formats
    from dialect_plugin.calibration.calibrator import Calibrator
    from dialect_plugin.calibration.options import CalibrationOptions
    from dialect_plugin.checkpoint.convert import convert
    from dialect_plugin.checkpoint.layer_choice import choose_layers
    from dialect_plugin.checkpoint.options import ConvertOptions
    from dialect_plugin.checkpoint.progress import ProgressBar
    from dialect_plugin.checkpoint.reader import open_checkpoint
    from dialect_plugin.scheme import Scheme

    form = {"book": "semantic_32", "rotation": "hadamard_32"}
    uniform = Scheme.parse(form)
    checkpoint = open_checkpoint(model)
    layers = choose_layers(checkpoint, ConvertOptions(scheme=uniform)).formats
    with ProgressBar() as progress:
        # the windows, rows and forms that `plan` measures by default
        text = CalibrationOptions(sequence_length=WINDOW, samples=32)
        others = other_forms(uniform, books=True, rotations=True)
        formats = planned_formats(uniform.book, others)
        measured = measure_outputs(checkpoint, layers, formats, text, progress, 256)
    paths = []
    for name, budgets in PLANS.items():
        overrides = plan_precision(measured, *budgets, others).overrides()
        calibration = Calibrator(CalibrationOptions(sequence_length=WINDOW))
        paths.append(directory / name)
        scheme = Scheme.parse({**form, "overrides": overrides})
        convert(model, paths[-1], scheme, calibration=calibration)
    return paths


def rows_of(model: Mapping[str, Any]) -> dict[tuple[str, str], Row]:
    """Name and activations -> row of a measured model."""
    from dialect_plugin.evaluation.result import Row

    keys = ("name", "activations", "ours", "bits", "nll", "divergence", "agreement")
    found = [*model["found"]["rows"], *model["planned"]["rows"]]
    rows = [Row(**{key: row[key] for key in keys}) for row in found]
    return {(row.name, row.activations): row for row in rows}


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``model``, ``goals``, ``short``, and a table for each kind of activations."""
    return {
        "model": _model(figures),
        "goals": _goals(figures),
        "short": _short(figures),
        **{kind.lower(): _table(figures, kind) for kind in ACTIVATIONS},
    }


def _model(figures: Mapping[str, Any]) -> Table:
    before = "bfloat16" if figures["gguf"] is None else f"{figures['gguf']} in a GGUF file"
    tokens = figures["windows"] * (figures["window"] - 1)
    perplexity = f"{figures['found']['perplexity']:.3f}"
    return [
        ["model", "weights before", "tokens", "perplexity of the 16-bit model"],
        [figures["title"], before, f"{tokens:,}", perplexity],
    ]


def _short(model: Mapping[str, Any]) -> Table:
    """Divergence and agreement of the rows that readers compare."""
    found = rows_of(model)
    kinds = ("W4A4", "W4A8")
    head = [f"{kind}: {what}" for kind in kinds for what in ("KL, nats", "same top token")]
    rows = [["format", "bits", *head]]
    for name, title in SHORT.items():
        if (name, kinds[0]) not in found:
            continue  # its blocks do not divide the model's columns
        cells = [title, f"{found[name, kinds[0]].bits:.2f}"]
        for kind in kinds:
            row = found[name, kind]
            cells.append(f"{row.mean_divergence:.3f} ± {row.standard_error or 0:.3f}")
            cells.append(f"{row.same_top:.1%}")
        rows.append(cells)
    return rows


def _table(model: Mapping[str, Any], activations: str) -> Table:
    found = rows_of(model)
    base = found[UNCALIBRATED, activations]
    rows = [["format", "bits", "perplexity", "KL, nats", "same top token", f"to {UNCALIBRATED}"]]
    kinds = (activations, {"W4A4": "mixed", "W4A8": "W8A8"}.get(activations))
    for (name, kind), row in found.items():
        if kind not in kinds:
            continue
        ratio, error = row.ratio(base)
        rows.append(
            [
                f"**{name}**" if row.ours else name,
                f"{row.bits:.2f}",
                f"{row.perplexity:.2f}",
                f"{row.mean_divergence:.4f} ± {row.standard_error or 0:.4f}",
                f"{row.same_top:.1%}",
                f"{ratio:.3f} ± {error or 0:.3f}",
            ]
        )
    return rows


def _goals(figures: Mapping[str, Any]) -> Table:
    rows = [["KL of", "to that of", "wanted", "measured"]]
    found = rows_of(figures)
    goals = [
        ((ours, kind), (other, kind), wanted)
        for ours in (CALIBRATED, BALANCED)
        for kind, other, wanted in GOALS
        if (ours, kind) in found
    ]
    plans = [key for key in found if key[0] in PLANS]
    goals += [(plan, (CALIBRATED, "W4A4"), PLANNED) for plan in plans]
    for ours, other, wanted in goals:
        ratio, error = found[ours].ratio(found[other])
        pair = (f"{name} {kind}" for name, kind in (ours, other))
        rows.append([*pair, f"≤ {wanted}", f"{ratio:.3f} ± {error or 0:.3f}"])
    return rows


if __name__ == "__main__":
    main_in_parts(golden_gate, measure, options, parts)
