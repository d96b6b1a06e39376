"""What a linear layer and a layer of experts take of the host, on a GPU that is not there.

Kernels are compiled for an H200, but the driver launches nothing, and tensors lie on the CPU, where
fresh memory takes about as long as from PyTorch's allocator on a GPU. The time of PyTorch's own
dispatch of an op, and of the driver, is not in it; where a weight is decoded in parts, the copies
of their results are, although a GPU would make them.

    python -m benchmarks.kernels.bench_host_time
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from dialect_kernels import PackedExperts, PackedTensor, quantize
from dialect_kernels.gpu import grouped, library, linear

FEATURES = COLUMNS = 4096
TOKENS = (1, 64, 600)
FORMATS = ("dialect", "fp8", "none")
EXPERTS = 8
SALIENT = 16
_REPEATS = 50
_CALLS = 20


def main() -> None:
    """Print microseconds of the host for a call, the best of many runs."""
    _without_gpu()
    torch.set_num_threads(1)
    stored = quantize(torch.randn(FEATURES, COLUMNS))
    experts = PackedExperts(quantize(torch.randn(FEATURES, COLUMNS)), EXPERTS)
    columns = (*FORMATS, f"{SALIENT} tokens decomposed", f"{EXPERTS} experts")
    print("| tokens | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for tokens in TOKENS:
        x = torch.randn(tokens, COLUMNS).to(torch.bfloat16)
        calls = [_product(x, stored, activation_format) for activation_format in FORMATS]
        calls += [_decomposed(x, stored), _of_experts(x, experts)]
        print(f"| {tokens} | " + " | ".join(f"{_microseconds(call):.0f}" for call in calls) + " |")


def _product(x: torch.Tensor, stored: PackedTensor, activation_format: str) -> Callable[[], None]:
    arguments = (*stored.tensors, COLUMNS, stored.book.name, stored.block_size)

    def call() -> None:
        p = PackedTensor.from_op(*arguments)
        linear.covers(x, p, activation_format, "default")
        linear.dialect_linear(x, p, None, activation_format, "default")

    return call


def _decomposed(x: torch.Tensor, stored: PackedTensor) -> Callable[[], None]:
    arguments = (*stored.tensors, COLUMNS, stored.book.name, stored.block_size)
    rows = torch.full((SALIENT,), -1)
    rows[0] = 0

    def call() -> None:
        p = PackedTensor.from_op(*arguments)
        linear.covers(x, p, "dialect", "default")
        linear.semantic_linear(x, p, None, rows, None)

    return call


def _of_experts(x: torch.Tensor, stored: PackedExperts) -> Callable[[], None]:
    arguments = (*stored.tensors, COLUMNS, stored.together.book.name, stored.together.block_size)
    rows = torch.arange(2 * len(x)) % len(x)
    offsets = torch.arange(EXPERTS + 1) * len(rows) // EXPERTS

    def call() -> None:
        experts = PackedExperts.from_op(*arguments)
        linear.covers(x, experts.together, "dialect", "default")
        grouped.grouped_linear(x, rows, offsets, experts, None, "dialect", "default")

    return call


def _microseconds(call: Callable[[], None]) -> float:
    """Of one call, the best of many runs; the first two calls compile and bind."""
    call()
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
