"""The CPU kernel against PyTorch's own linear layers, and the speed of the weight quantizer.

One 4096 x 4096 linear layer at several numbers of tokens, activation rounding included; a new copy
of the weight at every call, so many that they do not fit into the last-level cache together. Peers
are ``torch.nn.functional.linear`` in float32 and bfloat16 in the same rounds. Measured twice: with
all instructions of the processor, and in a process of its own where PyTorch, its libraries and the
kernel keep to AVX2.

    python -m benchmarks.kernels.bench_cpu
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, product
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedTensor, cpu, reference
from dialect_kernels.cpu import calls
from dialect_kernels.formatbook import Formatbook
from dialect_plugin.scheme import METHODS

from ..lib.gate import golden_faults
from ..lib.harness import Table, in_new_process, main, ratio, time_calls
from .random_data import random_tokens, random_weight

SIZE = 4096
BLOCK_SIZE = 32
TOKENS = (1, 8, 32, 128, 512, 2048)
GATE_TOKENS = (1, 3, 40)
"""Few, several and many tokens: the kernel treats each differently."""

PEERS = ("float32", "bfloat16")
FORMATS = {name: method.bits for name, method in METHODS.items()}
_AVX2_ALONE = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""For PyTorch, oneDNN and MKL; the kernel follows PyTorch."""

CACHE_BYTES = 96 << 20
"""The copies of one weight take more than this together: three times a large last-level cache."""

Copy = TypeVar("Copy")


def gate() -> list[str]:
    """Where kernel and reference differ, on the data that is measured but fewer rows of it."""
    if not cpu.available():
        return [f"there is no kernel: {cpu.why_not()}"]
    w = random_weight(SIZE, SIZE)[:96]
    faults = golden_faults("cpu")
    for book in (DIALECT_FP4, SEMANTIC_32):
        p = reference.quantize(w, book, BLOCK_SIZE)
        q = cpu.quantize(w, book, BLOCK_SIZE, "mse", book.largest_stored_delta, "none")
        for name in ("codes", "meta", "row_exponent"):
            if not torch.equal(getattr(p, name), getattr(q, name)):
                faults.append(f"quantize, {book.name}: {name} differs from the reference")
    p = reference.quantize(w, DIALECT_FP4, BLOCK_SIZE)
    x = random_tokens(max(GATE_TOKENS), SIZE)
    all_instructions = cpu.INSTRUCTIONS[: cpu.INSTRUCTIONS.index(cpu.features()) + 1]
    for activation_format in FORMATS:
        want = reference.dialect_linear(x, p, None, activation_format)
        for tokens, instructions in product(GATE_TOKENS, all_instructions):
            got = _call(x[:tokens], p, activation_format, "exact", instructions)
            if not torch.equal(got, want[:tokens]):
                faults.append(
                    f"linear, {activation_format}, {tokens} tokens, {instructions}: differs from "
                    "the reference"
                )
    return faults


def measure() -> dict[str, Any]:
    """The figures with all instructions, ``"native"``, and with AVX2 alone, ``"avx2"``."""
    return {"native": figures_here(), "avx2": in_new_process(figures_here, _AVX2_ALONE)}


