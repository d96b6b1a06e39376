"""The demonstration's figures: size and held-out perplexity of the model that ships, as served.

The figures of bf16 and BlockDialect come from running servers over HTTP, that of MXFP4 from an
emulation in transformers. All of the held-out text is scored. On one machine the figures are
deterministic: there is no spread.

    python -m benchmarks.language.bench_demo
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from ..lib.gate import golden_gate
from ..lib.harness import ROOT, Table, main

PACKAGES = ("torch", "vllm")
ALL_TOKENS = 1_000_000


def measure() -> dict[str, Any]:
    """Per format: bytes on disk, perplexity and where it comes from.

    Raises:
        SystemExit: if a server and its emulation differ by more than 0.5 %.
    """
    # here, because rendering the tables needs none of it
    from rich.console import Console

    from demo.language.run import FORMATS, DemoError, demonstrate

    folder = ROOT / "demo"
    try:
        found = demonstrate(
            folder / "model", folder / "heldout.txt", list(FORMATS), ALL_TOKENS, Console()
        )
    except DemoError as error:
        sys.exit(f"demo: not measured: {error}")
    if found.doubts:
        sys.exit(f"demo: not measured: {'; '.join(found.doubts)}")
    return asdict(found)


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``perplexity``: size, perplexity and divergence of every format."""
    base = next(row["perplexity"] for row in figures["rows"] if row["name"] == "bf16")
    rows = [["format", "MB on disk", "perplexity", "to bf16", "measured by"]]
    differences = any(row.get("divergence") is not None for row in figures["rows"])
    rows[0] += ["KL to bf16", "same top token"] if differences else []
    for row in figures["rows"]:
        cells = [
            row["name"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / base - 1:+.2%}",
            "`vllm serve`" if row["source"] == "server" else "emulation",
        ]
        rows.append(cells + (_differences(row) if differences else []))
    return {"perplexity": rows}


def _differences(row: dict[str, Any]) -> list[str]:
    if row["divergence"] is None:
        return ["–", "–"]
    kl = f"{row['divergence']:.4f} ± {row['divergence_error']:.4f}"
    return [kl, f"{row['same_top']:.1%}"]


if __name__ == "__main__":
    main(golden_gate, measure)
