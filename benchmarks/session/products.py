"""Our products at few tokens: the plan of the dispatch beside plans that differ from it in one way.

Every number of stages, other tiles, other splits, and the library's product on decoded weights,
each at every layer of LLaMA-3-8B. A line for each, before the next is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from dialect_kernels.gpu.tuning import GemmPlan

from ..kernels.tune import Weight, fields, time_plans
from ..lib.gpu_timing import microseconds
from ..lib.shapes import LLAMA_8B
from . import small_gate
from .records import Work

__all__ = ["TOKENS", "measure", "variants"]

TOKENS = (1, 16, 64, 128, 512)
_STAGES = (3, 4, 6, 7, 8)
_SPLITS = (1, 2, 3, 4, 6, 8)
_TILES = (
    # tokens, features, columns, warps, stages
    (16, 64, 256, 4, 8),
    (16, 128, 256, 8, 8),
    (32, 64, 256, 4, 8),
    (64, 64, 256, 4, 8),
    (64, 128, 256, 8, 8),
    (64, 256, 256, 8, 7),
    (128, 128, 256, 8, 7),
)
_MOST_TILES = 8
"""A plan with more tiles of tokens reads the weight too often to be of interest."""


def measure(work: Work) -> None:
    """Layer by layer, the plan of the dispatch first."""
    gate = "passed" if not small_gate.faults(work.results) else "not passed"
    for layer, shape in LLAMA_8B.fused_projections.items():
        weight = Weight(*shape)
        for tokens in TOKENS:
            today = weight.route(tokens, "dialect").plan
            plans = list(dict.fromkeys(variants(today, tokens, shape[1])))
            times = time_plans(weight, tokens, "dialect", plans)
            for plan, timing in times.items():
                work.lines.add(
                    layer=layer,
                    shape=list(shape),
                    tokens=tokens,
                    today=plan == today,
                    plan=fields(plan),
                    gate=gate,
                    **microseconds(timing),
                )
        del weight
        torch.cuda.empty_cache()


def variants(today: GemmPlan, tokens: int, columns: int) -> Iterator[GemmPlan]:
    """Today's plan, then those that differ from it in stages, tile or splits."""
    yield today
    yield GemmPlan("scratch")
    if today.kind == "fused":
        for stages in _STAGES:
            yield dataclasses.replace(today, num_stages=stages)
        for splits in _SPLITS:
            if tokens <= 16 and columns // (splits * today.columns) >= 2:
                yield dataclasses.replace(today, splits=splits)
    for tile, features, deep, warps, stages in _TILES:
        if tile < 4 * max(16, tokens) and tokens <= _MOST_TILES * tile:
            yield GemmPlan("fused", tile, features, deep, today.splits, warps, stages)