def figures_here() -> dict[str, Any]:
    """This process's milliseconds per call, ratios to each peer, weights quantized per second."""
    linear = {str(tokens): _measure_linear(tokens) for tokens in TOKENS}
    return {
        "size": SIZE,
        "block_size": BLOCK_SIZE,
        "threads": torch.get_num_threads(),
        "instructions": _instructions(),
        "linear": linear,
        "quantize": {book.name: _measure_quantizer(book) for book in (DIALECT_FP4, SEMANTIC_32)},
    }


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``summary`` of W4A4; ``linear`` and ``linear_avx2``: all; ``quantize``: weights a second."""
    quantize = [["formatbook", "all instructions", "AVX2"]]
    for name in figures["native"]["quantize"]:
        found = (figures[kind]["quantize"][name] for kind in ("native", "avx2"))
        quantize.append([name, *(f"{rate['million_weights_per_s']:.0f}" for rate in found)])
    return {
        "summary": _summary(figures),
        "linear": _linear_table(figures["native"]),
        "linear_avx2": _linear_table(figures["avx2"]),
        "quantize": quantize,
    }


def _summary(figures: dict[str, Any]) -> Table:
    shown = {"avx2": "AVX2", "native": figures["native"]["instructions"].upper().replace("_", " ")}
    rows = [["tokens", *(f"{how} against {peer}" for how in shown.values() for peer in PEERS)]]
    for tokens in figures["native"]["linear"]:
        found = [figures[kind]["linear"][tokens]["dialect"] for kind in shown]
        ratios = [f"{m[f'times_{peer}']['median']:.2f} x" for m in found for peer in PEERS]
        rows.append([tokens, *ratios])
    return rows


def _linear_table(figures: dict[str, Any]) -> Table:
    head = ["tokens", "float32", "bfloat16"]
    for shown in FORMATS.values():
        head += [shown, "against float32", "against bfloat16"]
    rows = [head]
    for tokens, measured in figures["linear"].items():
        row = [tokens, *(f"{measured[peer]['median_ms']:.2f} ms" for peer in PEERS)]
        for name in FORMATS:
            row.append(f"{measured[name]['median_ms']:.2f} ms")
            row += [f"{measured[name][f'times_{peer}']['median']:.2f} x" for peer in PEERS]
        rows.append(row)
    return rows


def _measure_linear(tokens: int) -> dict[str, Any]:
    w = random_weight(SIZE, SIZE)
    x = random_tokens(tokens, SIZE, seed=tokens)
    x32 = x.float()
    q = cpu.quantize(w, DIALECT_FP4, BLOCK_SIZE, "mse", DIALECT_FP4.largest_stored_delta, "none")
    packed = _copies(lambda: _copy(q), q.codes.nbytes)
    dense = {
        dtype: _copies(lambda d=dtype: w.to(d, copy=True), w.numel() * dtype.itemsize)
        for dtype in (torch.float32, torch.bfloat16)
    }
    calls: dict[str, Callable[[], object]] = {
        "float32": _rotating(dense[torch.float32], lambda c: F.linear(x32, c)),
        "bfloat16": _rotating(dense[torch.bfloat16], lambda c: F.linear(x, c)),
    }
    for name in FORMATS:
        calls[name] = _rotating(packed, lambda c, f=name: _call(x, c, f))
    timings = time_calls(calls, rounds=max(7, min(60, 480 // tokens)), warmup=2)
    out: dict[str, Any] = {
        name: {
            "median_ms": 1e3 * timing.median_s,
            "fastest_ms": 1e3 * timing.fastest_s,
            "slowest_ms": 1e3 * timing.slowest_s,
        }
        for name, timing in timings.items()
    }
    for name in FORMATS:
        for peer in PEERS:
            times = ratio(timings[peer], timings[name])
            out[name][f"times_{peer}"] = {
                "median": times.median_s,
                "lowest": times.fastest_s,
                "highest": times.slowest_s,
            }
    return out


def _measure_quantizer(book: Formatbook) -> dict[str, float]:
    w = random_weight(SIZE, SIZE)
    window = book.largest_stored_delta
    timing = time_calls(
        {
            "quantize": lambda: calls.quantize(
                w, book, BLOCK_SIZE, "mse", window, instructions=_instructions()
            )
        },
        rounds=7,
    )["quantize"]
    million = w.numel() / 1e6
    return {
        "million_weights_per_s": million / timing.median_s,
        "million_weights_per_s_lowest": million / timing.slowest_s,
        "million_weights_per_s_highest": million / timing.fastest_s,
    }


def _copies(make: Callable[[], Copy], bytes_each: int) -> list[Copy]:
    return [make() for _ in range(1 + CACHE_BYTES // bytes_each)]


def _rotating(copies: Sequence[Copy], call: Callable[[Copy], object]) -> Callable[[], object]:
    following = cycle(copies)
    return lambda: call(next(following))


def _instructions() -> str:
    """The kernel's best instructions, or AVX2 where torch is limited to it."""
    restricted = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return "avx2" if restricted and cpu.features() != "scalar" else cpu.features()


def _copy(p: PackedTensor) -> PackedTensor:
    codes, meta, row_exponent = (tensor.clone() for tensor in p.tensors)
    return replace(p, codes=codes, meta=meta, row_exponent=row_exponent)


def _call(
    x: torch.Tensor,
    p: PackedTensor,
    activation_format: str,
    accumulation: str = "default",
    instructions: str | None = None,
) -> torch.Tensor:
    used = instructions or _instructions()
    return calls.linear(x, p, None, activation_format, accumulation, instructions=used)


if __name__ == "__main__":
    main(gate, measure)
