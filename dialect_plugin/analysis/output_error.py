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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

import torch

from dialect_kernels import PackedTensor, quantize
from dialect_kernels.baselines import quantize_fp8, quantize_mxfp4, quantize_nvfp4
from dialect_kernels.calibrated import quantize_calibrated_baseline, quantize_factored
from dialect_kernels.formatbook import BLOCK_SIZES, ROTATION_GROUP, Formatbook, Rotation
from dialect_kernels.ops import dequantize, quantize_counted
from dialect_kernels.reference import round_activation
from dialect_kernels.rotation import rotate_activation, rotate_weight
from dialect_kernels.second_moments import UpperFactor

from ..calibration.blocks import DecoderBlocks
from ..calibration.calibrator import open_calibration
from ..calibration.moments import SharedInput, Watch
from ..calibration.options import CalibrationOptions
from ..checkpoint.progress import Progress
from ..checkpoint.reader import Checkpoint, CheckpointError
from ..scheme import METHODS, ActivationFormat, LayerFormat
from .report import dialect_bits, dialect_name

__all__ = [
    "FINEST_FIRST",
    "LayerOutput",
    "OutputFormat",
    "OutputLoss",
    "dialect_formats",
    "measure_outputs",
    "output_formats",
]

_Stored = PackedTensor | torch.Tensor
FINEST_FIRST: Final[tuple[ActivationFormat, ...]] = ("none", "fp8", "dialect")
"""Formats of activations, from W4A16 to W4A4."""
_SHARE = 4
"""One of so many windows is measured; the others calibrate."""


@dataclass(frozen=True)
class OutputFormat:
    """A format of weights, and of the activations that are rounded like them.

    Attributes:
        name: what tables call it.
        columns: the multiple of columns that it needs.
        bits: (rows, columns) -> stored bits per weight, scales included.
        weights: (rows of some layers with one input, its second moments or None without enough
            tokens, rotation) -> the rounded rows of each.
        tokens: (tokens, rotated if the layer is) -> the rounded tokens, float32.
        needs_mean: whether `weights` needs the moments themselves and not only their factor.
        rotation: of the layers in this format; None for each layer's own.
    """

    name: str
    columns: int
    bits: Callable[[int, int], float]
    weights: Callable[
        [Sequence[torch.Tensor], _Moments | None, Rotation], list[PackedTensor | torch.Tensor]
    ]
    tokens: Callable[[torch.Tensor], torch.Tensor]
    needs_mean: bool = False
    rotation: Rotation | None = None


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
class LayerOutput:
    """A layer's output on text in all formats whose blocks divide its columns.

    Attributes:
        name: the layer.
        rows, columns: shape of its weight.
        measured_rows: how many of its rows were rounded.
        signal: square of the output, bias left out, summed over rows and averaged over tokens.
        losses: format -> its loss.
    """

    name: str
    rows: int
    columns: int
    measured_rows: int
    signal: float
    losses: Mapping[str, OutputLoss]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


def dialect_formats(
    book: Formatbook, rotation: Rotation | None = None, suffix: str = ""
) -> tuple[OutputFormat, ...]:
    """BlockDialect in every block size.

    Args:
        book: the formatbook.
        rotation: of the layers; None for each layer's own.
        suffix: ends the formats' names.
    """
    return tuple(
        OutputFormat(
            f"{dialect_name(block_size)}{suffix}",
            block_size,
            partial(dialect_bits, block_size=block_size),
            partial(_dialect_rows, book, block_size),
            partial(_round_tokens, book=book, block_size=block_size),
            rotation=rotation,
        )
        for block_size in BLOCK_SIZES
    )


def output_formats(book: Formatbook, *, peers: bool = False) -> tuple[OutputFormat, ...]:
    """BlockDialect in every block size and, with `peers`, MXFP4 and NVFP4."""
    own = dialect_formats(book)
    if not peers:
        return own
    mxfp4 = OutputFormat(
        "MXFP4-32",
        32,
        lambda rows, columns: 4 + 8 / 32,
        partial(_baseline_rows, "mxfp4"),
        quantize_mxfp4,
        needs_mean=True,
    )
    nvfp4 = OutputFormat(
        "NVFP4-16",
        16,
        lambda rows, columns: 4 + 8 / 16,
        partial(_baseline_rows, "nvfp4"),
        quantize_nvfp4,
        needs_mean=True,
    )
    return (*own, mxfp4, nvfp4)


