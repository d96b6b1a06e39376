"""The demonstration's figures on the shipped model: sizes and perplexities of the formats.

bf16 and BlockDialect are measured on running servers, MXFP4 by emulation; see demo/run.py.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.harness import Table
from demo import run
from dialect_kernels.verify import verify

__all__ = ["gate", "measure", "tables"]

TOKENS = 32_768


def gate() -> list[str]:
    """Golden vectors that a back end does not meet."""
    return [f"{r.backend}: {r.case}: {r.detail}" for r in verify() if not r.passed]


def measure() -> dict[str, Any]:
    """Sizes in bytes, perplexities, and what was compared with what."""
    text = (run.ROOT / "heldout.txt").read_text(encoding="utf-8")
    rows = run.demonstrate(run.ROOT / "model", text, list(run.FORMATS), TOKENS, Console())
    return {"tokens": TOKENS, "rows": [asdict(row) for row in rows]}


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """The table `perplexity`."""
    rows = figures["rows"]
    base = rows[0]["perplexity"]
    table = [["format", "tensors, MB", "perplexity", "to bf16", "measured by"]]
    for row in rows:
        computed = " (computed)" if row["source"] == "emulation" else ""
        table.append(
            [
                row["name"],
                f"{row['bytes_on_disk'] / 1e6:.2f}{computed}",
                f"{row['perplexity']:.3f}",
                f"{row['perplexity'] / base - 1:+.1%}",
                row["source"],
            ]
        )
    return {"perplexity": table}


if __name__ == "__main__":
    harness.main(gate, measure)
