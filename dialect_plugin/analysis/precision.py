"""Spending bits and FP8 activations where text shows that they help.

Every layer has an estimated loss in nats for each block size and for 4-bit and FP8 activations
(:mod:`.output_error`). Block sizes are chosen under a budget of bits, by the steps that save most
per bit, and FP8 activations under a budget of weights that may have them: a price per weight is
sought at which the best plan keeps that budget. Another book or rotation than the scheme's costs
nothing, so each layer takes those that clearly lose less. Layers that engines fuse take the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import mul
from typing import Any

from dialect_kernels.formatbook import BLOCK_SIZES, BookName, Rotation, book_by_name

from ..checkpoint.tables import layer_table, only_or_blank, shape_cell
from ..scheme import METHODS, ActivationFormat, fitting_block_size
from .bit_budget import first_part, refuse_below, spend
from .output_error import LayerOutput, OutputLoss
from .output_formats import OutputFormat, dialect_formats
from .output_report import expert_notes
from .report import dialect_name

__all__ = ["SCHEME", "Form", "PrecisionPlan", "plan_precision", "planned_formats", "render"]

_UNIFORM = 32
_STEPS = 40
"""Halvings of the interval that holds the price of FP8 activations."""
_CLEARLY = 0.95
"""Another book or rotation is taken where the estimated loss is at most so many times as large."""


@dataclass(frozen=True)
class Form:
    """A book and a rotation; None for what the scheme has.

    Attributes:
        book: the formatbook.
        rotation: of weight and activations.
    """

    book: BookName | None = None
    rotation: Rotation | None = None

    def formats(self, book: BookName) -> tuple[OutputFormat, ...]:
        """What is measured of it, in a scheme with `book`."""
        return dialect_formats(book_by_name(self.book or book), self.rotation, self._suffix)

    def name(self, block_size: int) -> str:
        """Of its format with blocks of `block_size`."""
        return dialect_name(block_size) + self._suffix

    def overrides(self) -> dict[str, str]:
        """What of it differs from the scheme."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @property
    def shown(self) -> str:
        """What of it differs from the scheme, for tables."""
        words = {"book": "{}", "rotation": "rotation {}"}
        return ", ".join(words[key].format(value) for key, value in self.overrides().items())

    @property
    def _suffix(self) -> str:
        return "".join(f", {value}" for value in self.overrides().values())


SCHEME = Form()
"""What the scheme has."""


def planned_formats(book: BookName, others: Sequence[Form]) -> list[OutputFormat]:
    """What is measured for a plan in a scheme with `book`; `others` as for `plan_precision`."""
    return [entry for form in (SCHEME, *others) for entry in form.formats(book)]


class _Forms:
    """The best form of each group of layers, by block size and activations.

    Args:
        layers: with the losses of all `others`, too, where their blocks and rotation fit.
        others: forms beside the scheme's.
    """

    def __init__(self, layers: Sequence[LayerOutput], others: Sequence[Form]) -> None:
        self._best: dict[tuple[str, int, ActivationFormat], Form] = {}
        for parts in _groups(layers):
            for size in BLOCK_SIZES:
                fitting = [
                    form
                    for form in (SCHEME, *others)
                    if all(form.name(size) in part.losses for part in parts)
                ]
                for activations in METHODS if SCHEME in fitting else ():
                    nats = {
                        form: sum(part.losses[form.name(size)].nats[activations] for part in parts)
                        for form in fitting
                    }
                    best = min(fitting, key=nats.__getitem__)
                    clear = nats[best] < _CLEARLY * nats[SCHEME]
                    group = first_part(parts[0].name)
                    self._best[group, size, activations] = best if clear else SCHEME

    def of(self, layer: str, size: int, activations: ActivationFormat) -> Form:
        """The form that a layer takes."""
        return self._best.get((first_part(layer), size, activations), SCHEME)

    def applied(self, layer: LayerOutput) -> LayerOutput:
        """The layer with the losses of its best forms in the place of the scheme's."""
        losses = dict(layer.losses)
        for size in BLOCK_SIZES:
            if SCHEME.name(size) in losses:
                best = {a: self.of(layer.name, size, a).name(size) for a in METHODS}
                nats = {a: layer.losses[name].nats[a] for a, name in best.items()}
                losses[SCHEME.name(size)] = replace(losses[SCHEME.name(size)], nats=nats)
        return replace(layer, losses=losses)


