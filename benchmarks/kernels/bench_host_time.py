"""What a linear layer on a GPU takes of the host, on a GPU that is not there.

Kernels are compiled for an H200, but the driver launches nothing, and tensors lie on the CPU, where
fresh memory takes about as long as from PyTorch's allocator on a GPU. The time of PyTorch's own
dispatch of an op, and of the driver, is not in it; where a weight is decoded in parts, the copies
of their results are, although a GPU would make them.

    python -m benchmarks.kernels.bench_host_time
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from dialect_kernels import PackedTensor, quantize
from dialect_kernels.gpu import library, linear

FEATURES = COLUMNS = 4096
TOKENS = (1, 64, 600)
FORMATS = ("dialect", "fp8", "none")
_REPEATS = 50
_CALLS = 20


def main() -> None:
    """Print microseconds of the host for a call, the best of many runs."""
    _without_gpu()
    torch.set_num_threads(1)
    stored = quantize(torch.randn(FEATURES, COLUMNS))
    print("| tokens | " + " | ".join(FORMATS) + " |")
    print("|---|" + "---|" * len(FORMATS))
    for tokens in TOKENS:
        x = torch.randn(tokens, COLUMNS).to(torch.bfloat16)
        times = [_microseconds(x, stored, activation_format) for activation_format in FORMATS]
        print(f"| {tokens} | " + " | ".join(f"{each:.0f}" for each in times) + " |", flush=True)


def _microseconds(x: torch.Tensor, stored: PackedTensor, activation_format: str) -> float:
    arguments = (*stored.tensors, COLUMNS, stored.book.name, stored.block_size)

    def call() -> None:
        p = PackedTensor.from_op(*arguments)
        linear.covers(x, p, activation_format, "default")
        linear.dialect_linear(x, p, None, activation_format, "default")

    call()
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return 1e6 * best / _CALLS


def _without_gpu() -> None:
    """Let Triton compile for an H200 and launch nothing; the library multiplies nothing."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_active_torch_device=lambda: torch.device("cpu"),
        launcher_cls=lambda source, metadata: lambda *arguments: None,
        utils=SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        ),
    )
    triton.runtime.driver.set_active(driver)
    facts = linear._Device("NVIDIA H200", 132, (9, 0), 60 << 20)
    product = torch.empty(max(TOKENS), FEATURES, dtype=torch.bfloat16)
    replaced: dict[Any, dict[str, Any]] = {
        linear: {"_device": lambda device: facts, "runs_on": lambda device: True},
        library: {"_scaled_product": lambda x, _, w, *__: product[: len(x), : len(w)]},
        torch.nn.functional: {"linear": lambda x, w: product[: len(x), : len(w)]},
    }
    for module, names in replaced.items():
        for name, function in names.items():
            setattr(module, name, function)


if __name__ == "__main__":
    main()
