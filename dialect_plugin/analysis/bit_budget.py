"""Spending a bit budget: which layers take blocks of 16, 32 or 64.

Smaller blocks lose less and take more bits (BlockDialect calls such a mixture dynamic block size).
Every layer has a few points (bits, error). The allocation starts at the cheapest point of each
layer and takes, one by one, the step that saves most error per bit, along the lower convex hull of
each layer, as long as the budget allows (the choice of layers is ours). Its error is above the best
possible one by at most the gain of one layer's step. Layers that engines fuse (q, k and v; gate and
up) count as one layer, because a fused layer has one block size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Literal, TypeVar

from dialect_kernels.formatbook import BLOCK_SIZES

from ..architectures import fused_with
from ..checkpoint.loss import sqnr
from ..checkpoint.tables import layer_table, only_or_blank, shape_cell
from ..scheme import SchemeError, fitting_block_size
from .report import LayerReport, dialect_bits, dialect_name, sample_note

__all__ = [
    "Allocation",
    "Objective",
    "allocate_bits",
    "check_budget",
    "first_part",
    "refuse_below",
    "render",
    "spend",
]

Objective = Literal["error", "relative"]
_Choice = TypeVar("_Choice")
_UNIFORM = 32


@dataclass(frozen=True)
class Allocation:
    """Block sizes under a budget.

    Attributes:
        layers: the measured layers.
        block_sizes: layer -> block size.
        objective: the sum over the layers that was made small: ``"error"``: of their squared
            errors; ``"relative"``: of squared error / energy times weights.
    """

    layers: tuple[LayerReport, ...]
    block_sizes: dict[str, int]
    objective: Objective

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, meta bytes and row exponents included."""
        return _bits(self.layers, self.block_sizes)

    @property
    def sqnr_db(self) -> float:
        """SQNR of all weights together."""
        return _sqnr(self.layers, self.block_sizes)

    @property
    def uniform_block_sizes(self) -> dict[str, int]:
        """The block sizes of a conversion without overrides: 32, or the largest that divides."""
        sizes = {layer.name: fitting_block_size(layer.columns, _UNIFORM) for layer in self.layers}
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def gain_db(self) -> float:
        """SQNR gained over the uniform block size."""
        return self.sqnr_db - _sqnr(self.layers, self.uniform_block_sizes)

    def overrides(self) -> dict[str, dict[str, Any]]:
        """The layers that differ from uniform, as ``quantize --overrides`` reads it."""
        uniform = self.uniform_block_sizes
        return {
            name: {"block_size": size}
            for name, size in self.block_sizes.items()
            if size != uniform[name]
        }


def check_budget(shapes: Mapping[str, Sequence[int]], bits_per_weight: float) -> None:
    """Refuse a budget without choice, by the shapes of the layers alone.

    Args:
        shapes: layer -> (rows, columns) of its weight; of a matrix of all experts, (experts, rows,
            columns).
        bits_per_weight: the budget, on average over all weights.

    Raises:
        SchemeError: if the largest blocks need more, or if the smallest need less.
    """
    groups: dict[str, list[Sequence[int]]] = {}
    for name, shape in shapes.items():
        groups.setdefault(first_part(name), []).append(shape)
    least = most = 0.0
    for group in groups.values():
        sizes = [b for b in BLOCK_SIZES if all(shape[-1] % b == 0 for shape in group)]
        bits = [sum(prod(x) * dialect_bits(x[-2], x[-1], size) for x in group) for size in sizes]
        least, most = least + min(bits), most + max(bits)
    weights = sum(map(prod, shapes.values()))
    refuse_below(least / weights, bits_per_weight)
    if bits_per_weight > most / weights:
        raise SchemeError(
            f"--bits: {bits_per_weight:g}; the smallest blocks need only {most / weights:.4f} bits "
            "per weight: give at most that, or convert with --block-size 16"
        )


def allocate_bits(
    layers: Sequence[LayerReport], bits_per_weight: float, objective: Objective = "error"
) -> Allocation:
    """Choose block sizes for measured layers.

    Args:
        layers: with the losses of the dialect formats.
        bits_per_weight: the budget, on average over all weights of `layers`.
        objective: see :class:`Allocation`.

    Raises:
        SchemeError: if even the largest blocks need more than the budget.
    """
    members: dict[str, list[LayerReport]] = {}
    for layer in layers:
        members.setdefault(first_part(layer.name), []).append(layer)
    points = {name: _points(parts, objective) for name, parts in members.items()}
    weights = sum(layer.weights for layer in layers)
    least = sum(min(bits for bits, _ in sizes.values()) for sizes in points.values())
    refuse_below(least / weights, bits_per_weight)
    chosen = spend(points, bits_per_weight * weights)
    sizes = {layer.name: chosen[first_part(layer.name)] for layer in layers}
    return Allocation(tuple(layers), sizes, objective)


