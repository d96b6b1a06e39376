"""What rounding a layer does to its output on text, and what that costs the model's predictions.

The decoder runs twice, block by block. Forwards, the second moments of the layers' inputs are
collected on most windows of the text, and some rows of every weight are rounded to every format as
a calibrated conversion would round them (rule ``gptq``). Backwards, on the other windows, the
gradient of the log-likelihood of tokens that the model itself draws reaches every layer's output.

An error ``dy`` of an output changes the log-likelihood by ``g . dy``, and half the mean square of
that is, for small errors, the KL divergence between the predictions before and after (the score's
second moment is the Fisher information). With errors that are independent from token to token, from
row to row of the weight and from column to column of the input, it is the sum of two parts (ours)::

    weights      1/2 sum over tokens t, rows n     g_tn**2     (dW_n . x_t)**2
    activations  1/2 sum over tokens t, columns k  (g_t W)_k**2  dx_tk**2

A routed expert's tokens are those that the router sends to it, and the gradient at its output holds
the router's weight. The losses of a matrix of all experts of a decoder layer add up to one entry,
because engines give all of them one format; all tokens of the text are what it is averaged over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import torch

from dialect_kernels import PackedTensor
from dialect_kernels.baselines import quantize_fp8
from dialect_kernels.formatbook import ROTATION_GROUP, Rotation
from dialect_kernels.ops import dequantize
from dialect_kernels.rotation import rotate_activation, rotate_weight

from ..calibration.blocks import DecoderBlocks
from ..calibration.calibrator import groups_of, open_calibration
from ..calibration.experts import (
    ExpertInput,
    collected,
    expert_inputs,
    held_rows,
    matrix_in,
    observed,
)
from ..calibration.moments import SharedInput, Watch
from ..calibration.options import CalibrationOptions
from ..checkpoint.progress import Progress
from ..checkpoint.reader import Checkpoint, CheckpointError
from ..experts import expert_of, name_for_all, stacks
from ..scheme import METHODS, ActivationFormat, LayerFormat
from .output_formats import Moments, OutputFormat, Stored
from .report import sampled_rows

__all__ = [
    "FINEST_FIRST",
    "ExpertOutput",
    "LayerOutput",
    "OutputLoss",
    "measure_outputs",
]

_Of = TypeVar("_Of")
_ExpertMatrix = tuple[str, int, bool]
"""(name of the experts' module, number of the expert, whether the matrix is down)."""
FINEST_FIRST: Final[tuple[ActivationFormat, ...]] = ("none", "fp8", "dialect")
"""Formats of activations, from W4A16 to W4A4."""
_SHARE = 4
"""One of so many windows is measured; the others calibrate."""


@dataclass(frozen=True)
class OutputLoss:
    """What a format costs a layer.

    Attributes:
        bits_per_weight: stored bits per weight, scales included.
        noise: format of the activations -> squared error of the output, summed over rows and
            averaged over tokens.
        nats: format of the activations -> estimated KL divergence of the model's predictions if
            this layer alone is rounded, in nats per token.
    """

    bits_per_weight: float
    noise: Mapping[ActivationFormat, float]
    nats: Mapping[ActivationFormat, float]


@dataclass(frozen=True)
class ExpertOutput:
    """One expert's share in the output of a matrix of all experts.

    Attributes:
        number: of the expert.
        tokens: how many of the measured tokens the router sent to it; without any it loses nothing.
        rare: whether it saw too few of the calibrating tokens and was rounded to nearest.
        nats: format -> format of the activations -> its part of the estimated loss.
    """

    number: int
    tokens: int
    rare: bool
    nats: Mapping[str, Mapping[ActivationFormat, float]]


@dataclass(frozen=True)
class LayerOutput:
    """A layer's output on text in all formats whose blocks divide its columns.

    Attributes:
        name: the layer; of routed experts, the name of a matrix of all of them.
        rows, columns: shape of its weight; of one expert's.
        measured_rows: how many of these rows were rounded.
        signal: square of the output, bias left out, summed over rows and averaged over tokens.
        losses: format -> its loss.
        experts: the experts of which it is a matrix, in their order; empty for other layers.
    """

    name: str
    rows: int
    columns: int
    measured_rows: int
    signal: float
    losses: Mapping[str, OutputLoss]
    experts: tuple[ExpertOutput, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights."""
        return max(1, len(self.experts)) * self.rows * self.columns


def measure_outputs(
    checkpoint: Checkpoint,
    forms: Mapping[str, LayerFormat],
    formats: Sequence[OutputFormat],
    options: CalibrationOptions,
    progress: Progress,
    max_rows: int | None = None,
) -> tuple[LayerOutput, ...]:
    """Measure what each format does to each layer's output on text.

    One window of four is measured, evenly spread; the others calibrate. A single window does both.

    Args:
        checkpoint: the 16-bit source.
        forms: layer -> its rotation; the rest of a format is not used.
        formats: the formats. One with a rotation is left out where it needs other columns.
        options: text, windows, damping and device.
        progress: receives every layer, in two passes.
        max_rows: round at most this many rows of a layer, spread evenly; None for all. Experts
            share them (:func:`.report.sampled_rows`).

    Returns:
        One entry for each layer, and one for each matrix of all experts of a decoder layer, in the
        order of `forms`; none for experts whose inputs transformers does not show.

    Raises:
        CheckpointError: one sentence, if text, tokenizer, model or device cannot be used, or a
            layer lies outside of the model's repeated blocks.
    """
    blocks, text = open_calibration(checkpoint, forms, options)
    for name in forms:
        if name not in blocks.linear and expert_of(name) is None:
            raise CheckpointError(
                f"{name}: lies outside of the repeated blocks, where no output is measured; "
                f"--ignore it, or leave --calibrate out"
            )
    run = _Run(checkpoint, blocks, forms, formats, options.damping, progress, max_rows)
    run.forwards(text.windows)
    run.backwards()
    return run.result()


@dataclass
class _Sums:
    """A matrix's rounded rows, and what is summed over the tokens."""

    name: str
    shape: tuple[int, int]
    chosen: torch.Tensor
    calibrated: bool = False
    tokens: int = 0
    rounded: dict[Rotation, dict[str, Stored]] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    signal: float = 0.0
    noise: dict[tuple[str, ActivationFormat], float] = field(default_factory=dict)
    nats: dict[tuple[str, ActivationFormat], float] = field(default_factory=dict)

    def put(self, rotation: Rotation, entry: OutputFormat, rows: Stored) -> None:
        """Rows that a format has rounded."""
        self.rounded.setdefault(rotation, {})[entry.name] = rows
        self.bits[entry.name] = entry.bits(*self.shape)

    def add(
        self, weight: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor, inputs: _Inputs
    ) -> None:
        """Add the tokens of a product: its input [T, K], and the gradient at its output [T, N]."""
        self.tokens += len(x)
        scale = self.shape[0] / max(1, len(self.chosen))
        slopes = gradient[:, self.chosen].square_()
        for number, (rotation, formats) in enumerate(self.rounded.items()):
            exact = inputs.exact(x, rotation)
            y = exact @ rotate_weight(weight[self.chosen], rotation).T
            if number == 0:  # with every rotation the same but for roundings
                self.signal += scale * _energy(y)
            # (g W') ** 2, in which W' is the weight that is rounded
            slopes_of_input = rotate_weight(gradient @ weight, rotation).square_()
            for name, stored in formats.items():
                values = stored.to(x.device)
                values = dequantize(values) if isinstance(values, PackedTensor) else values
                error = (exact @ values.T).sub_(y)
                of_weights = 0.5 * scale * float((slopes * error.square()).sum(dtype=torch.float64))
                for activations in METHODS:
                    lost, noise = 0.0, _energy(error)
                    if activations != "none":
                        rounded = inputs.rounded(x, rotation, name, activations)
                        slopes_times_errors = (rounded - exact).square_().mul_(slopes_of_input)
                        lost = float(slopes_times_errors.sum(dtype=torch.float64))
                        noise = _energy((rounded @ values.T).sub_(y))
                    key = name, activations
                    self.noise[key] = self.noise.get(key, 0.0) + scale * noise
                    self.nats[key] = self.nats.get(key, 0.0) + of_weights + 0.5 * lost

    def nats_in(self, name: str, tokens: int) -> dict[ActivationFormat, float]:
        """The estimated loss in a format, averaged over `tokens` tokens."""
        return {a: self.nats.get((name, a), 0.0) / tokens for a in METHODS}

    def expert(self, number: int, tokens: int) -> ExpertOutput:
        """The matrix as one of an expert."""
        nats = {name: self.nats_in(name, tokens) for name in self.bits}
        return ExpertOutput(number, self.tokens, not self.calibrated, nats)


def _layer_output(name: str, matrices: Sequence[_Sums], tokens: int) -> LayerOutput:
    """A layer, or a matrix of all experts, of which each has one, in means over `tokens` tokens."""
    first = matrices[0]
    losses = {}
    for format_name, bits in first.bits.items():
        noise = {
            a: sum(part.noise.get((format_name, a), 0.0) for part in matrices) / tokens
            for a in METHODS
        }
        every = [part.nats_in(format_name, tokens) for part in matrices]
        nats = {a: sum(part[a] for part in every) for a in METHODS}
        losses[format_name] = OutputLoss(bits, noise, nats)
    numbers = [expert.number for part in matrices if (expert := expert_of(part.name)) is not None]
    experts = [part.expert(number, tokens) for number, part in zip(numbers, matrices, strict=False)]
    return LayerOutput(
        name,
        *first.shape,
        len(first.chosen),
        sum(part.signal for part in matrices) / tokens,
        losses,
        tuple(sorted(experts, key=lambda expert: expert.number)),
    )


class _Run:
    """Two passes over the decoder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: DecoderBlocks,
        forms: Mapping[str, LayerFormat],
        formats: Sequence[OutputFormat],
        damping: float,
        progress: Progress,
        max_rows: int | None,
    ) -> None:
        self._found: dict[str, _Sums] = {}
        self._tokens = 0
        self._blocks, self._forms, self._formats = blocks, forms, formats
        self._damping, self._progress, self._max_rows = damping, progress, max_rows
        self._holders = blocks.linear | blocks.experts
        self._stacks = stacks(name for name in forms if name in self._holders)
        self._weights = {name: checkpoint.weights[name] for name in self._holders}
        self._before: list[list[torch.Tensor]] = []
        self._gradients: list[torch.Tensor] = []

    def result(self) -> tuple[LayerOutput, ...]:
        """What was measured, after both passes."""
        return tuple(
            _layer_output(name, [self._found[member] for member in members], self._tokens)
            for name, members in self._stacks.items()
        )

    def forwards(self, windows: torch.Tensor) -> None:
        """Round rows of every layer, and keep what the measured windows give to the blocks."""
        count = max(1, len(windows) // _SHARE)
        measured = [index * len(windows) // count for index in range(count)]
        others = [index for index in range(len(windows)) if index not in measured] or measured
        self._tokens = count * windows.shape[1]
        self._begin("calibrating")
        hidden = self._blocks.embed(windows)
        for number in range(len(self._blocks)):
            self._before.append([hidden[index] for index in measured])
            with self._blocks.loaded(number) as modules:
                self._forward(number, modules, hidden, others)
                for index in measured:
                    if index not in others:
                        hidden[index] = self._blocks.run(number, hidden[index])
            self._advance(number)
        finals = [hidden[index] for index in measured]
        self._gradients = self._blocks.scores(windows[measured], finals)

    def _forward(
        self,
        number: int,
        modules: Mapping[str, torch.nn.Linear],
        hidden: list[torch.Tensor],
        others: Sequence[int],
    ) -> None:
        """Round rows of a loaded block's layers, and run it on the calibrating windows, in place.

        It runs once more for each group of experts' inputs whose moments are in memory together.
        """
        experts, needed = self._blocks.experts_in(number), self._expert_inputs(number)
        *groups, last = groups_of(list(needed), self._blocks.block(number))
        for group in groups:
            with collected(experts, group) as inputs:
                for index in others:
                    self._blocks.run(number, hidden[index])
            self._round_experts(experts, inputs, needed, group)
        watches = self._watches(modules)
        with collected(experts, last) as inputs:
            with ExitStack() as stack:
                for watch in watches.values():
                    stack.enter_context(watch.first_pass())
                hidden[others[0]] = self._blocks.run(number, hidden[others[0]])
            with ExitStack() as stack:
                for watch in watches.values():
                    stack.enter_context(watch.later_passes())
                for index in others[1:]:
                    hidden[index] = self._blocks.run(number, hidden[index])
        self._round_experts(experts, inputs, needed, last)
        for rotation, watch in watches.items():
            self._round_layers(modules, rotation, watch.inputs)

    def backwards(self) -> None:
        """Measure the layers from the last block to the first."""
        self._begin("measuring")
        for number in reversed(range(len(self._blocks))):
            before = self._before.pop()
            with self._blocks.loaded(number) as modules:
                experts = self._blocks.experts_in(number)
                for index, state in enumerate(before):
                    with _tapping(modules) as calls, _tapping_experts(experts) as products:
                        self._gradients[index] = self._blocks.differentiate(
                            number, state, self._gradients[index]
                        )
                    inputs = _Inputs(self._formats)
                    for call in calls:
                        if call.gradient is not None:
                            weight = modules[call.of].weight.detach()
                            self._found[call.of].add(weight, call.x, call.gradient, inputs)
                    for product in products:
                        self._add_experts(experts, product)
            self._advance(number)

    def _add_experts(
        self, modules: Mapping[str, torch.nn.Module], product: _Tapped[_ExpertMatrix]
    ) -> None:
        """Add the tokens of an expert's product."""
        if product.gradient is None:
            return
        (prefix, number, down), inputs = product.of, _Inputs(self._formats)
        matrix = matrix_in(modules[prefix], number, down).detach()
        for part, rows in held_rows(modules[prefix], number, down).items():
            self._found[f"{prefix}.{number}.{part}"].add(
                matrix[rows], product.x, product.gradient[:, rows], inputs
            )

    def _rotations(
        self, columns: Mapping[str, int]
    ) -> dict[Rotation | None, dict[str, LayerFormat]]:
        """For each rotation of the formats, None for the layers' own: layer -> its format.

        Args:
            columns: layer -> its columns, which a rotation may not divide.
        """
        found = {}
        for rotation in dict.fromkeys(entry.rotation for entry in self._formats):
            forms = {name: self._forms[name] for name in columns}
            if rotation is not None:
                forms = {
                    name: form._replace(rotation=rotation)
                    for name, form in forms.items()
                    if rotation == "none" or columns[name] % ROTATION_GROUP == 0
                }
            found[rotation] = forms
        return found

    def _watches(self, modules: Mapping[str, torch.nn.Linear]) -> dict[Rotation | None, Watch]:
        """What collects the inputs of a block's layers, for each rotation of the formats."""
        columns = {name: module.in_features for name, module in modules.items()}
        return {
            rotation: Watch({name: modules[name] for name in forms}, forms)
            for rotation, forms in self._rotations(columns).items()
        }

    def _expert_inputs(self, number: int) -> dict[ExpertInput, list[Rotation | None]]:
        """The inputs of a block's experts -> the formats' rotations for which they are needed."""
        columns = {
            name: self._weights[name].shape[1]
            for name, holder in self._blocks.experts.items()
            if holder == number
        }
        found: dict[ExpertInput, list[Rotation | None]] = {}
        for rotation, forms in self._rotations(columns).items():
            for entry in expert_inputs(forms, columns.__getitem__):
                found.setdefault(entry, []).append(rotation)
        return found

    def _round_layers(
        self,
        modules: Mapping[str, torch.nn.Linear],
        rotation: Rotation | None,
        inputs: list[SharedInput],
    ) -> None:
        """Round rows of a block's layers behind `inputs`, which are used up; of all layers, where
        the rotation is their own."""
        weights = {name: module.weight.detach() for name, module in modules.items()}
        seen = {name for shared in inputs for name in shared.layers}
        while inputs:
            shared = inputs.pop()
            moments = self._moments(shared)
            self._round({name: weights[name] for name in shared.layers}, rotation, moments)
        for name in modules if rotation is None else ():
            if name not in seen:
                self._round({name: weights[name]}, rotation, None)

    def _round_experts(
        self,
        modules: Mapping[str, torch.nn.Module],
        inputs: list[SharedInput],
        needed: Mapping[ExpertInput, Sequence[Rotation | None]],
        group: Sequence[ExpertInput],
    ) -> None:
        """Round rows of the experts' matrices behind `inputs`, which are used up.

        Args:
            needed: as :meth:`_expert_inputs`.
            group: what each of `inputs` is.
        """
        for entry in reversed(group):
            moments = self._moments(inputs.pop())
            module = modules[entry.prefix]
            matrix = matrix_in(module, entry.number, entry.down).detach()
            held = held_rows(module, entry.number, entry.down)
            weights = {
                f"{entry.prefix}.{entry.number}.{part}": matrix[rows] for part, rows in held.items()
            }
            for rotation in needed[entry]:
                self._round(weights, rotation, moments)

    def _round(
        self,
        weights: Mapping[str, torch.Tensor],
        rotation: Rotation | None,
        moments: Moments | None,
    ) -> None:
        """Round rows of matrices with one input to every format with a rotation."""
        chosen = {name: self._chosen(name, weight) for name, weight in weights.items()}
        rows = [weight[chosen[name]] for name, weight in weights.items()]
        columns = rows[0].shape[1]
        for name, weight in weights.items():
            sums = _Sums(name, (len(weight), columns), chosen[name])
            self._found.setdefault(name, sums).calibrated |= moments is not None
        turned = rotation or self._forms[next(iter(weights))].rotation
        for entry in self._formats:
            if entry.rotation == rotation and columns % entry.columns == 0:
                parts = entry.weights(rows, moments, turned)
                for name, part in zip(weights, parts, strict=True):
                    self._found[name].put(turned, entry, part)

    def _moments(self, shared: SharedInput) -> Moments | None:
        """The moments of an input; None without enough tokens."""
        shared.check_finite()
        if not shared.enough:
            return None
        needed = any(entry.needs_mean for entry in self._formats)
        mean = shared.mean() if needed else None
        found = shared.factor(self._damping)
        return None if found is None else Moments(found[0], mean, self._damping)

    def _chosen(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The rows that are rounded, evenly spread."""
        experts = len(self._stacks[name_for_all(name)])
        count = sampled_rows(len(weight), self._max_rows, experts)
        return torch.arange(count, device=weight.device) * len(weight) // max(1, count)

    def _begin(self, what: str) -> None:
        sizes = [info.nbytes for info in self._weights.values()]
        self._progress.begin(what, len(sizes), sum(sizes))

    def _advance(self, number: int) -> None:
        for name, holder in self._holders.items():
            if holder == number:
                self._progress.advance(self._weights[name].nbytes)


@dataclass
class _Tapped(Generic[_Of]):
    """A product of a matrix: its input [T, K], and the gradient at its output [T, N], if one came.

    Attributes:
        of: what matrix it is.
    """

    of: _Of
    x: torch.Tensor
    gradient: torch.Tensor | None = None

    @classmethod
    def tap(cls, of: _Of, x: torch.Tensor, y: torch.Tensor) -> _Tapped[_Of]:
        """Note a product with this input and output."""
        call = cls(of, x.detach().reshape(-1, x.shape[-1]))

        def back(gradient: torch.Tensor) -> None:
            call.gradient = gradient.detach().reshape(-1, gradient.shape[-1])

        if y.requires_grad:
            y.register_hook(back)  # type: ignore[no-untyped-call]
        return call


@contextmanager
def _tapping(modules: Mapping[str, torch.nn.Linear]) -> Iterator[list[_Tapped[str]]]:
    """Collects the calls of layers, and the gradients that come back to them."""
    calls: list[_Tapped[str]] = []

    def hook(layer: str) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], None]:
        return lambda module, given, output: calls.append(_Tapped.tap(layer, given[0], output))

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _tapping_experts(
    modules: Mapping[str, torch.nn.Module],
) -> Iterator[list[_Tapped[_ExpertMatrix]]]:
    """As :func:`_tapping`, for the products of single experts."""
    calls: list[_Tapped[_ExpertMatrix]] = []

    def note(prefix: str, number: int, down: bool, x: torch.Tensor, y: torch.Tensor) -> None:
        calls.append(_Tapped.tap((prefix, number, down), x, y))

    with observed(modules, note):
        yield calls


class _Inputs:
    """Rounded inputs of the layers of a block; layers with one input share them."""

    def __init__(self, formats: Sequence[OutputFormat]) -> None:
        self._formats = {entry.name: entry for entry in formats}
        self._exact: dict[tuple[int, Rotation], torch.Tensor] = {}
        self._rounded: dict[tuple[int, Rotation, str], torch.Tensor] = {}

    def exact(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """The input as it is, but rotated."""
        key = x.data_ptr(), rotation
        if key not in self._exact:
            self._exact[key] = rotate_activation(x.float(), rotation)
        return self._exact[key]

    def rounded(
        self, x: torch.Tensor, rotation: Rotation, name: str, activations: ActivationFormat
    ) -> torch.Tensor:
        """The input as a format of activations rounds it; a format of weights has its own."""
        exact = self.exact(x, rotation)
        key = x.data_ptr(), rotation, name if activations == "dialect" else activations
        if key not in self._rounded:
            if activations == "dialect":
                self._rounded[key] = self._formats[name].tokens(exact)
            else:
                codes, scale = quantize_fp8(exact)
                self._rounded[key] = codes.float() * scale[:, None]
        return self._rounded[key]


def _energy(y: torch.Tensor) -> float:
    return float(y.square().sum(dtype=torch.float64))