@dataclass(frozen=True)
class _Moments:
    """Second moments of the input that some layers share.

    Attributes:
        factor: as rule ``gptq`` uses it.
        mean: the mean of ``x x.T``; None where no format needs it.
        damping: the least damping.
    """

    factor: UpperFactor
    mean: torch.Tensor | None
    damping: float


def _dialect_rows(
    book: Formatbook,
    block_size: int,
    rows: Sequence[torch.Tensor],
    moments: _Moments | None,
    rotation: Rotation,
) -> list[_Stored]:
    """Rows are rounded each for itself, so those of all layers are rounded as one matrix."""
    whole = torch.cat(list(rows))
    packed = None
    if moments is not None:
        packed = quantize_factored(whole, moments.factor, book, block_size, rotation)
    if packed is None:
        packed = quantize(whole, book, block_size, rotation=rotation)
    parts: list[_Stored] = []
    first = 0
    for part in rows:
        parts.append(packed.slice_rows(first, first + len(part)).to("cpu"))
        first += len(part)
    return parts


def _round_tokens(x: torch.Tensor, book: Formatbook, block_size: int) -> torch.Tensor:
    """As ``reference.round_activation``, by the quantizer of weights, which is faster.

    Their exponents reach less far below the largest one; the few tokens that need more are rounded
    by the reference.
    """
    packed, below = quantize_counted(x, book, block_size, book.online_rule, finite=True)
    values = dequantize(packed)
    far = below > 0
    if bool(far.any()):
        values[far] = round_activation(x[far], book, block_size)
    return values