@dataclass(frozen=True)
class PrecisionPlan:
    """Block sizes and activation formats under budgets, and books and rotations.

    Attributes:
        layers: the measured layers.
        block_sizes: layer -> block size.
        activations: layer -> format of its activations, ``"dialect"`` or ``"fp8"``.
        forms: layer -> its book and rotation, where they are not the scheme's.
    """

    layers: tuple[LayerOutput, ...]
    block_sizes: Mapping[str, int]
    activations: Mapping[str, ActivationFormat]
    forms: Mapping[str, Form] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, meta bytes and row exponents included."""
        bits = sum(x.weights * _loss(x, self.block_sizes).bits_per_weight for x in self.layers)
        return bits / self._weights

    @property
    def fp8_share(self) -> float:
        """Share of the weights whose activations are FP8."""
        return sum(x.weights for x in self.layers if self._is_fp8(x)) / self._weights

    @property
    def nats(self) -> float:
        """Estimated loss of all layers, in nats per token."""
        return sum(self.nats_of(layer) for layer in self.layers)

    @property
    def uniform(self) -> PrecisionPlan:
        """A conversion without overrides: blocks of 32, or the largest that divide, W4A4."""
        return PrecisionPlan(
            self.layers, _uniform_sizes(self.layers), {x.name: "dialect" for x in self.layers}
        )

    @property
    def _weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    def form_of(self, layer: str) -> Form:
        """Book and rotation of a layer."""
        return self.forms.get(layer, SCHEME)

    def nats_of(self, layer: LayerOutput) -> float:
        """Estimated loss of a layer, in nats per token."""
        loss = layer.losses[self.form_of(layer.name).name(self.block_sizes[layer.name])]
        return loss.nats[self.activations[layer.name]]

    def overrides(self) -> dict[str, dict[str, Any]]:
        """The layers that differ from uniform, as ``quantize --overrides`` reads it."""
        before = self.uniform
        found: dict[str, dict[str, Any]] = {}
        for layer in self.layers:
            name = layer.name
            keys: dict[str, Any] = {}
            if self.block_sizes[name] != before.block_sizes[name]:
                keys["block_size"] = self.block_sizes[name]
            if self._is_fp8(layer):
                keys["activation_format"] = "fp8"
            keys |= self.form_of(name).overrides()
            if keys:
                found[name] = keys
        return found

    def _is_fp8(self, layer: LayerOutput) -> bool:
        return self.activations[layer.name] == "fp8"


def plan_precision(
    layers: Sequence[LayerOutput],
    bits_per_weight: float | None,
    fp8_share: float | None,
    others: Sequence[Form] = (),
) -> PrecisionPlan:
    """Choose block sizes, activation formats, books and rotations for measured layers.

    Args:
        layers: with the losses of the scheme's formats, and of those of `others`.
        bits_per_weight: the budget, on average over all weights of `layers`; None for blocks of 32
            everywhere.
        fp8_share: most of the weights, as a share, that take FP8 activations; None for none.
        others: books and rotations to choose from, beside the scheme's.

    Raises:
        SchemeError: if even the largest blocks need more than the budget.
    """
    forms = _Forms(layers, others)
    plan = PrecisionPlan(tuple(map(forms.applied, layers)), {}, {}).uniform
    found = _planned(plan, bits_per_weight, fp8_share)
    chosen = {
        name: forms.of(name, size, found.activations[name])
        for name, size in found.block_sizes.items()
    }
    different = {name: form for name, form in chosen.items() if form != SCHEME}
    return replace(found, layers=tuple(layers), forms=different)


def _planned(
    plan: PrecisionPlan, bits_per_weight: float | None, fp8_share: float | None
) -> PrecisionPlan:
    """The best block sizes and activations under budgets, for a uniform plan."""
    if fp8_share is None:
        return _spent(plan, bits_per_weight)
    budgets = _Budgets(bits_per_weight, fp8_share)
    steepest = max((_saved(layer) / layer.weights for layer in plan.layers), default=0.0)
    low, high = 0.0, 2 * steepest
    best: PrecisionPlan | None = None
    for _ in range(_STEPS):
        price = (low + high) / 2
        found = budgets.at_price(plan, price)
        if found.fp8_share > fp8_share:
            low = price
            continue
        high = price
        found = budgets.filled(found)
        if best is None or found.nats < best.nats:
            best = found
    return best or budgets.filled(_spent(plan, bits_per_weight))


def _spent(plan: PrecisionPlan, bits_per_weight: float | None) -> PrecisionPlan:
    """The plan with the best block sizes for its activations."""
    if bits_per_weight is None:
        return plan
    return _Budgets(bits_per_weight, 0.0).with_block_sizes(plan)


class _Budgets:
    """Bits per weight, or None for uniform blocks; and the share of weights with FP8."""

    def __init__(self, bits: float | None, share: float) -> None:
        self._bits, self._share = bits, share

    def at_price(self, plan: PrecisionPlan, price: float) -> PrecisionPlan:
        """The best plan if FP8 activations cost so many nats a weight, whatever their share."""
        found = self.with_block_sizes(plan, price)
        activations: dict[str, ActivationFormat] = {}
        for parts in _groups(plan.layers):
            losses = [_loss(part, found.block_sizes) for part in parts]
            saved = sum(loss.nats["dialect"] - loss.nats["fp8"] for loss in losses)
            paid = price * sum(part.weights for part in parts)
            activations |= {part.name: "fp8" if saved > paid else "dialect" for part in parts}
        return PrecisionPlan(plan.layers, found.block_sizes, activations)

    def filled(self, plan: PrecisionPlan) -> PrecisionPlan:
        """The plan, or a better one that spends what a price leaves of the budgets."""
        changed = self._with_activations(plan)
        changed = self.with_block_sizes(changed)
        return min(plan, changed, key=lambda candidate: candidate.nats)

    def with_block_sizes(self, plan: PrecisionPlan, price: float | None = None) -> PrecisionPlan:
        """The plan with the best block sizes for its activations or, at a price, for the best."""
        if self._bits is None:
            return plan
        points: dict[str, dict[int, tuple[float, float]]] = {}
        for parts in _groups(plan.layers):
            group = points.setdefault(first_part(parts[0].name), {})
            for size in BLOCK_SIZES:
                if all(dialect_name(size) in part.losses for part in parts):
                    losses = [part.losses[dialect_name(size)] for part in parts]
                    weights = [part.weights for part in parts]
                    bits = map(round, map(mul, (x.bits_per_weight for x in losses), weights))
                    if price is None:
                        given = [plan.activations[part.name] for part in parts]
                        nats = sum(x.nats[a] for x, a in zip(losses, given, strict=True))
                    else:
                        four, eight = (sum(x.nats[a] for x in losses) for a in ("dialect", "fp8"))
                        nats = min(four, eight + price * sum(weights))
                    group[size] = sum(bits), nats
        weights_of_all = sum(layer.weights for layer in plan.layers)
        least = sum(min(bits for bits, _ in sizes.values()) for sizes in points.values())
        refuse_below(least / weights_of_all, self._bits)
        chosen = spend(points, self._bits * weights_of_all)
        sizes = {layer.name: chosen[first_part(layer.name)] for layer in plan.layers}
        return PrecisionPlan(plan.layers, sizes, plan.activations)

    def _with_activations(self, plan: PrecisionPlan) -> PrecisionPlan:
        """The plan with the best formats of activations for its block sizes."""
        points: dict[str, dict[ActivationFormat, tuple[float, float]]] = {}
        for parts in _groups(plan.layers):
            losses = [_loss(part, plan.block_sizes) for part in parts]
            four, eight = (sum(x.nats[a] for x in losses) for a in ("dialect", "fp8"))
            weights = float(sum(part.weights for part in parts))
            points[first_part(parts[0].name)] = {"dialect": (0.0, four), "fp8": (weights, eight)}
        chosen = spend(points, self._share * sum(layer.weights for layer in plan.layers))
        activations = {layer.name: chosen[first_part(layer.name)] for layer in plan.layers}
        return PrecisionPlan(plan.layers, plan.block_sizes, activations)


def _groups(layers: Sequence[LayerOutput]) -> list[list[LayerOutput]]:
    """Layers that engines fuse together, and each other one alone."""
    groups: dict[str, list[LayerOutput]] = {}
    for layer in layers:
        groups.setdefault(first_part(layer.name), []).append(layer)
    return list(groups.values())


def _saved(layer: LayerOutput) -> float:
    """The most nats that FP8 activations save, in any blocks."""
    return max(loss.nats["dialect"] - loss.nats["fp8"] for loss in layer.losses.values())


def _loss(layer: LayerOutput, sizes: Mapping[str, int]) -> OutputLoss:
    return layer.losses[dialect_name(sizes[layer.name])]


def _uniform_sizes(layers: Sequence[LayerOutput]) -> dict[str, int]:
    sizes = {layer.name: fitting_block_size(layer.columns, _UNIFORM) for layer in layers}
    return {name: size for name, size in sizes.items() if size is not None}


def render(plan: PrecisionPlan, unseen: Sequence[str] = ()) -> str:
    """The estimated loss saved, and the layers that differ from uniform.

    Args:
        unseen: experts' modules that could not be measured.
    """
    uniform = plan.uniform
    different = plan.overrides()

    def cells(layers: Sequence[LayerOutput]) -> list[str]:
        def named(values: Callable[[LayerOutput], str]) -> str:
            return only_or_blank(map(values, layers))

        saved, before = (sum(map(p.nats_of, layers)) for p in (plan, uniform))
        form = [named(lambda layer: plan.form_of(layer.name).shown)] if plan.forms else []
        return [
            shape_cell(layers),
            named(lambda layer: str(plan.block_sizes[layer.name])),
            named(lambda layer: METHODS[plan.activations[layer.name]].bits),
            *form,
            f"{1000 * saved:.3f}",
            f"{1000 * before:.3f}",
            f"{100 * before / max(uniform.nats, 1e-30):.1f}",
        ]

    table = layer_table(
        [
            *("shape", "block", "method"),
            *(["book,\nrotation"] if plan.forms else []),
            *("loss\nmnats", f"with {_UNIFORM}\nW4A4", "% of\nall"),
        ],
        plan.layers,
        cells,
        [layer for layer in plan.layers if layer.name in different],
        "layers that differ from uniform blocks",
    )
    share = plan.nats / uniform.nats if uniform.nats else 1.0
    return (
        f"{plan.bits_per_weight:.4f} bits per weight, FP8 activations in "
        f"{100 * plan.fp8_share:.1f} % of the weights\n"
        f"estimated KL divergence {plan.nats:.4f} nats per token, {share:.2f} x that of uniform "
        f"blocks of {_UNIFORM} in W4A4: {uniform.nats:.4f} at {uniform.bits_per_weight:.4f} bits\n"
        "an estimate ranks layers; the model's loss is measured with `blockdialect evaluate`\n"
        f"{expert_notes(plan.layers, unseen)}\n{table}"
    )