def refuse_below(least: float, bits_per_weight: float) -> None:
    """Raise SchemeError if a budget is below the bits that the largest blocks need."""
    if not bits_per_weight >= least:  # NaN too
        raise SchemeError(
            f"--bits: {bits_per_weight:g}; the largest blocks need {least:.4f} bits per weight: "
            "give at least that"
        )


def spend(
    points: Mapping[str, Mapping[_Choice, tuple[float, float]]], budget: float
) -> dict[str, _Choice]:
    """Take the best step per bit until the budget is spent.

    Args:
        points: layer -> choice, such as a block size -> (bits or another cost, error).
        budget: cost of all layers together, at least the sum of the cheapest.

    Returns:
        layer -> choice.
    """
    hulls = {name: _lower_hull(sizes) for name, sizes in points.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    spent = sum(points[name][size][0] for name, size in chosen.items())
    steps = []
    for order, (name, hull) in enumerate(hulls.items()):
        for before, after in pairwise(hull):
            bits = points[name][after][0] - points[name][before][0]
            gain = points[name][before][1] - points[name][after][1]
            steps.append((-gain / bits, order, name, before, after, bits))
    for _, _, name, before, after, bits in sorted(steps):
        if chosen[name] == before and spent + bits <= budget:
            chosen[name] = after
            spent += bits
    return chosen


def _lower_hull(sizes: Mapping[_Choice, tuple[float, float]]) -> list[_Choice]:
    """Choices on the lower convex hull, cheapest first, each with less error than before."""
    hull: list[_Choice] = []
    for size in sorted(sizes, key=lambda size: sizes[size]):
        if hull and sizes[size][1] >= sizes[hull[-1]][1]:
            continue
        while len(hull) > 1 and _slope(sizes, hull[-1], size) < _slope(sizes, hull[-2], hull[-1]):
            hull.pop()
        hull.append(size)
    return hull


def _slope(sizes: Mapping[_Choice, tuple[float, float]], before: _Choice, after: _Choice) -> float:
    """Change of error per bit, negative."""
    return (sizes[after][1] - sizes[before][1]) / (sizes[after][0] - sizes[before][0])


def first_part(name: str) -> str:
    """The first of the layers that engines fuse with the layer `name`: it stands for all."""
    return (fused_with(name) or (name,))[0]


def _points(parts: Sequence[LayerReport], objective: Objective) -> dict[int, tuple[int, float]]:
    """Bits and error of layers that take one block size, for each size that divides all."""
    points = {}
    for size in BLOCK_SIZES:
        name = dialect_name(size)
        if all(name in part.losses for part in parts):
            bits = sum(round(part.losses[name].bits_per_weight * part.weights) for part in parts)
            error = sum(part.losses[name].noise * _importance(part, objective) for part in parts)
            points[size] = (bits, error)
    return points


def _importance(layer: LayerReport, objective: Objective) -> float:
    """The factor of a layer's squared error in the objective."""
    return layer.weights / layer.signal if objective == "relative" and layer.signal else 1.0


def _bits(layers: Sequence[LayerReport], sizes: Mapping[str, int]) -> float:
    bits = sum(x.weights * x.losses[dialect_name(sizes[x.name])].bits_per_weight for x in layers)
    return bits / sum(layer.weights for layer in layers)


def _sqnr(layers: Sequence[LayerReport], sizes: Mapping[str, int]) -> float:
    noise = sum(layer.losses[dialect_name(sizes[layer.name])].noise for layer in layers)
    return sqnr(sum(layer.signal for layer in layers), noise)


def render(allocation: Allocation) -> str:
    """The SQNR gained, how many layers take which blocks, and those that differ from uniform."""
    uniform = allocation.uniform_block_sizes

    def cells(layers: Sequence[LayerReport]) -> list[str]:
        names = [layer.name for layer in layers]
        own = only_or_blank(str(allocation.block_sizes[name]) for name in names)
        counts = [""] * len(BLOCK_SIZES)
        if len(layers) > 1:
            taken = Counter(allocation.block_sizes[name] for name in names)
            counts = [str(taken[size] or "–") for size in BLOCK_SIZES]
        gained, before = (_sqnr(layers, s) for s in (allocation.block_sizes, uniform))
        return [shape_cell(layers), own, *counts, f"{gained:.2f}", f"{before:.2f}"]

    different = allocation.overrides()
    heads = [f"layers\nof {size}" for size in BLOCK_SIZES]
    table = layer_table(
        ["shape", "block", *heads, "SQNR\ndB", f"with\n{_UNIFORM}"],
        allocation.layers,
        cells,
        [layer for layer in allocation.layers if layer.name in different],
        "layers that differ from uniform blocks",
    )
    return (
        f"{allocation.bits_per_weight:.4f} bits per weight, SQNR {allocation.sqnr_db:.3f} dB\n"
        f"uniform blocks of {_UNIFORM}: {_bits(allocation.layers, uniform):.4f} bits, "
        f"{_sqnr(allocation.layers, uniform):.3f} dB; gain {allocation.gain_db:+.3f} dB\n"
        f"{sample_note(allocation.layers)}\n\n{table}"
    )
