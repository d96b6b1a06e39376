"""Bytes of whole models in bf16 and packed: how much of a model its vocabulary is.

Embeddings and output projections stay in 16 bit, so a small model with a large vocabulary shrinks
less than its linear layers. The bytes follow from the shapes and are counted, not measured; the
gate compares the count with a conversion.

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
    found = {"bf16_bytes": result.source_bytes, "packed_bytes": result.packed_bytes}
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
    vocabulary = 2 * model.vocabulary * model.hidden * (1 if model.tied else 2)
    norms = 2 * model.hidden * (2 * model.layers + 1)
    linear = sum(
        field.dtype.itemsize * math.prod(field.shape(rows, columns, _BLOCK_SIZE))
        for rows, columns in model.projections.values()
        for field in STORED_FIELDS
    )
    return {
        "bf16_bytes": vocabulary + norms + 2 * model.linear_weights,
        "packed_bytes": vocabulary + norms + model.layers * linear,
        "vocabulary_bytes": vocabulary,
    }


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """One row a model."""
    rows: list[list[str]] = [["model", "bf16, MB", "packed, MB", "ratio", "embeddings"]]
    for name, counts in figures.items():
        before, after = counts["bf16_bytes"], counts["packed_bytes"]
        rows.append(
            [
                name,
                f"{before / 1e6:,.0f}",
                f"{after / 1e6:,.0f}",
                f"{after / before:.2f}",
                f"{100 * counts['vocabulary_bytes'] / before:.0f} %",
            ]
        )
    return {"models": rows}


if __name__ == "__main__":
    main(gate, measure)
