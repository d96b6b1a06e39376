"""Measure the tiles of the fused kernel on this GPU and write the fastest into ``configs/``.

For each weight shape, activation format and number of tokens, every candidate is checked against a
plan from the derived table, timed in a CUDA graph on cold weights
(:mod:`benchmarks.lib.gpu_timing`) beside the library's GEMM on decoded weights, and the fastest is
kept. The kernels are compiled once for all shapes.

    python -m benchmarks.kernels.tune                                    # shapes of LLaMA-3-8B
    python -m benchmarks.kernels.tune --shapes 6144x4096 --formats dialect --out DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dialect_kernels import PackedTensor, quantize
from dialect_kernels.gpu.gemm import arrivals
from dialect_kernels.gpu.linear import Route, multiply, quantize_tokens, route
from dialect_kernels.gpu.tuning import GemmPlan, config_name, parse_plans
from dialect_plugin.scheme import METHODS

from ..lib.gpu_timing import copies_for, need_gpu, time_graphs
from ..lib.harness import ROOT
from ..lib.shapes import LLAMA_8B
from .bench_gemm import copy_packed
from .random_data import random_tokens, random_weight

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
"""With more tokens the library multiplies: its GEMM hides the cost of decoding."""
CONFIGS = ROOT / "triton_kernels" / "dialect_kernels" / "gpu" / "configs"
_TILES = {
    # tokens of a tile -> (features, columns, warps) that compile without spilled registers
    16: ((64, 256, 4), (64, 512, 4), (128, 256, 8)),
    32: ((64, 256, 4), (128, 256, 8)),
    64: ((64, 128, 4), (64, 256, 4), (128, 256, 8)),
    128: ((128, 128, 8), (128, 256, 8)),
}
_SPLITS = (1, 2, 3, 4, 6, 8)
_STAGES = (3, 4, 6)
_LEAST_STEPS = 2


def candidates(tokens: int, features: int, columns: int, processors: int) -> Iterator[GemmPlan]:
    """Plans that can be best for [T, K] x [N, K] on a device with so many processors."""
    yield GemmPlan("scratch", 64, 64, 128, num_warps=4, num_stages=3)
    for tile, shapes in _TILES.items():
        if (tile > 16 and tile >= 4 * tokens) or tokens > 8 * tile:
            continue
        for wide, deep, warps in shapes:
            tiles = -(-tokens // tile) * -(-features // wide)
            for splits in _SPLITS:
                steps = columns // (deep * splits)
                if splits > 1 and (steps < _LEAST_STEPS or tiles * splits > 6 * processors):
                    continue
                for stages in _STAGES:
                    yield GemmPlan("fused", tile, wide, deep, splits, warps, stages)


def tune(
    features: int, columns: int, activation_format: str, tokens: tuple[int, ...] = TOKENS
) -> dict[str, dict[str, Any]]:
    """The fastest plan for each number of tokens, as the fields of a configuration file."""
    packed = quantize(random_weight(features, columns, device="cuda").to(torch.bfloat16))
    properties = torch.cuda.get_device_properties(0)
    count = copies_for(packed.codes.nbytes, properties.L2_cache_size)
    copies = [copy_packed(packed) for _ in range(count)]
    best = {}
    for number in tokens:
        x = random_tokens(number, columns, device="cuda")
        plans = list(candidates(number, features, columns, properties.multi_processor_count))
        best[str(number)] = fields(_fastest(x, copies, activation_format, plans))
    return best


def fields(plan: GemmPlan) -> dict[str, Any]:
    """A plan as a configuration file states it; a scratch plan has no tile of its own."""
    return {"kind": "scratch"} if plan.kind == "scratch" else dataclasses.asdict(plan)


def write(
    folder: Path, features: int, columns: int, device_name: str, plans: dict[str, Any]
) -> Path:
    """Add plans to the configuration of a shape; formats that were measured before stay.

    Raises:
        ValueError: if the file there holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / config_name(features, columns, device_name)
    known = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    data = known | plans
    parse_plans(data)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(target)
    return target


def main() -> None:
    """Tune and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune", description=__doc__)
    shapes = [f"{features}x{columns}" for features, columns in LLAMA_8B.fused_projections.values()]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="NxK, e.g. 6144x4096")
    parser.add_argument("--formats", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=CONFIGS)
    given = parser.parse_args()
    need_gpu()
    for shape in given.shapes:
        features, columns = (int(size) for size in shape.split("x"))
        for activation_format in given.formats:
            plans = {activation_format: tune(features, columns, activation_format)}
            file = write(given.out, features, columns, torch.cuda.get_device_name(), plans)
            print(f"wrote {file.name}: {activation_format}", flush=True)


def _fastest(
    x: torch.Tensor, copies: list[PackedTensor], activation_format: str, plans: list[GemmPlan]
) -> GemmPlan:
    """Time every plan that runs on this device and gives the right result."""
    derived = route(len(x), copies[0].shape, activation_format, x.dtype, x.device)
    want = _product(x, copies, activation_format, derived, 0).double()
    largest = want.abs().max()
    calls, by_name = {}, {}
    for plan in plans:
        how = Route(plan, derived.eight_bits)
        try:
            got = _product(x, copies, activation_format, how, 0).double()
        except Exception as error:  # more shared memory or registers than there are
            print(f"  left out: {plan}: {str(error).splitlines()[0][:80]}")
            continue
        if not bool((got - want).abs().max() <= 2.0**-7 * largest):
            raise SystemExit(f"{plan}: wrong result for {len(x)} tokens; nothing was written")
        name = str(len(by_name))
        by_name[name] = plan
        calls[name] = (partial(_product, x, copies, activation_format, how), len(copies))
    times = time_graphs(calls, rounds=3, seconds=0.003)
    return by_name[min(times, key=lambda name: times[name].median_s)]


def _product(
    x: torch.Tensor, copies: list[PackedTensor], activation_format: str, how: Route, i: int
) -> torch.Tensor:
    if activation_format == "none":
        return multiply(x, None, copies[i], None, x.dtype, how)
    zeros = arrivals(len(x), copies[i].shape[0], how.plan, x.device)
    q, scale = quantize_tokens(x, copies[i], activation_format, how, zeros=zeros)
    return multiply(q, scale, copies[i], None, x.dtype, how, arrived=zeros)


if __name__ == "__main__":
    main()
