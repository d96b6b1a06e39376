"""Damaged checkpoints, indexes and configurations against reader and converter.

Every case damages a copy of a tiny checkpoint at random (:mod:`.mutations`), in a process with a
limit of time and memory. A 16-bit one is converted, a packed one is read as a whole. Either it is
refused in one sentence, with nothing left behind, or it is accepted and every tensor is what its
bytes say (:mod:`.mutation_verdicts`).

    python -m benchmarks.language.bench_mutations [--cases 10000] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from ..lib.gate import golden_faults
from ..lib.harness import Table, main

PACKAGES = ("torch", "safetensors")
SECONDS = 20.0
"""The limit of one case."""
_SHOWN_FAULTS = 20


def gate() -> list[str]:
    """Faults of the golden vectors, and of the undamaged checkpoints by the same rules."""
    from .mutation_verdicts import sound_faults

    with tempfile.TemporaryDirectory(prefix="bench-mutations-") as directory:
        victims, scratch = Path(directory, "victims"), Path(directory, "scratch")
        scratch.mkdir()
        return golden_faults("cpu") + sound_faults(victims, scratch)


def options(parser: argparse.ArgumentParser) -> None:
    """How many cases, which, and how many processes."""
    parser.add_argument("--cases", type=int, default=10_000, help="damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")


def measure(cases: int, seed: int, processes: int) -> dict[str, Any]:
    """Outcomes by kind of damage, the slowest case, and the faults."""
    # here, because rendering the tables needs none of it
    from .mutation_verdicts import judge
    from .mutation_workers import judge_all
    from .mutations import make_victims

    counts: dict[str, Counter[str]] = defaultdict(Counter)
    faults, seconds = [], []
    with tempfile.TemporaryDirectory(prefix="bench-mutations-") as directory:
        victims, scratch = Path(directory, "victims"), Path(directory, "scratch")
        make_victims(victims)
        for verdict in judge_all(
            judge,
            victims,
            range(seed, seed + cases),
            scratch,
            seconds=SECONDS,
            processes=processes,
        ):
            kind = verdict.kinds[0] if len(verdict.kinds) == 1 else "two of these"
            counts[kind][verdict.outcome] += 1
            seconds.append(verdict.seconds)
            if verdict.outcome not in ("refused", "right"):
                detail = verdict.detail.replace(directory, "DIR")
                faults.append(f"{verdict.number}: {verdict.outcome}: {detail}")
    return {
        "cases": cases,
        "seed": seed,
        "limit_s": SECONDS,
        "median_s": statistics.median(seconds),
        "slowest_s": max(seconds),
        "kinds": {kind: dict(counts[kind]) for kind in sorted(counts)},
        "faults": sorted(faults)[:_SHOWN_FAULTS],
    }


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``outcomes``: what became of the damaged checkpoints, by kind of damage."""
    shown = ("refused", "right", "wrong", "crash", "hang")
    total: Counter[str] = Counter()
    rows = [["damage", "cases", "refused", "accepted, right", "wrong", "crashes", "hangs"]]
    for kind, counts in figures["kinds"].items():
        total.update(counts)
        cells = [counts.get(outcome, 0) for outcome in shown]
        rows.append([kind, f"{sum(cells):,}", *(f"{cell:,}" for cell in cells)])
    cells = [total[outcome] for outcome in shown]
    rows.append(["all", f"{sum(cells):,}", *(f"{cell:,}" for cell in cells)])
    return {"outcomes": rows}


if __name__ == "__main__":
    main(gate, measure, options)
