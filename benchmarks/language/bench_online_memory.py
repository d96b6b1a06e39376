"""How much memory it takes to pack a 16-bit checkpoint while vLLM loads it.

A random bf16 checkpoint of LLaMA-3.2-1B's shape (2.5 GB) is loaded by vLLM's own model loader with
``quantization="blockdialect"`` in a process of its own, on the CPU. The peak of that process's
anonymous memory, less what it held before loading, is compared with the size of the loaded model.

    python -m benchmarks.language.bench_online_memory
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..lib.gate import golden_gate
from ..lib.harness import Table, main
from ..lib.memory import PeakMemory
from ..lib.shapes import LLAMA_1B
from .checkpoints import write_checkpoint

PACKAGES = ("torch", "vllm")
GIB = 2**30
_EMBEDDING_WEIGHTS = LLAMA_1B.vocabulary * LLAMA_1B.hidden
_LARGEST_LAYER = 2 * _EMBEDDING_WEIGHTS  # bytes in bf16; the embedding stays in bf16

_LOAD = """
import json, sys
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader

torch.accelerator.empty_cache = lambda: None  # as in vLLM's CPU worker; it needs a device
path = sys.argv[1]
config = EngineArgs(
    path, quantization="blockdialect", skip_tokenizer_init=True, enforce_eager=True,
    max_model_len=64, dtype="bfloat16",
).create_engine_config()
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{path}/rendezvous", 0, "gloo")
    ensure_model_parallel_initialized(1, 1)
    loader = get_model_loader(config.load_config)
    print("ready", flush=True)
    sys.stdin.readline()
    model = loader.load_model(vllm_config=config, model_config=config.model_config)
by_dtype = {}
for parameter in model.parameters():
    kind = "packed" if parameter.dtype in (torch.uint8, torch.int8) else "kept"
    by_dtype[kind] = by_dtype.get(kind, 0) + parameter.nbytes
print("loaded", json.dumps(by_dtype), flush=True)
sys.stdin.readline()
"""


def measure() -> dict[str, Any]:
    """Bytes of the loaded model, and the peak of anonymous memory while it was loaded."""
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        write_checkpoint(model, LLAMA_1B, file_per_layer=True)
        return load(model)


def load(directory: Path) -> dict[str, Any]:
    """Load the checkpoint in another process and watch its memory."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", _LOAD, str(directory)], env=environment, **pipes
    ) as process:
        _line(process, "ready")
        before = PeakMemory(process.pid)
        before.sample()
        with PeakMemory(process.pid, interval_s=0.01) as peak:
            started = time.perf_counter()
            _say(process)
            held = json.loads(_line(process, "loaded"))
            seconds = time.perf_counter() - started
        _say(process)
    return {
        "parameters": LLAMA_1B.linear_weights + _EMBEDDING_WEIGHTS,
        "packed_bytes": held["packed"],
        "kept_bytes": held["kept"],
        "largest_bf16_layer_bytes": _LARGEST_LAYER,
        "peak_anonymous_bytes": peak.anonymous - before.anonymous,
        "limit_bytes": held["packed"] + held["kept"] + 2 * _LARGEST_LAYER + GIB,
        "seconds": seconds,
    }


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``peak``: the loaded model, the peak, and the limit it must stay under."""

    def gib(name: str) -> str:
        return f"{figures[name] / GIB:.2f} GiB"

    head = ["packed weights", "kept in 16 bit", "largest bf16 layer", "peak while loading", "limit"]
    return {
        "peak": [
            head,
            [
                gib("packed_bytes"),
                gib("kept_bytes"),
                gib("largest_bf16_layer_bytes"),
                gib("peak_anonymous_bytes"),
                gib("limit_bytes"),
            ],
        ]
    }


def _line(process: subprocess.Popen[str], word: str) -> str:
    """The rest of the process's next line that begins with `word`."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word)
    raise RuntimeError(f"loading ended with status {process.wait()} before it said {word!r}")


def _say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


if __name__ == "__main__":
    main(golden_gate, measure)
