"""Measure the tiles of the fused kernel on this GPU and write the fastest into ``configs/``.

For each weight shape, activation format and number of tokens, every candidate is checked against a
plan from the derived table, timed in a CUDA graph on cold weights
(:mod:`benchmarks.lib.gpu_timing`) beside the library's GEMM on decoded weights, and the fastest is
kept. The kernels are compiled once for all shapes. Each plan is written as soon as it is found, and
what the files already hold is not measured again.

    python -m benchmarks.kernels.tune                                    # shapes of LLaMA-3-8B
    python -m benchmarks.kernels.tune --shapes 6144x4096 --formats dialect --out DIR
    python -m benchmarks.kernels.tune --few                              # about ten candidates each
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dialect_kernels import PackedTensor, quantize
from dialect_kernels.gpu.gemm import arrivals
from dialect_kernels.gpu.linear import Route, multiply, quantize_tokens, route
from dialect_kernels.gpu.tuning import TABLES, GemmPlan, config_name, parse_plans
from dialect_plugin.scheme import METHODS

from ..lib.gpu_timing import copies_for, microseconds, need_gpu, time_graphs
from ..lib.harness import ROOT, Report, Timing
from ..lib.shapes import LLAMA_8B
from .bench_gemm import copy_packed
from .random_data import random_tokens, random_weight

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
"""With more tokens the library multiplies: its GEMM hides the cost of decoding."""
CONFIGS = ROOT / "triton_kernels" / "dialect_kernels" / "gpu" / "configs"
_TILES = {
    # tokens of a tile -> (features, columns, warps) that compile without spilled registers
    16: ((64, 256, 4), (64, 512, 4), (128, 256, 8)),
    32: ((64, 256, 4), (128, 256, 8), (256, 256, 8)),
    64: ((64, 128, 4), (64, 256, 4), (128, 256, 8), (256, 256, 8)),
    128: ((128, 128, 8), (128, 256, 8)),
}
_SPLITS = (1, 2, 3, 4, 6, 8)
_STAGES = tuple(
    sorted({3, 4, 6, 8} | {plan.num_stages for table in TABLES.values() for _, plan in table})
)
_LEAST_STEPS = 2
_WIDEST_SPLIT = 128
"""Features of a tile beyond which no register is left for adding the sums of several programs."""


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
                if splits > 1 and wide > _WIDEST_SPLIT:
                    continue
                for stages in _STAGES:
                    yield GemmPlan("fused", tile, wide, deep, splits, warps, stages)


def few_candidates(
    derived: GemmPlan, tokens: int, features: int, columns: int, processors: int
) -> list[GemmPlan]:
    """The candidates nearest to the plan that the table derives, ten to nineteen.

    The derived tile with every number of stages and three of splits, other tiles with the most
    stages and its splits.
    """
    tiles: dict[tuple[int, int, int], list[GemmPlan]] = {}
    found = [derived]
    for plan in candidates(tokens, features, columns, processors):
        if plan.kind == "scratch":
            found.append(plan)
        else:
            tiles.setdefault(_tile(plan), []).append(plan)
    for tile, plans in tiles.items():
        splits = sorted(
            {plan.splits for plan in plans}, key=lambda each: (abs(each - derived.splits), each)
        )
        stages = derived.num_stages if tile == _tile(derived) else max(_STAGES)
        most = 3 if tile == _tile(derived) else 1
        found += [
            plan
            for plan in plans
            if (plan.num_stages == stages and plan.splits in splits[:most])
            or (tile == _tile(derived) and plan.splits == splits[0])
        ]
    return list(dict.fromkeys(found))


def _tile(plan: GemmPlan) -> tuple[int, int, int]:
    return plan.tokens, plan.features, plan.columns


class Weight:
    """A random weight on the GPU, as often as it takes to find it in no cache.

    Attributes:
        copies: of the packed weight.
        processors: multiprocessors of the device.
    """

    def __init__(self, features: int, columns: int) -> None:
        packed = quantize(random_weight(features, columns, device="cuda").to(torch.bfloat16))
        properties = torch.cuda.get_device_properties(0)
        count = copies_for(packed.codes.nbytes, properties.L2_cache_size)
        self.copies = [copy_packed(packed) for _ in range(count)]
        self.processors = properties.multi_processor_count

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.copies[0].shape

    def route(self, tokens: int, activation_format: str) -> Route:
        """What the dispatch chooses for bfloat16 tokens."""
        device = torch.device("cuda")
        return route(tokens, self.shape, activation_format, torch.bfloat16, device)

    def candidates(self, tokens: int, activation_format: str, few: bool) -> list[GemmPlan]:
        """Plans to measure, few or all."""
        sizes = (tokens, *self.shape, self.processors)
        if few:
            return few_candidates(self.route(tokens, activation_format).plan, *sizes)
        return list(candidates(*sizes))


def fastest(times: dict[GemmPlan, Timing]) -> GemmPlan:
    """The plan with the least median."""
    return min(times, key=lambda plan: times[plan].median_s)


def missing(
    folder: Path, shape: tuple[int, int], activation_format: str, tokens: Iterable[int]
) -> list[int]:
    """Those numbers of tokens for which the configuration of a shape holds no plan yet."""
    file = folder / config_name(*shape, torch.cuda.get_device_name())
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return [count for count in tokens if str(count) not in known.get(activation_format, {})]


def fields(plan: GemmPlan) -> dict[str, Any]:
    """A plan as a configuration file states it; a scratch plan has no tile of its own."""
    return {"kind": "scratch"} if plan.kind == "scratch" else dataclasses.asdict(plan)


def write(
    folder: Path, features: int, columns: int, device_name: str, plans: dict[str, Any]
) -> Path:
    """Add plans to the configuration of a shape; those of other formats and tokens stay.

    Raises:
        ValueError: if the file there holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / config_name(features, columns, device_name)
    known = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    data = known | {name: known.get(name, {}) | found for name, found in plans.items()}
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
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--few", action="store_true", help="measure about ten candidates each")
    parser.add_argument("--out", type=Path, default=CONFIGS)
    given = parser.parse_args()
    need_gpu()
    for shape in given.shapes:
        features, columns = (int(size) for size in shape.split("x"))
        for activation_format in given.formats:
            tune((features, columns), activation_format, given.tokens, given.out, few=given.few)


