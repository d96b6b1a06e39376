"""What 4 bits cost in embeddings and output projection: KL with and without, on language models.

Every row is an evaluation as by ``blockdialect evaluate``, W4A4 without calibration: the KL
divergence of the next-token distributions from those of the 16-bit model, on windows of Python's
manual. A tied model is measured tied, where one matrix serves both, and as a copy with two equal
matrices, so that each can be packed alone. Neither is packed by default if it adds 5 % or more.

    python -m benchmarks.language.bench_vocabulary [--models smollm2,shipped] [--windows 8]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..lib.gate import golden_gate
from ..lib.harness import ROOT, Table, main
from .bench_accuracy import SHIPPED, WINDOW, on_the_text

if TYPE_CHECKING:
    from dialect_plugin.evaluation.result import Row

PACKAGES = ("torch", "transformers")
MODELS = ("smollm2", SHIPPED)
WINDOWS = 8
BASE = "decoder layers"
ROWS: dict[str, dict[str, bool]] = {
    BASE: {},
    "and output projection": {"lm_head": True},
    "and embeddings": {"embeddings": True},
    "and both": {"lm_head": True, "embeddings": True},
}
TIED = "and both, one matrix (16-bit activations in the projection)"
MOST = 1.05
"""What a default may cost, as a ratio of the divergences."""


def options(parser: argparse.ArgumentParser) -> None:
    """Add the models and the number of windows."""
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of 512 tokens")


def measure(models: str, windows: int) -> dict[str, Any]:
    """Per model: every window's figures in every row.

    Raises:
        SystemExit: if a model is not known or cannot be fetched.
    """
    return on_the_text(MODELS, models, windows, _evaluated)


def _evaluated(name: str, text: Path, windows: int) -> dict[str, Any]:
    from demo.language.real_models import REAL_MODELS, RealModelError, prepare
    from dialect_plugin.checkpoint.convert import convert
    from dialect_plugin.checkpoint.reader import open_checkpoint
    from dialect_plugin.evaluation.evaluator import evaluate
    from dialect_plugin.evaluation.options import EvaluationOptions
    from dialect_plugin.evaluation.progress import Bar
    from dialect_plugin.scheme import Scheme

    try:
        model = ROOT / "demo" / "model" if name == SHIPPED else prepare(name)
    except RealModelError as error:
        raise SystemExit(f"vocabulary: {name}: {error}") from None
    chosen = EvaluationOptions.model_validate(
        {"text": str(text), "windows": windows, "sequence_length": WINDOW, "worst": 0}
    )
    tied = open_checkpoint(model).tied_embeddings
    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        two = _untied(model, Path(directory, "two")) if tied else model
        schemes = {row: (two, scheme) for row, scheme in ROWS.items()}
        if tied:
            schemes[TIED] = (model, {"embeddings": True})
        for row, (source, scheme) in schemes.items():
            packed = Path(directory, row)
            convert(source, packed, Scheme.model_validate(scheme))
            with Bar() as progress:
                found = evaluate([packed], source, chosen, progress)
            rows[row] = found.to_json()["rows"][0]
            shutil.rmtree(packed)
    title = "the model that ships, LLaMA of 3.4 million weights"
    return {"title": title if name == SHIPPED else REAL_MODELS[name].title, "rows": rows}


def _untied(model: Path, copy: Path) -> Path:
    """A copy of a tied model in which the output projection is a matrix of its own."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, copy)
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, file, {"format": "pt"})
    for index in copy.glob("*.index.json"):
        index.unlink()
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return copy


def _row(figures: Mapping[str, Any]) -> Row:
    from dialect_plugin.evaluation.result import Row

    keys = ("name", "activations", "ours", "bits", "nll", "divergence", "agreement")
    return Row(**{key: figures[key] for key in keys})


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """One table: every model's rows, and what they cost beside the decoder layers alone."""
    heads = ["model", "4 bit", "perplexity", "KL, nats", "same top token", f"KL to {BASE}"]
    rows = [[*heads, f"at most {MOST}"]]
    for model in figures["models"].values():
        base = _row(model["rows"][BASE])
        for name, found in model["rows"].items():
            row = _row(found)
            ratio, error = row.ratio(base)
            rows.append(
                [
                    model["title"],
                    name,
                    f"{row.perplexity:.2f}",
                    f"{row.mean_divergence:.4f} ± {row.standard_error or 0:.4f}",
                    f"{row.same_top:.1%}",
                    f"{ratio:.3f} ± {error or 0:.3f}",
                    "" if name == BASE else ("yes" if ratio < MOST else "no"),
                ]
            )
    return {"divergence": rows}


if __name__ == "__main__":
    main(golden_gate, measure, options)
