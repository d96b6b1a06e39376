"""Bytes of whole models in bf16 and packed: how much of a model its vocabulary is.

By default embeddings and output projections stay in 16 bit, so a small model with a large
vocabulary shrinks less than its linear layers; with ``--embeddings --lm-head`` they do not. The
bytes follow from the shapes and are counted, not measured; the gate compares the counts with two
conversions.

    python -m benchmarks.language.bench_model_bytes
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dialect_kernels.packed import STORED_FIELDS
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.scheme import Scheme

from ..lib.gate import golden_gate
from ..lib.harness import Table, main
from ..lib.shapes import GEMMA3_270M, LLAMA_1B, LLAMA_8B, LLAMA_70B, SMOLLM2_135M, Llama
from .checkpoints import write_checkpoint

__all__ = ["gate", "measure", "tables"]

_MODELS = (GEMMA3_270M, SMOLLM2_135M, LLAMA_1B, LLAMA_8B, LLAMA_70B)
_SMALL = replace(LLAMA_1B, hidden=64, intermediate=192, head=8, layers=2, vocabulary=100)
_BLOCK_SIZE = 32


def gate() -> list[str]:
    """The golden vectors, and the count against the conversion of a small model."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        write_checkpoint(source, _SMALL)
        result = convert(source, Path(folder) / "packed")
        whole = convert(source, Path(folder) / "whole", Scheme(embeddings=True, lm_head=True))
    found = {
        "bf16_bytes": result.source_bytes,
        "packed_bytes": result.packed_bytes,
        "whole_packed_bytes": whole.packed_bytes,
    }
    counted = _count(_SMALL)
    faults = [
        f"{name}: {counted[name]} were counted, {value} are stored"
        for name, value in found.items()
        if counted[name] != value
    ]
    return [*golden_gate(), *faults]


def measure() -> dict[str, Any]:
    """Bytes of every model, and how many of them are its embeddings."""
    return {model.name: _count(model) for model in _MODELS}


def _count(model: Llama) -> dict[str, int]:
    """Bytes of the stored tensors, with blocks of 32 in all linear layers of decoder layers."""
    norms = 2 * model.hidden * (2 * model.layers + 1)
    linear = sum(_packed_bytes(rows, columns) for rows, columns in model.projections.values())
    matrices = 1 if model.tied else 2
    vocabulary = 2 * model.vocabulary * model.hidden * matrices
    packed_vocabulary = matrices * _packed_bytes(model.vocabulary, model.hidden)
    return {
        "bf16_bytes": vocabulary + norms + 2 * model.linear_weights,
        "packed_bytes": vocabulary + norms + model.layers * linear,
        "whole_packed_bytes": packed_vocabulary + norms + model.layers * linear,
        "vocabulary_bytes": vocabulary,
    }


def _packed_bytes(rows: int, columns: int) -> int:
    return sum(
        field.dtype.itemsize * math.prod(field.shape(rows, columns, _BLOCK_SIZE))
        for field in STORED_FIELDS
    )


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """One row a model."""
    heads = ["model", "bf16, MB", "packed, MB", "ratio", "vocabulary packed too, MB", "ratio"]
    rows: list[list[str]] = [[*heads, "vocabulary in bf16"]]
    for name, counts in figures.items():
        before, after = counts["bf16_bytes"], counts["packed_bytes"]
        whole = counts["whole_packed_bytes"]
        rows.append(
            [
                name,
                f"{before / 1e6:,.0f}",
                f"{after / 1e6:,.0f}",
                f"{after / before:.2f}",
                f"{whole / 1e6:,.0f}",
                f"{whole / before:.2f}",
                f"{100 * counts['vocabulary_bytes'] / before:.0f} %",
            ]
        )
    return {"models": rows}


if __name__ == "__main__":
    main(gate, measure)
