"""Which cores vLLM should compute on: one request, and several at once, in bf16 and in 4 bits.

``VLLM_CPU_OMP_THREADS_BIND`` names the cores: ``auto``, its default, leaves one to vLLM's
scheduler; a list takes all of them; ``nobind`` starts as many threads and lets the system place
them. One server of LLaMA-3.2-1B's shape runs at a time, measured by ``vllm bench serve``; in every
round each is started anew.

    python -m benchmarks.language.bench_threads [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo.terminal import interrupt_on_signals

from ..lib.gate import golden_gate
from ..lib.harness import Table, main
from .serve_rounds import add_figures, measure_server
from .served_models import FORMATS, SHAPES, prepare

Figures = dict[str, Any]

PACKAGES = ("torch", "vllm")
BINDINGS = ("auto", "all", "nobind")
_FORMATS = ("bf16", "w4a4")
_SHAPE = "llama-3.2-1b"


def options(parser: argparse.ArgumentParser) -> None:
    """Add the number of rounds, and bindings and formats to measure."""
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="starts of every server")
    add("--bindings", nargs="+", choices=BINDINGS, default=list(BINDINGS), help="in this order")
    add("--formats", nargs="+", choices=_FORMATS, default=list(_FORMATS), help="in this order")


def measure(rounds: int, bindings: Sequence[str], formats: Sequence[str]) -> Figures:
    """Per format and binding: what `measure_server` finds in every round."""
    os.environ.update(NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    shape = SHAPES[_SHAPE]
    found: dict[str, dict[str, Figures]] = {key: {} for key in formats}
    with tempfile.TemporaryDirectory(prefix="bench-threads-") as directory:
        model = prepare(shape, Path(directory, "model"))
        for number in range(rounds):
            for key in formats:
                for binding in bindings:
                    form = replace(FORMATS[key], environment=_environment(binding))
                    folder = Path(directory, f"{number}-{key}-{binding}")
                    folder.mkdir()
                    once = measure_server(shape, model, form, True, [1 + number], folder)
                    add_figures(found[key].setdefault(binding, {}), once)
                    print(f"{key}, {binding}, round {number + 1}: {once}", flush=True)
    return {"name": shape.name, "cores": len(os.sched_getaffinity(0)), "formats": found}


def _environment(binding: str) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    if binding == "nobind":  # as many threads as PyTorch takes, which vLLM would cut to one
        return {"VLLM_CPU_OMP_THREADS_BIND": binding, "OMP_NUM_THREADS": str(len(cores))}
    named = binding if binding == "auto" else ",".join(map(str, cores))
    return {"VLLM_CPU_OMP_THREADS_BIND": named}


def tables(figures: Figures) -> dict[str, Table]:
    """``bindings``: medians over the rounds; ratios are taken round by round, above 1 is faster."""
    rows = [["format", "cores", "each token of one request", "against auto",
             "output tokens/s of several requests", "against auto"]]  # fmt: skip
    for key, bindings in figures["formats"].items():
        base = bindings.get("auto")
        for binding, taken in bindings.items():
            token_ms, rates = taken["single"]["tpot_ms"], taken["many"]["output_tokens_per_s"]
            single = many = "–"
            if base is not None and binding != "auto":
                single = _ratio(base["single"]["tpot_ms"], token_ms)
                many = _ratio(rates, base["many"]["output_tokens_per_s"])
            rows.append(
                [
                    FORMATS[key].name,
                    f"`{binding}`" if binding != "all" else f"all {figures['cores']}",
                    f"{statistics.median(token_ms):.0f} ms",
                    single,
                    f"{statistics.median(rates):.1f}",
                    many,
                ]
            )
    return {"bindings": rows}


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    interrupt_on_signals()
    main(golden_gate, measure, options)
