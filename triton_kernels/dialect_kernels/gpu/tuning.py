"""Which kernel multiplies T tokens with a weight, and with which tiles: tuning is data.

A plan is looked up in ``configs/gemm,N=…,K=…,device=….json`` (written by measurements), else it
comes from the table below, which is derived from instruction counts and a safe default. A file
holds one plan per number of tokens it was measured at, for each activation format::

    {"dialect": {"1": {"kind": "fused", "tokens": 16, ...}, "4096": {"kind": "scratch"}}, ...}

and the nearest T in log space counts, among those whose plans reach as far. Nothing is measured
while serving.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

__all__ = [
    "FROM_DECODED",
    "FUSED_FOR_MANY",
    "SCRATCH",
    "TABLES",
    "GemmPlan",
    "accumulator_bits",
    "choose",
    "config_name",
    "for_experts",
    "parse_plans",
]

_log = logging.getLogger(__name__)

_KINDS = ("fused", "scratch")


@dataclass(frozen=True)
class GemmPlan:
    """How ``x @ p.T`` is computed.

    Attributes:
        kind: ``"fused"``: weights are decoded in registers; ``"scratch"``: they are decoded to
            memory once, for the library's GEMM.
        tokens, features, columns: the tile of a program of the fused kernel, powers of two; a
            step over K is `columns` wide and at most 512, after which sums are kept in float32.
        splits: programs that share the columns of one tile.
        num_warps, num_stages: of the fused kernel.
    """

    kind: str
    tokens: int = 16
    features: int = 64
    columns: int = 256
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind: {self.kind!r}; allowed are 'fused' and 'scratch'")
        for name, low, high in (
            ("tokens", 16, 256),
            ("features", 64, 256),
            ("columns", 64, 512),
            ("splits", 1, 64),
            ("num_warps", 1, 16),
            ("num_stages", 1, 8),
        ):
            value = getattr(self, name)
            power = name in ("splits", "num_stages") or value & (value - 1) == 0
            if not (low <= value <= high and power):
                raise ValueError(
                    f"{name}: {value}; allowed are {low}..{high}"
                    f"{'' if name in ('splits', 'num_stages') else ', powers of two'}"
                )


TABLES = {
    "fp8": (
        (16, GemmPlan("fused", 16, 128, 256, num_warps=8, num_stages=8)),
        (16, GemmPlan("fused", 16, 64, 256, num_warps=4, num_stages=8)),
        (32, GemmPlan("fused", 32, 256, 128, num_warps=8, num_stages=8)),
        (32, GemmPlan("fused", 32, 128, 256, num_warps=8, num_stages=8)),
        (32, GemmPlan("fused", 32, 64, 256, num_warps=4, num_stages=8)),
        (64, GemmPlan("fused", 64, 256, 256, num_warps=8, num_stages=7)),
        (64, GemmPlan("fused", 64, 128, 256, num_warps=8, num_stages=8)),
        (64, GemmPlan("fused", 64, 64, 256, num_warps=4, num_stages=8)),
        (512, GemmPlan("fused", 64, 256, 256, num_warps=8, num_stages=7)),
        (512, GemmPlan("fused", 128, 128, 256, num_warps=8, num_stages=7)),
    ),
    "fp8_in_tensor_memory": (
        (16, GemmPlan("fused", 16, 64, 256, num_warps=4, num_stages=8)),
        (32, GemmPlan("fused", 32, 64, 256, num_warps=4, num_stages=8)),
        (64, GemmPlan("fused", 64, 128, 256, num_warps=8, num_stages=8)),
        (512, GemmPlan("fused", 128, 128, 256, num_warps=8, num_stages=7)),
    ),
    "fp8_in_warps": (
        (16, GemmPlan("fused", 16, 64, 256, num_warps=4, num_stages=7)),
        (32, GemmPlan("fused", 32, 64, 256, num_warps=4, num_stages=7)),
        (256, GemmPlan("fused", 64, 64, 256, num_warps=4, num_stages=7)),
    ),
    "sixteen_bits": (
        (16, GemmPlan("fused", 16, 64, 256, num_warps=4, num_stages=7)),
        (16, GemmPlan("fused", 32, 256, 128, num_warps=8, num_stages=7)),
        (32, GemmPlan("fused", 32, 128, 256, num_warps=8, num_stages=7)),
        (32, GemmPlan("fused", 32, 256, 128, num_warps=8, num_stages=7)),
        (1024, GemmPlan("fused", 64, 128, 128, num_warps=8, num_stages=7)),
        (1024, GemmPlan("fused", 64, 256, 128, num_warps=8, num_stages=7)),
    ),
    "sixteen_bits_in_tensor_memory": (
        (16, GemmPlan("fused", 16, 64, 256, num_warps=4, num_stages=7)),
        (32, GemmPlan("fused", 32, 128, 256, num_warps=8, num_stages=7)),
        (128, GemmPlan("fused", 64, 128, 128, num_warps=4, num_stages=7)),
    ),
    "sixteen_bits_in_warps": (
        (16, GemmPlan("fused", 16, 64, 256, num_warps=4, num_stages=7)),
        (32, GemmPlan("fused", 32, 64, 128, num_warps=4, num_stages=7)),
        (128, GemmPlan("fused", 64, 64, 128, num_warps=4, num_stages=7)),
    ),
}
"""(largest T, plan) by operands and MMA: Hopper's large one, that of data-centre Blackwell with its
sums in tensor memory, or that of a single warp; beyond the last T scratch. Of several plans for the
same T the one with the fewest expected cycles counts: wide tiles read the tokens less often, but
may be too few for the device.

