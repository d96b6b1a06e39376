"""How fast ``blockdialect quantize`` is, and how much memory it takes.

The shipped command converts a random bf16 checkpoint of the shape of LLaMA-3.2-1B (hidden size
2048, 16 layers, intermediate size 8192, 8 key-value heads of 64, vocabulary 128,256, tied
embeddings; one file) with its defaults, in a process of its own. Everything counts: starting
Python, checking for NaN, quantizing, writing and flushing to disk. The processor time is given
beside the elapsed time: it hardly depends on what else the machine is doing.

    python -m benchmarks.language.bench_convert [--rounds 3]
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dialect_kernels import reference
from dialect_plugin.checkpoint.reader import open_checkpoint, open_packed

from ..lib import harness
from ..lib.gate import golden_faults
from ..lib.shapes import LLAMA_1B
from .checkpoints import convert, write_checkpoint

SMALL = replace(LLAMA_1B, hidden=256, intermediate=1024, head=8, layers=1, vocabulary=64)
"""What the gate converts: an eighth of the channels, one layer."""
Figures = dict[str, Any]


def gate() -> list[str]:
    """Faults of the golden vectors, and of a converted checkpoint against the reference."""
    faults = golden_faults("cpu")
    with tempfile.TemporaryDirectory() as directory:
        source, packed = Path(directory, "source"), Path(directory, "packed")
        write_checkpoint(source, SMALL)
        convert(source, packed)
        weights = load_file(source / "model.safetensors")
        found = open_packed(packed)
        for projection in SMALL.projections:
            name = f"model.layers.0.{projection}"
            expected = reference.quantize(weights[f"{name}.weight"][:32])
            stored = found.read(name).slice_rows(0, 32)
            for field in ("codes", "meta", "row_exponent"):
                if not torch.equal(getattr(stored, field), getattr(expected, field)):
                    faults.append(f"{name}: {field} differ from the reference's")
    return faults


def measure(rounds: int = 3) -> Figures:
    """Seconds and peak memory of each round; weights and bytes."""
    seconds, cpu_seconds, pss, anonymous = [], [], [], []
    with tempfile.TemporaryDirectory() as directory:
        source, packed = Path(directory, "source"), Path(directory, "packed")
        write_checkpoint(source, LLAMA_1B)
        for _ in range(rounds):
            start, cpu_start = time.perf_counter(), _children_cpu_seconds()
            peak = convert(source, packed)
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(_children_cpu_seconds() - cpu_start)
            pss.append(peak.pss)
            anonymous.append(peak.anonymous)
            found = open_packed(packed)
            layers = len(found.layers)
            packed_bytes = sum(info.nbytes for info in found.checkpoint.tensors.values())
            shutil.rmtree(packed)
        source_bytes = sum(info.nbytes for info in open_checkpoint(source).tensors.values())
    weights = LLAMA_1B.linear_weights
    timing = harness.Timing.of(seconds)
    return {
        "layers": layers,
        "quantized_weights": weights,
        "source_bytes": source_bytes,
        "packed_bytes": packed_bytes,
        "time": timing.model_dump(),
        "cpu_time": harness.Timing.of(cpu_seconds).model_dump(),
        "weights_per_s": weights / timing.median_s,
        "peak_pss_bytes": pss,
        "peak_anonymous_bytes": anonymous,
    }


def _children_cpu_seconds() -> float:
    """User and system time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def options(parser: argparse.ArgumentParser) -> None:
    """How often."""
    parser.add_argument("--rounds", type=int, default=3)


def tables(figures: Figures) -> dict[str, harness.Table]:
    """The one table of a conversion."""
    gigabytes = [f"{figures[key] / 1e9:.2f} GB" for key in ("source_bytes", "packed_bytes")]
    seconds = figures["time"]
    spread = f"{seconds['fastest_s']:.1f} to {seconds['slowest_s']:.1f} s"
    return {
        "conversion": [
            ["`blockdialect quantize`, 1B shape", ""],
            ["tensors", f"{gigabytes[0]} → {gigabytes[1]}"],
            ["weights quantized", f"{figures['quantized_weights'] / 1e6:.0f} million"],
            ["time, median", f"{seconds['median_s']:.1f} s ({spread})"],
            ["rate", f"{figures['weights_per_s'] / 1e6:.1f} million weights/s"],
            ["processor time, median", f"{figures['cpu_time']['median_s']:.1f} s"],
            ["peak memory (PSS)", f"{max(figures['peak_pss_bytes']) / 2**30:.2f} GiB"],
            [
                "peak anonymous memory (no mapped files)",
                f"{max(figures['peak_anonymous_bytes']) / 2**30:.2f} GiB",
            ],
        ]
    }


if __name__ == "__main__":
    harness.main(gate, measure, options)
