"""The quantizers on a GPU: tokens in flight, and weights while a model loads.

Tokens are compared with a plain per-token FP8 quantization of the same tensor, once by this
project's kernel and once written in PyTorch operations. The share of quantizing is its part of the
time of quantizing and multiplying, summed over the four layers of LLaMA-3-8B.

    python -m benchmarks.kernels.bench_quantize                    # needs a GPU
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, quantize, reference

from ..lib.gate import golden_faults
from ..lib.gpu_timing import copies_for, measure_ceilings, microseconds, need_gpu, time_graphs
from ..lib.harness import Report, Table, main, time_calls
from ..lib.shapes import LLAMA_8B
from .random_data import random_tokens

PACKAGES = ("torch", "triton")
TOKENS = (1, 16, 256, 2048, 16384)
COLUMNS = (LLAMA_8B.hidden, LLAMA_8B.intermediate)
KINDS = {
    "FP8": "FP8, this kernel",
    "torch": "FP8, PyTorch operations",
    "dialect": "DialectFP4, two_stage",
    "semantic": "32 dialects, lut",
    "decomposed": "32 dialects, 10 % decomposed",
    "grouped": "32 dialects, decomposed and grouped",
}
"""Kind -> its name in the tables; the others are compared with the first."""
SHARE_TOKENS = (2048, 4096, 16384)


def gate() -> list[str]:
    """Faults of the kernels on this GPU.

    Raises:
        SystemExit: if there is none.
    """
    need_gpu()
    faults = golden_faults("cuda")
    for columns in COLUMNS:
        x = _tokens(33, columns)
        for book in (DIALECT_FP4, SEMANTIC_32):
            q, scale = _quantizers()["dialect" if book is DIALECT_FP4 else "semantic"](x)
            want = reference.round_activation(x, book)
            if not torch.equal(q.float() * scale[:, None], want):
                faults.append(f"{book.name}, {columns} columns: differs from the reference")
    return faults


def measure(tokens: list[int], report: Report = lambda **_: None) -> dict[str, Any]:
    """Microseconds of quantizing tokens, a layer's shares, and seconds for the weights of 8B.

    Args:
        tokens: T, each.
        report: receives ``kind``, ``of`` and ``found`` of each measurement.
    """
    ceilings = measure_ceilings(torch.device("cuda"))
    figures: dict[str, dict[str, Any]] = {"tokens": {}, "share": {}, "weights": {}}

    def add(kind: str, of: str, found: Any) -> None:
        figures[kind][of] = found
        report(kind=kind, of=of, found=found)

    for columns in COLUMNS:
        for count in tokens:
            found = _measure_tokens(count, columns, ceilings.bytes_per_s)
            add("tokens", f"{count} x {columns}", found)
    for count in SHARE_TOKENS:
        add("share", str(count), _measure_share(count))
    for book in (DIALECT_FP4, SEMANTIC_32):
        add("weights", book.name, _measure_weights(book))
    return figures


def options(parser: argparse.ArgumentParser) -> None:
    """Which numbers of tokens."""
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``tokens``, ``share`` of the four layers, ``weights``."""
    rows = [["tokens x columns", *KINDS.values(), "two_stage to FP8"]]
    for shape, times in figures["tokens"].items():
        cells = [
            f"{times[kind]['median_us']:.1f} µs ({times[kind]['of_copy']:.0%})" for kind in KINDS
        ]
        ratio = times["dialect"]["median_us"] / times["FP8"]["median_us"]
        rows.append([shape, *cells, f"{ratio:.2f} x"])
    share = [["tokens", "quantizing", "of the four layers"]]
    for tokens, found in figures["share"].items():
        share.append([tokens, f"{found['quantize_us']:.0f} µs", f"{found['share']:.1%}"])
    weights = [["formatbook", "million weights a second", LLAMA_8B.name]]
    for name, found in figures["weights"].items():
        million = f"{found['weights_per_s'] / 1e6:.0f}"
        weights.append([name, million, f"{LLAMA_8B.linear_weights / found['weights_per_s']:.1f} s"])
    return {"tokens": rows, "share": share, "weights": weights}


def _quantizers() -> dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    from dialect_kernels.gpu.quantize_activations import quantize_activation
    from dialect_kernels.gpu.quantize_fp8 import quantize_activation_fp8

    def decomposed(x: torch.Tensor, grouped: bool) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.arange(len(x), device=x.device)
        group = (row % 64).to(torch.int32) if grouped else None
        return quantize_activation(x, SEMANTIC_32, salient=row[::10], group=group)

    return {
        "FP8": quantize_activation_fp8,
        "torch": _fp8_by_torch,
        "dialect": partial(quantize_activation, book=DIALECT_FP4),
        "semantic": partial(quantize_activation, book=SEMANTIC_32),
        "decomposed": partial(decomposed, grouped=False),
        "grouped": partial(decomposed, grouped=True),
    }


def _fp8_by_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(dim=1).float() / 448
    return (x.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


def _measure_tokens(tokens: int, columns: int, bytes_per_s: float) -> dict[str, Any]:
    moved = 3 * tokens * columns  # two bytes read, one written
    count = copies_for(2 * tokens * columns, torch.cuda.get_device_properties(0).L2_cache_size)
    copies = [_tokens(tokens, columns, seed) for seed in range(min(count, 16))]
    calls = {
        kind: (partial(_rotate, call, copies), len(copies)) for kind, call in _quantizers().items()
    }
    times = time_graphs(calls)
    return {
        kind: microseconds(timing) | {"of_copy": round(moved / bytes_per_s / timing.median_s, 4)}
        for kind, timing in times.items()
    }


def _rotate(call: Callable[[torch.Tensor], object], copies: list[torch.Tensor], i: int) -> object:
    return call(copies[i])


def _measure_share(tokens: int) -> dict[str, float]:
    """The share of quantizing in the layers' time; weights are decoded in each call."""
    from dialect_kernels.gpu.linear import multiply, quantize_tokens, route

    quantize_s = multiply_s = 0.0
    for features, columns in LLAMA_8B.fused_projections.values():
        p = quantize(_tokens(features, columns) / 50)
        x = _tokens(tokens, columns)
        how = route(tokens, p.shape, "dialect", x.dtype, x.device)
        q, scale = quantize_tokens(x, p, "dialect", how)
        times = time_graphs(
            {
                "quantize": (
                    lambda _, p=p, x=x, how=how: quantize_tokens(x, p, "dialect", how),
                    2,
                ),
                "multiply": (
                    lambda _, p=p, q=q, s=scale, how=how: multiply(
                        q, s, p, None, torch.bfloat16, how
                    ),
                    2,
                ),
            }
        )
        quantize_s += times["quantize"].median_s
        multiply_s += times["multiply"].median_s
    return {
        "quantize_us": 1e6 * quantize_s,
        "multiply_us": 1e6 * multiply_s,
        "share": quantize_s / (quantize_s + multiply_s),
    }


def _measure_weights(book: Any) -> dict[str, float]:
    """The exact-error quantizer on the largest layer, outside of a graph: it checks for NaN."""
    weight = _tokens(28672, 4096) / 50
    timing = time_calls(
        {"quantize": lambda: quantize(weight, book)}, rounds=7, synchronize=torch.cuda.synchronize
    )["quantize"]
    return {"weights_per_s": weight.numel() / timing.median_s}


def _tokens(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    return random_tokens(tokens, columns, seed, "cuda")


if __name__ == "__main__":
    main(gate, measure, options)
