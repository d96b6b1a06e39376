"""How much memory it takes to pack a 16-bit checkpoint while vLLM loads it.

A random bf16 checkpoint of a 1.2-billion-parameter Llama's shape is written to a temporary
directory (2.5 GB) and loaded by vLLM's own model loader with ``quantization="blockdialect"`` in a
process of its own, on the CPU. The peak of that process's anonymous memory over what it held before
loading is compared with what the loaded model occupies.

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

import torch
from safetensors.torch import save_file

from dialect_kernels.verify import verify

from ..lib.harness import Table, main
from ..lib.memory import PeakMemory

PACKAGES = ("torch", "vllm")
HIDDEN, INTERMEDIATE, LAYERS, KEY_VALUE, VOCABULARY = 2048, 8192, 16, 512, 128256
GIB = 2**30
_LARGEST_LAYER = 2 * VOCABULARY * HIDDEN  # bytes in bf16; the embedding, which stays so

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


def gate() -> list[str]:
    """Golden vectors that the installed code does not meet; no figure is shown while there are."""
    return [f"{r.case}: {r.detail}" for r in verify(["cpu"]) if not r.passed]


def measure() -> dict[str, Any]:
    """Bytes of the loaded model, and the peak of anonymous memory while it was loaded."""
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory))
        return load(Path(directory))


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
        "parameters": LAYERS * (2 * HIDDEN * (HIDDEN + KEY_VALUE) + 3 * HIDDEN * INTERMEDIATE)
        + VOCABULARY * HIDDEN,
        "packed_bytes": held["packed"],
        "kept_bytes": held["kept"],
        "largest_bf16_layer_bytes": _LARGEST_LAYER,
        "peak_anonymous_bytes": peak.anonymous - before.anonymous,
        "limit_bytes": held["packed"] + held["kept"] + 2 * _LARGEST_LAYER + GIB,
        "seconds": seconds,
    }


def write_checkpoint(directory: Path) -> None:
    """A random checkpoint with tied embeddings, one file for the embeddings and one a layer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HIDDEN // 64,
        "num_key_value_heads": KEY_VALUE // 64,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=torch.bfloat16) * 0.02

    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    outer = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": norm}
    save_file(outer, directory / "model-outer.safetensors", metadata={"format": "pt"})
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": random(HIDDEN, HIDDEN),
            "self_attn.k_proj": random(KEY_VALUE, HIDDEN),
            "self_attn.v_proj": random(KEY_VALUE, HIDDEN),
            "self_attn.o_proj": random(HIDDEN, HIDDEN),
            "mlp.gate_proj": random(INTERMEDIATE, HIDDEN),
            "mlp.up_proj": random(INTERMEDIATE, HIDDEN),
            "mlp.down_proj": random(HIDDEN, INTERMEDIATE),
            "input_layernorm": norm.clone(),
            "post_attention_layernorm": norm.clone(),
        }
        tensors = {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
        save_file(tensors, directory / f"model-layer-{i:02}.safetensors", metadata={"format": "pt"})


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
    main(gate, measure)
