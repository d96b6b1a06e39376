"""Times on a GPU: graphs of calls on rotating copies, and the two ceilings of the device.

A weight that fits into the cache is read from there the second time, and a launch costs as much as
a small product. So a call is captured in a CUDA graph as often as there are copies of its weight,
each copy once: nothing is launched by the host, and every copy has left the cache when it comes
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .harness import Timing

__all__ = [
    "Ceilings",
    "copies_for",
    "measure_ceilings",
    "microseconds",
    "need_gpu",
    "on_gpu",
    "reason",
    "time_graphs",
]

_CACHES = 3
"""Copies take at least this many times the last-level cache together."""
_MOST_COPIES = 64


@dataclass(frozen=True)
class Ceilings:
    """The device's own rates in this run; a kernel's share of them is shown beside its time.

    Attributes:
        bytes_per_s: a large copy, bytes read and written.
        bf16_per_s, fp8_per_s: floating-point operations of a large product of the library; FP8 is 0
            where the device has none.
    """

    bytes_per_s: float
    bf16_per_s: float
    fp8_per_s: float

    def floor_s(self, moved: int, operations: int, eight_bits: bool) -> float:
        """The least time for `moved` bytes and `operations`, in seconds."""
        rate = self.fp8_per_s if eight_bits and self.fp8_per_s else self.bf16_per_s
        return max(moved / self.bytes_per_s, operations / rate)


def copies_for(bytes_each: int, cache_bytes: int) -> int:
    """How many copies of a weight do not fit into the cache together; at least two."""
    return max(2, min(_MOST_COPIES, 1 + math.ceil(_CACHES * cache_bytes / max(1, bytes_each))))


def need_gpu() -> None:
    """Raise SystemExit if there is no CUDA device."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a GPU, and there is no CUDA device")


def on_gpu(gate: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """`gate`, preceded by a check that there is a GPU."""

    def with_gpu() -> list[str]:
        need_gpu()
        return gate()

    return with_gpu


def reason(error: Exception) -> str:
    """An error of another project in one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def time_graphs(
    calls: Mapping[str, tuple[Callable[[int], object], int]],
    *,
    rounds: int = 7,
    seconds: float = 0.01,
    may_fail: Container[str] = (),
    failed: dict[str, str] | None = None,
) -> dict[str, Timing]:
    """Time calls in turn, so that a change of the device's pace meets all of them.

    Args:
        calls: name -> (call, copies); the call takes the number of a copy.
        rounds, seconds: each of the timed rounds replays every graph for about `seconds`.
        may_fail: names of calls that may raise; the result leaves out those that do.
        failed: receives their reasons.

    Returns:
        Seconds per call.
    """
    graphs = {}
    for name, (call, copies) in calls.items():
        try:
            graphs[name] = _captured(call, copies), copies
        except Exception as error:
            if name not in may_fail:
                raise
            if failed is not None:
                failed[name] = reason(error)
    repeats = {}
    for name, (graph, _) in graphs.items():
        repeats[name] = max(1, round(seconds / max(1e-6, _replay_s(graph, 2) / 2)))
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, copies) in graphs.items():
            taken[name].append(_replay_s(graph, repeats[name]) / (repeats[name] * copies))
    return {name: Timing.of(rounds_s) for name, rounds_s in taken.items()}


def _captured(call: Callable[[int], object], copies: int) -> torch.cuda.CUDAGraph:
    """A graph of one call for each copy; two calls before it compile the kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(2):
            call(i % copies)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    return graph


def _replay_s(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy a gigabyte, and multiply matrices of 8192 x 8192, on random data."""
    size = 8192
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    b = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    calls: dict[str, tuple[Callable[[int], object], int]] = {
        "copy": (lambda _: target.copy_(source), 1),
        "bf16": (lambda _: F.linear(a, b), 1),
    }
    if torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        calls["fp8"] = (
            lambda _: torch._scaled_mm(
                a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
            ),
            1,
        )
    times = time_graphs(calls, seconds=0.02)
    rate = {name: 2 * size**3 / times[name].median_s for name in ("bf16", "fp8") if name in times}
    return Ceilings(2 * source.numel() / times["copy"].median_s, rate["bf16"], rate.get("fp8", 0.0))


def microseconds(timing: Timing) -> dict[str, Any]:
    """Median, fastest and slowest, for a result's figures."""
    return {
        "median_us": round(1e6 * timing.median_s, 3),
        "fastest_us": round(1e6 * timing.fastest_s, 3),
        "slowest_us": round(1e6 * timing.slowest_s, 3),
    }
