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
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.lib import harness
from benchmarks.lib.memory import PeakMemory
from dialect_kernels import reference
from dialect_kernels.verify import verify
from dialect_plugin.checkpoint.reader import open_checkpoint, open_packed

HIDDEN, INTERMEDIATE, LAYERS, KEY_VALUE, VOCABULARY = 2048, 8192, 16, 512, 128_256
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
Figures = dict[str, Any]


def gate() -> list[str]:
    """Faults of the golden vectors, and of a converted checkpoint against the reference."""
    faults = [f"{r.case}: {r.detail}" for r in verify(["cpu"]) if not r.passed]
    with tempfile.TemporaryDirectory() as directory:
        source, packed = Path(directory, "source"), Path(directory, "packed")
        write_checkpoint(source, layers=1, vocabulary=64, divisor=8)
        convert(source, packed)
        weights = load_file(source / "model.safetensors")
        found = open_packed(packed)
        for projection in PROJECTIONS:
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
        write_checkpoint(source, LAYERS, VOCABULARY)
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
    weights = LAYERS * sum(rows * columns for rows, columns in PROJECTIONS.values())
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


def write_checkpoint(path: Path, layers: int, vocabulary: int, divisor: int = 1) -> None:
    """A random checkpoint: Gaussian weights, the same ones in every layer.

    Args:
        path: directory to make.
        layers, vocabulary: their number.
        divisor: what to divide both dimensions of all projections by.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

    hidden = HIDDEN // divisor
    embedding = random(64, hidden).repeat(-(-vocabulary // 64), 1)[:vocabulary].contiguous()
    tensors = {"model.embed_tokens.weight": embedding}
    for projection, (rows, columns) in PROJECTIONS.items():
        weight = random(rows // divisor, columns // divisor)
        for layer in range(layers):
            tensors[f"model.layers.{layer}.{projection}.weight"] = weight.clone()
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden).bfloat16()
    tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = CONFIG | {"num_hidden_layers": layers, "vocab_size": vocabulary, "hidden_size": hidden}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _children_cpu_seconds() -> float:
    """User and system time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def convert(source: Path, packed: Path) -> PeakMemory:
    """Run the shipped command and return its peak memory.

    Raises:
        SystemExit: with what the command said, if it fails.
    """
    command = [sys.executable, "-m", "dialect_plugin.cli", "quantize", str(source), str(packed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with PeakMemory(process.pid) as peak:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"blockdialect quantize failed:\n{output}")
    return peak


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
