"""From ``vllm serve`` to the first answer of a server: 16 bits, packed while loading, packed.

The checkpoint has LLaMA-3.2-1B's shape and random weights; its files have been read before, so that
they are in memory and no disk is measured. One server runs at a time; in every round each way is
started anew. *Loading* is the part of it that vLLM's log calls so: reading the weights and packing
them.

    python -m benchmarks.language.bench_start [--rounds 3]
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.terminal import interrupt_on_signals

from ..lib.gate import golden_gate
from ..lib.harness import Table, main
from ..lib.memory import watch
from .checkpoints import convert
from .measured_server import MeasuredServer, server_arguments
from .served_models import FORMATS, SHAPES, prepare

Figures = dict[str, Any]

PACKAGES = ("torch", "vllm")
WAYS = {
    "bf16": "bf16",
    "online": "16-bit checkpoint, packed while it loads",
    "packed": "packed checkpoint",
}
"""Ways to start -> their names in the table."""
_SHAPE = "llama-3.2-1b"
_ONLINE_ADDS_S = 5.0
_LOADING = re.compile(r"Loading weights took ([\d.]+) seconds")


def options(parser: argparse.ArgumentParser) -> None:
    """Add the number of rounds and the ways to start."""
    parser.add_argument("--rounds", type=int, default=3, help="starts of every server")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="in this order")


def measure(rounds: int, ways: Sequence[str]) -> Figures:
    """Seconds until each server was ready, of which loading took some, and its peak memory."""
    found: dict[str, Figures] = {way: {} for way in ways}
    with tempfile.TemporaryDirectory(prefix="bench-start-") as directory:
        model, packed = Path(directory, "bf16"), Path(directory, "packed")
        prepare(SHAPES[_SHAPE], model)
        convert(model, packed)
        for number in range(rounds):
            for way in ways:
                once = _start(packed if way == "packed" else model, way, Path(directory, "log"))
                for figure, value in once.items():
                    found[way].setdefault(figure, []).append(value)
                print(f"{WAYS[way]}, round {number + 1}: {once}", flush=True)
    return {"ways": found}


def _start(model: Path, way: str, log: Path) -> dict[str, float | None]:
    arguments = server_arguments(
        SHAPES[_SHAPE], FORMATS["w4a4" if way == "online" else "bf16"], True
    )
    began = time.monotonic()
    with MeasuredServer(model, log, arguments, {}) as server:
        process = server.pid
        with watch(process, 0) as memory:
            server.wait_until_ready()
            ready_s = time.monotonic() - began
        text = server.log.read_text(encoding="utf-8", errors="replace")
    return {"ready_s": ready_s, "loading_s": loading_seconds(text), "peak_bytes": memory.peak}


def loading_seconds(log: str) -> float | None:
    """Seconds that loading took, as a server's log states them; None if it does not."""
    found = _LOADING.search(log)
    return float(found[1]) if found else None


def tables(figures: Figures) -> dict[str, Table]:
    """``ready``: medians over the rounds, differences round by round; ``goals``."""
    return {"ready": _ready(figures["ways"]), "goals": _goals(figures["ways"])}


def _ready(ways: Figures) -> Table:
    rows = [["checkpoint", "ready after", "beyond bf16", "loading", "peak while starting"]]
    for way, taken in ways.items():
        ready, loading = taken["ready_s"], [s for s in taken["loading_s"] if s is not None]
        beyond = _beyond(ways, way)
        rows.append(
            [
                WAYS[way],
                f"{statistics.median(ready):.1f} s ({min(ready):.1f} to {max(ready):.1f})",
                f"{beyond:+.1f} s" if way != "bf16" and beyond is not None else "–",
                f"{statistics.median(loading):.1f} s" if loading else "–",
                f"{max(taken['peak_bytes']) / 2**30:.2f} GiB",
            ]
        )
    return rows


def _goals(ways: Figures) -> Table:
    rows = [["goal", "wanted", "measured"]]
    for way, wanted in (("online", f"≤ {_ONLINE_ADDS_S:g} s"), ("packed", "< 0 s")):
        beyond = _beyond(ways, way)
        if beyond is not None:
            rows.append([f"{WAYS[way]}: start beyond that of bf16", wanted, f"{beyond:+.1f} s"])
    return rows


def _beyond(ways: Figures, way: str) -> float | None:
    """Median over the rounds of what a way takes longer than bf16, in seconds."""
    if way not in ways or "bf16" not in ways:
        return None
    pairs = zip(ways[way]["ready_s"], ways["bf16"]["ready_s"], strict=True)
    return statistics.median(own - base for own, base in pairs)


if __name__ == "__main__":
    interrupt_on_signals()
    main(golden_gate, measure, options)