def _baseline_rows(
    name: Literal["mxfp4", "nvfp4"],
    rows: Sequence[torch.Tensor],
    moments: _Moments | None,
    rotation: Rotation,
) -> list[_Stored]:
    plain = quantize_mxfp4 if name == "mxfp4" else quantize_nvfp4
    return [
        plain(rotate_weight(part, rotation)).cpu()
        if moments is None or moments.mean is None
        else quantize_calibrated_baseline(
            part, moments.mean, name, damping=moments.damping, rotation=rotation
        ).values.cpu()
        for part in rows
    ]


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
        max_rows: round at most this many rows of a layer, spread evenly; None for all.

    Returns:
        One entry for each layer, in the order of `forms`.

    Raises:
        CheckpointError: one sentence, if text, tokenizer, model or device cannot be used, or a
            layer lies outside of the model's repeated blocks.
    """
    blocks, text = open_calibration(checkpoint, forms, options)
    for name in forms:
        if name not in blocks.linear:
            raise CheckpointError(
                f"{name}: lies outside of the repeated blocks, where no output is measured; "
                f"--ignore it, or leave --calibrate out"
            )
    run = _Run(checkpoint, blocks, forms, formats, options.damping, progress, max_rows)
    run.forwards(text.windows)
    run.backwards()
    return tuple(run.found[name].result(run.tokens) for name in forms)


@dataclass
class _Sums:
    """A layer's rounded rows, and what is summed over the tokens."""

    name: str
    shape: tuple[int, int]
    chosen: torch.Tensor
    rounded: dict[Rotation, dict[str, _Stored]] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    signal: float = 0.0
    noise: dict[tuple[str, ActivationFormat], float] = field(default_factory=dict)
    nats: dict[tuple[str, ActivationFormat], float] = field(default_factory=dict)

    def put(self, rotation: Rotation, entry: OutputFormat, rows: _Stored) -> None:
        """Rows that a format has rounded."""
        self.rounded.setdefault(rotation, {})[entry.name] = rows
        self.bits[entry.name] = entry.bits(*self.shape)

    def add(self, weight: torch.Tensor, tapped: _Tapped, inputs: _Inputs) -> None:
        """Add the tokens of a call of the layer."""
        scale = self.shape[0] / max(1, len(self.chosen))
        slopes = tapped.gradient[:, self.chosen].square_()
        for number, (rotation, formats) in enumerate(self.rounded.items()):
            x = inputs.exact(tapped.x, rotation)
            y = x @ rotate_weight(weight[self.chosen], rotation).T
            if number == 0:  # with every rotation the same but for roundings
                self.signal += scale * _energy(y)
            # (g W') ** 2, in which W' is the weight that is rounded
            slopes_of_input = rotate_weight(tapped.gradient @ weight, rotation).square_()
            for name, stored in formats.items():
                values = stored.to(x.device)
                values = dequantize(values) if isinstance(values, PackedTensor) else values
                error = (x @ values.T).sub_(y)
                of_weights = 0.5 * scale * float((slopes * error.square()).sum(dtype=torch.float64))
                for activations in METHODS:
                    lost, noise = 0.0, _energy(error)
                    if activations != "none":
                        rounded = inputs.rounded(tapped.x, rotation, name, activations)
                        slopes_times_errors = (rounded - x).square_().mul_(slopes_of_input)
                        lost = float(slopes_times_errors.sum(dtype=torch.float64))
                        noise = _energy((rounded @ values.T).sub_(y))
                    key = name, activations
                    self.noise[key] = self.noise.get(key, 0.0) + scale * noise
                    self.nats[key] = self.nats.get(key, 0.0) + of_weights + 0.5 * lost

    def result(self, tokens: int) -> LayerOutput:
        """The means over `tokens` tokens."""
        losses = {
            name: OutputLoss(
                self.bits[name],
                {a: self.noise.get((name, a), 0.0) / tokens for a in METHODS},
                {a: self.nats.get((name, a), 0.0) / tokens for a in METHODS},
            )
            for name in self.bits
        }
        return LayerOutput(self.name, *self.shape, len(self.chosen), self.signal / tokens, losses)


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
        self.found: dict[str, _Sums] = {}
        self.tokens = 0
        self._blocks, self._forms, self._formats = blocks, forms, formats
        self._damping, self._progress, self._max_rows = damping, progress, max_rows
        self._sizes = {name: checkpoint.tensors[f"{name}.weight"].nbytes for name in forms}
        self._before: list[list[torch.Tensor]] = []
        self._gradients: list[torch.Tensor] = []

    def forwards(self, windows: torch.Tensor) -> None:
        """Round rows of every layer, and keep what the measured windows give to the blocks."""
        count = max(1, len(windows) // _SHARE)
        measured = [index * len(windows) // count for index in range(count)]
        others = [index for index in range(len(windows)) if index not in measured] or measured
        self.tokens = count * windows.shape[1]
        self._begin("calibrating")
        hidden = self._blocks.embed(windows)
        for number in range(len(self._blocks)):
            self._before.append([hidden[index] for index in measured])
            with self._blocks.loaded(number) as modules:
                watches = self._watches(modules)
                with ExitStack() as stack:
                    for watch in watches.values():
                        stack.enter_context(watch.first_pass())
                    hidden[others[0]] = self._blocks.run(number, hidden[others[0]])
                with ExitStack() as stack:
                    for watch in watches.values():
                        stack.enter_context(watch.later_passes())
                    for index in others[1:]:
                        hidden[index] = self._blocks.run(number, hidden[index])
                for index in measured:
                    if index not in others:
                        hidden[index] = self._blocks.run(number, hidden[index])
                for rotation, watch in watches.items():
                    self._round(modules, rotation, watch.inputs)
            self._advance(number)
        finals = [hidden[index] for index in measured]
        self._gradients = self._blocks.scores(windows[measured], finals)

    def backwards(self) -> None:
        """Measure the layers from the last block to the first."""
        self._begin("measuring")
        for number in reversed(range(len(self._blocks))):
            before = self._before.pop()
            with self._blocks.loaded(number) as modules:
                for index, state in enumerate(before):
                    with _tapping(modules) as calls:
                        self._gradients[index] = self._blocks.differentiate(
                            number, state, self._gradients[index]
                        )
                    inputs = _Inputs(self._formats)
                    for call in calls:
                        if call.reached:
                            weight = modules[call.layer].weight.detach()
                            self.found[call.layer].add(weight, call, inputs)
            self._advance(number)

    def _watches(self, modules: Mapping[str, torch.nn.Linear]) -> dict[Rotation | None, Watch]:
        """What collects the inputs of a block's layers, for each rotation of the formats."""
        watches = {}
        for rotation in dict.fromkeys(entry.rotation for entry in self._formats):
            forms = {name: self._forms[name] for name in modules}
            if rotation is not None:
                forms = {
                    name: form._replace(rotation=rotation)
                    for name, form in forms.items()
                    if rotation == "none" or modules[name].in_features % ROTATION_GROUP == 0
                }
            watches[rotation] = Watch({name: modules[name] for name in forms}, forms)
        return watches

    def _round(
        self,
        modules: Mapping[str, torch.nn.Linear],
        rotation: Rotation | None,
        inputs: Sequence[SharedInput],
    ) -> None:
        """Round rows of a block's layers to every format with a rotation."""
        seen = {name for shared in inputs for name in shared.layers}
        groups = [(shared.layers, self._moments(shared)) for shared in inputs]
        if rotation is None:
            groups += [([name], None) for name in modules if name not in seen]
        for names, moments in groups:
            weights = {name: modules[name].weight.detach() for name in names}
            chosen = {name: self._chosen(weight) for name, weight in weights.items()}
            rows = [weights[name][chosen[name]] for name in names]
            columns = rows[0].shape[1]
            for name in names:
                shape = (weights[name].shape[0], columns)
                self.found.setdefault(name, _Sums(name, shape, chosen[name]))
            turned = rotation or self._forms[names[0]].rotation
            for entry in self._formats:
                if entry.rotation == rotation and columns % entry.columns == 0:
                    parts = entry.weights(rows, moments, turned)
                    for name, part in zip(names, parts, strict=True):
                        self.found[name].put(turned, entry, part)

    def _moments(self, shared: SharedInput) -> _Moments | None:
        """The moments of an input; None without enough tokens."""
        shared.check_finite()
        if not shared.enough:
            return None
        needed = any(entry.needs_mean for entry in self._formats)
        mean = shared.mean() if needed else None
        found = shared.factor(self._damping)
        return None if found is None else _Moments(found[0], mean, self._damping)

    def _chosen(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows that are rounded, evenly spread."""
        rows = len(weight)
        count = rows if self._max_rows is None else min(rows, self._max_rows)
        return torch.arange(count, device=weight.device) * rows // max(1, count)

    def _begin(self, what: str) -> None:
        self._progress.begin(what, len(self._sizes), sum(self._sizes.values()))

    def _advance(self, number: int) -> None:
        for name, holder in self._blocks.linear.items():
            if holder == number:
                self._progress.advance(self._sizes[name])


@dataclass
class _Tapped:
    """A call of a layer: its input [T, K], and the gradient at its output [T, N]."""

    layer: str
    x: torch.Tensor
    gradient: torch.Tensor
    reached: bool = False


@contextmanager
def _tapping(modules: Mapping[str, torch.nn.Linear]) -> Iterator[list[_Tapped]]:
    """Collects the calls of layers, and the gradients that come back to them."""
    calls: list[_Tapped] = []

    def hook(layer: str) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], None]:
        def note(module: torch.nn.Module, given: tuple[Any, ...], output: torch.Tensor) -> None:
            x = given[0].detach().reshape(-1, given[0].shape[-1])
            call = _Tapped(layer, x, torch.empty(0))
            calls.append(call)

            def back(gradient: torch.Tensor) -> None:
                call.gradient = gradient.detach().reshape(-1, gradient.shape[-1])
                call.reached = True

            if output.requires_grad:
                output.register_hook(back)  # type: ignore[no-untyped-call]

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


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