def tune(
    shape: tuple[int, int],
    activation_format: str,
    tokens: Iterable[int],
    out: Path,
    few: bool = False,
    report: Report = lambda **_: None,
) -> None:
    """Write the fastest plan of a weight [N, K] for each number of tokens that has none in `out`.

    Args:
        shape: N and K.
        activation_format: ``"dialect"``, ``"fp8"`` or ``"none"``.
        tokens: T, each.
        out: folder of configurations.
        few: measure about ten candidates, not all.
        report: receives every plan with its time.
    """
    wanted = missing(out, shape, activation_format, tokens)
    weight = Weight(*shape) if wanted else None
    for count in wanted:
        assert weight is not None
        plans = weight.candidates(count, activation_format, few)
        times = time_plans(weight, count, activation_format, plans)
        for plan, timing in times.items():
            found = {"plan": fields(plan), **microseconds(timing)}
            report(shape=list(shape), format=activation_format, tokens=count, **found)
        best = {activation_format: {str(count): fields(fastest(times))}}
        file = write(out, *shape, torch.cuda.get_device_name(), best)
        print(f"wrote {file.name}: {activation_format}, {count} tokens", flush=True)


def time_plans(
    weight: Weight, tokens: int, activation_format: str, plans: Iterable[GemmPlan]
) -> dict[GemmPlan, Timing]:
    """Time every plan that runs on this device; quantizing the tokens is part of it.

    Raises:
        SystemExit: if a plan's result is not that of the derived plan.
    """
    x = random_tokens(tokens, weight.shape[1], device="cuda")
    derived = weight.route(tokens, activation_format)
    want = _product(x, weight.copies, activation_format, derived, 0).double()
    largest = want.abs().max()
    calls, by_name = {}, {}
    for plan in plans:
        how = Route(plan, derived.eight_bits)
        try:
            got = _product(x, weight.copies, activation_format, how, 0).double()
        except Exception as error:  # more shared memory or registers than there are
            print(f"  left out: {plan}: {str(error).splitlines()[0][:80]}")
            continue
        if not bool((got - want).abs().max() <= 2.0**-7 * largest):
            raise SystemExit(f"{plan}: wrong result for {tokens} tokens; nothing was written")
        name = str(len(by_name))
        by_name[name] = plan
        product = partial(_product, x, weight.copies, activation_format, how)
        calls[name] = (product, len(weight.copies))
    times = time_graphs(calls, rounds=3, seconds=0.003)
    return {by_name[name]: timing for name, timing in times.items()}


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