Derived from compiled code: no spilled registers, only asynchronous copies in the loop, and while it
waits for one step the copies of two more are on their way. That takes 7 stages, because the table
is read at the places that the meta bytes name. Scratch begins where decoding several times costs
about as much as writing the weight once."""
SCRATCH = GemmPlan("scratch")
FUSED_FOR_MANY = GemmPlan("fused", 64, 64, 128, num_stages=7)
"""For many tokens where scratch memory is not possible."""
FROM_DECODED = 65
"""The fewest tokens for which a weight that is kept decoded is read: up to 64 the packed bytes are
read once and fewer; with more, tiles of the fused kernel wait for the L2 cache."""
_MOST_SPLITS = 8
_LEAST_STEPS = 4
"""Steps over K that are worth a program of their own."""
_FARTHEST = 2.0
"""How many times more tokens a plan may have been measured at."""
_FARTHEST_BEYOND = 1.5
"""How many times fewer tokens a plan of the fused kernel may have been measured at."""
_BYTES_PER_WEIGHT = 17 / 32
_INSTRUCTIONS_PER_WEIGHT = 2.5
_SIXTEEN_BITS_COST = 1.5
"""Times as many instructions where weights are decoded to 16 bits."""
_CYCLES_PER_INSTRUCTION = 2.5
_MEMORY_BYTES = 18.5
_CACHE_BYTES = 24
_PRODUCTS = 4096
_SPLIT_CYCLES = 3500
"""What one processor of an H200 is expected to do in a cycle, from the data sheet and from compiled
code: bytes from memory and from the L2 cache, products of the FP8 MMA; and the cycles from the sums
of several programs to the result."""


def choose(
    tokens: int,
    features: int,
    columns: int,
    activation_format: str,
    device_name: str,
    processors: int,
    table: str,
) -> GemmPlan:
    """The plan for a product of [T, K] with [N, K].

    Args:
        tokens, features, columns: T, N and K.
        activation_format: ``"dialect"``, ``"fp8"`` or ``"none"``.
        device_name: as the driver gives it, for a measured configuration.
        processors: multiprocessors of the device.
        table: which of `TABLES` is for the operands on this device.
    """
    plans = _tuned_plans(features, columns, device_name).get(activation_format)
    if not plans:
        _say_once(f"no measured GEMM configuration for {device_name}: using derived ones")
    plan = _measured_plan(tokens, plans or {})
    return plan or _default_plan(tokens, features, columns, processors, table)


def _measured_plan(tokens: int, plans: dict[int, GemmPlan]) -> GemmPlan | None:
    """The plan that was measured nearest to T, in log space; None if none reaches T.

    One that was measured at fewer tokens, and whose tile holds fewer, is the last choice: it would
    read the weight once more.
    """

    def outgrown(measured: int) -> bool:
        plan = plans[measured]
        return plan.kind == "fused" and max(measured, plan.tokens) < tokens

    near = [measured for measured, plan in plans.items() if _reaches(plan, measured, tokens)]
    if not near:
        return None
    position = math.log(tokens)
    return plans[min(near, key=lambda at: (outgrown(at), abs(math.log(at) - position)))]


def _reaches(plan: GemmPlan, measured: int, tokens: int) -> bool:
    """Whether a plan that was measured at some number of tokens is any good at another.

    The library's product is the better the more tokens there are; tiles of the fused kernel that
    are not full cost the same whatever they hold, and more tiles than were measured may be slow.
    """
    if plan.kind == "scratch":
        return tokens * _FARTHEST >= measured
    if max(tokens, measured) <= plan.tokens:
        return True
    return measured <= tokens * _FARTHEST and tokens <= measured * _FARTHEST_BEYOND


def _default_plan(
    tokens: int, features: int, columns: int, processors: int, table: str
) -> GemmPlan:
    """The derived plan with the fewest expected cycles; K is split where tiles are too few."""
    most = next((most for most, _ in TABLES[table] if tokens <= most), None)
    if most is None:
        return SCRATCH
    plans = [plan for limit, plan in TABLES[table] if limit == most]
    several = [
        replace(plan, splits=splits)
        for plan in plans
        for splits in range(1, _MOST_SPLITS + 1)
        if splits == 1 or (_can_split(plan) and columns >= splits * plan.columns * _LEAST_STEPS)
    ]
    operand_bytes = 1 if table.startswith("fp8") else 2
    shape = features, columns
    return min(several, key=lambda plan: _cycles(plan, tokens, shape, processors, operand_bytes))


def _can_split(plan: GemmPlan) -> bool:
    """Whether a plan of the tables has registers for adding the sums of several programs."""
    return plan.features * plan.columns < 256 * 256


def for_experts(plan: GemmPlan) -> GemmPlan:
    """The plan by which experts are multiplied that would have `plan` as single weights.

    Always in registers, with K in one piece; the schedule of experts takes registers as well.
    """
    if plan.kind == "scratch":
        return FUSED_FOR_MANY
    if not _can_split(plan):
        plan = replace(plan, features=plan.features // 2)
    return replace(plan, splits=1)


def _cycles(
    plan: GemmPlan, tokens: int, shape: tuple[int, int], processors: int, operand_bytes: int
) -> float:
    """Expected cycles of a fused plan, to compare plans with each other; never measured.

    Programs of a processor share it: a step takes the longest of reading weights from memory,
    reading weights and tokens from the L2 cache, issuing instructions and multiplying, for all of
    them, but not less than a warp needs for its own instructions one after the other.
    """
    features, columns = shape
    issued = _INSTRUCTIONS_PER_WEIGHT * (1 if operand_bytes == 1 else _SIXTEEN_BITS_COST)
    weights = plan.features * plan.columns
    read = weights * _BYTES_PER_WEIGHT
    step = max(
        read / _MEMORY_BYTES,
        (read + min(tokens, plan.tokens) * plan.columns * operand_bytes) / _CACHE_BYTES,
        weights * issued / (4 * 32),
        weights * plan.tokens * operand_bytes / _PRODUCTS,
    )
    alone = _CYCLES_PER_INSTRUCTION * issued * weights / (32 * plan.num_warps)
    tiles = math.ceil(tokens / plan.tokens) * math.ceil(features / plan.features)
    programs = math.ceil(tiles * plan.splits / processors)
    steps = math.ceil(columns / (plan.columns * plan.splits))
    cycles = steps * max(programs * step, alone)
    if plan.splits > 1:  # sums are written and read again
        cycles += _SPLIT_CYCLES + programs * plan.features * plan.tokens * 8 / _CACHE_BYTES
    return cycles


@lru_cache(maxsize=256)
def _tuned_plans(
    features: int, columns: int, device_name: str, folder: Traversable | None = None
) -> dict[str, dict[int, GemmPlan]]:
    """The measured plans of one weight shape by activation format and T; empty if there are none.

    Raises:
        ValueError: naming file and field, if a file holds something else.
    """
    name = config_name(features, columns, device_name)
    file = (folder or files(__package__) / "configs") / name
    if not file.is_file():
        return {}
    try:
        return parse_plans(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}; measure again or remove the file") from error


@lru_cache(maxsize=16)
def accumulator_bits(device_name: str) -> int | None:
    """Fraction bits that FP8 sums of a device keep across MMAs, or None without a measurement.

    ``configs/probes,device=….json`` holds what ``python -m benchmarks.lib.probes`` prints.

    Raises:
        ValueError: naming the file, if it holds something else.
    """
    name = f"probes,device={device_name.replace(' ', '_')}.json"
    file = files(__package__) / "configs" / name
    if not file.is_file():
        return None
    try:
        bits = json.loads(file.read_text(encoding="utf-8"))["fp8_accumulator_bits"]["across"]
    except (KeyError, TypeError, ValueError):
        bits = None
    if type(bits) is not int:
        raise ValueError(
            f"{name}: holds no integer fp8_accumulator_bits.across; measure again or remove the "
            "file"
        )
    return bits


def config_name(features: int, columns: int, device_name: str) -> str:
    """The name of the file that holds the measured plans of a weight [N, K] on a device."""
    return f"gemm,N={features},K={columns},device={device_name.replace(' ', '_')}.json"


def parse_plans(data: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[int, GemmPlan]]:
    """Plans from the JSON of a file.

    Raises:
        TypeError, ValueError: if a field is unknown, or its value not allowed.
    """
    return {
        activation_format: {int(tokens): GemmPlan(**fields) for tokens, fields in plans.items()}
        for activation_format, plans in data.items()
    }


@cache
def _say_once(message: str) -> None:
    _log.warning(message)
