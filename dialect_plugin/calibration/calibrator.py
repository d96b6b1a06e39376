"""Quantizing a model's layers on calibration text, block by block (rule ``gptq``).

The text runs through the blocks in 16-bit weights and float32 activations; no block sees what
quantizing the blocks before it has changed. Each block's layers are quantized and stored before the
next one is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from dialect_kernels import PackedTensor, quantize
from dialect_kernels.calibrated import numbers_together, quantize_factored_alike
from dialect_kernels.second_moments import UpperFactor

from ..checkpoint.calibrated import CACHE_MEANS, EXPERTS, CalibratedLayers, Rescaled
from ..checkpoint.layer_choice import LayerChoice
from ..checkpoint.progress import Progress
from ..checkpoint.reader import Checkpoint, CheckpointError
from ..experts import expert_of
from ..scheme import LayerFormat
from .blocks import DecoderBlocks
from .channels import balance, norms_in_front
from .experts import ExpertInput, collected, expert_inputs, in_groups
from .moments import SharedInput, Watch
from .options import CalibrationOptions
from .text import CalibrationText, read_text

__all__ = ["Calibrator", "check_device", "groups_of", "matrix_of", "open_calibration"]

_FILE_BYTES = 1 << 27
"""Packed weights of a decoder layer that wait in memory before they are written."""


class Calibrator:
    """Calibrates one conversion; :class:`dialect_plugin.checkpoint.calibrated.Calibration`."""

    def __init__(self, options: CalibrationOptions) -> None:
        self._options = options
        self._checkpoint: Checkpoint
        self._forms: Mapping[str, LayerFormat]
        self._blocks: DecoderBlocks
        self._text: CalibrationText
        self._caches = False
        """Whether means of keys and values are measured for a 4-bit cache."""

    def prepare(self, checkpoint: Checkpoint, choice: LayerChoice) -> Mapping[str, Any]:
        """Build the empty model and read the text; see the protocol."""
        options = self._options
        self._checkpoint, self._forms = checkpoint, choice.formats
        self._blocks, self._text = open_calibration(checkpoint, choice.formats, options)
        self._caches = choice.scheme.kv_cache != "none"
        if self._caches:
            self._blocks.watch_caches()
        import transformers

        balanced = {"balance": True} if options.balance else {}
        experts = {EXPERTS: True} if self._blocks.experts else {}
        means = {CACHE_MEANS: True} if self._caches else {}
        return {
            "rule": "gptq",
            "text": self._text.name,
            "tokens_sha256": self._text.sha256,
            "samples": len(self._text.windows),
            "sequence_length": options.sequence_length,
            "damping": options.damping,
            **balanced,
            **experts,
            **means,
            "device": torch.device(options.device).type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def run(self, layers: Collection[str], done: CalibratedLayers, progress: Progress) -> None:
        """Quantize and store the layers that are not stored yet; see the protocol."""
        blocks = self._blocks
        holders = blocks.linear | blocks.experts
        todo = {n: holders[n] for n in layers if n in holders and n not in done}
        unmeasured = [n for n in range(len(blocks)) if self._caches and not done.has_means(n)]
        if not todo and not unmeasured:
            return
        sizes = {n: self._checkpoint.weights[n].nbytes for n in holders}
        progress.begin("calibrating", len(sizes), sum(sizes.values()))
        hidden = blocks.embed(self._text.windows)
        for number in range(max([*todo.values(), *unmeasured]) + 1):
            wanted = {n for n, holder in todo.items() if holder == number}
            touched = number in unmeasured or not wanted.isdisjoint(blocks.linear)
            if self._options.balance and touched:
                # the channels of all linear layers depend on each other
                wanted |= {n for n, holder in blocks.linear.items() if holder == number}
            with blocks.loaded(number) as modules:
                self._calibrate(number, modules, wanted, hidden, done)
            for name, holder in holders.items():
                if holder == number:
                    progress.advance(sizes[name])

    def _calibrate(
        self,
        number: int,
        modules: Mapping[str, torch.nn.Linear],
        wanted: Collection[str],
        hidden: list[torch.Tensor],
        done: CalibratedLayers,
    ) -> None:
        """Quantize and store the wanted layers of a loaded block, and run it on `hidden`."""
        linear = {name: module for name, module in modules.items() if name in wanted}
        *groups, last = self._groups(number, wanted)
        for group in groups:
            with collected(self._blocks.experts_in(number), group) as inputs:
                for state in hidden:
                    self._blocks.run(number, state)
            self._store(number, inputs, {}, Rescaled({}, {}), done)
        before = list(hidden) if self._caches and self._options.balance else []
        with self._blocks.means_seen() as means:
            inputs, rescaled = self._forward(number, linear, last, hidden)
        if before:  # balancing may have scaled the channels of values
            with self._blocks.means_seen() as means:
                for state in before:
                    self._blocks.run(number, state)
        self._blocks.drop_experts(number)  # which are read from the checkpoint one by one
        self._store(number, inputs, linear, rescaled, done)
        if self._caches and not done.has_means(number):
            done.add_means(number, means)

    def _groups(self, number: int, wanted: Collection[str]) -> list[list[ExpertInput]]:
        """The experts' inputs of a loaded block, in groups whose moments are in memory together.

        They and one factor take no more than the block's weights do.
        """
        forms = {name: self._forms[name] for name in self._blocks.experts if name in wanted}
        inputs = expert_inputs(forms, lambda name: self._checkpoint.weights[name].shape[1])
        return groups_of(inputs, self._blocks.block(number))

    def _forward(
        self,
        number: int,
        modules: Mapping[str, torch.nn.Linear],
        experts: Sequence[ExpertInput],
        hidden: list[torch.Tensor],
    ) -> tuple[list[SharedInput], Rescaled]:
        """Run a block, put its outputs in the place of its inputs, and return the moments."""
        block, probe = self._blocks.block(number), hidden[0]
        watch = Watch(modules, self._forms, plain=self._options.balance)
        with collected(self._blocks.experts_in(number), experts) as inputs:
            with norms_in_front(block, modules) as norms, watch.first_pass():
                hidden[0] = self._blocks.run(number, hidden[0])
            with watch.later_passes():
                for sample in range(1, len(hidden)):
                    hidden[sample] = self._blocks.run(number, hidden[sample])
        if not self._options.balance:
            return watch.inputs + inputs, Rescaled({}, {})
        rescaled = balance(
            block,
            modules,
            watch.inputs,
            norms,
            changes=lambda: not torch.equal(self._blocks.run(number, probe), hidden[0]),
            stored=lambda parameter: self._blocks.stored(number, parameter),
        )
        return watch.inputs + inputs, rescaled

    def _store(
        self,
        number: int,
        inputs: list[SharedInput],
        modules: Mapping[str, torch.nn.Linear],
        rescaled: Rescaled,
        done: CalibratedLayers,
    ) -> None:
        """Quantize the layers behind `inputs`, which are used up, and store them."""
        packed: dict[str, PackedTensor] = {}
        dampings: dict[str, float | None] = {}
        while inputs:
            # what they hold is freed before the next ones are factored
            for name, weight, damping in self._quantized(self._take_alike(inputs), modules):
                packed[name], dampings[name] = weight, damping
            if not inputs or sum(weight.nbytes for weight in packed.values()) >= _FILE_BYTES:
                done.add(number, packed, dampings, rescaled)
                packed, dampings = {}, {}

    def _take_alike(self, inputs: list[SharedInput]) -> list[SharedInput]:
        """Take the last input, and with an expert's those of other experts whose matrices are
        rounded together with its own."""
        taken = [inputs.pop()]
        first, shape = taken[0], self._shape_of(taken[0])
        if expert_of(first.layers[0]) is None:
            return taken
        most = numbers_together(torch.device(self._options.device))
        left: list[SharedInput] = []
        while inputs:
            shared = inputs.pop()
            fits = (1 + len(taken)) * math.prod(shape) <= most
            like = fits and shared.form == first.form and self._shape_of(shared) == shape
            (taken if like else left).append(shared)
        inputs.extend(reversed(left))
        return taken

    def _shape_of(self, shared: SharedInput) -> tuple[int, ...]:
        """How many layers an input has, and the shape of the first."""
        return len(shared.layers), *self._checkpoint.weights[shared.layers[0]].shape

    def _quantized(
        self, inputs: Sequence[SharedInput], modules: Mapping[str, torch.nn.Linear]
    ) -> Iterator[tuple[str, PackedTensor, float | None]]:
        """The layers behind inputs: name, weight, and the damping that was used.

        Args:
            inputs: one, or some of experts whose matrices have one shape.
        """
        names, weights, found = [], [], []
        for shared in inputs:
            shared.check_finite()
            factor = shared.factor(self._options.damping) if shared.enough else None
            for name in shared.layers:
                names.append(name)
                weights.append(self._weight(name, modules))
                found.append(factor)
        settings = _settings(inputs[0].form)
        rounded = _rounded(names, weights, [part and part[0] for part in found], settings)
        for name, weight, packed, factor in zip(names, weights, rounded, found, strict=True):
            if packed is None or factor is None:
                yield name, quantize(weight, name=name, **settings), None
            else:
                yield name, packed, factor[1]

    def _weight(self, name: str, modules: Mapping[str, torch.nn.Linear]) -> torch.Tensor:
        """The weight of a layer, float32 [N, K]; an expert's is read from the checkpoint."""
        module = modules.get(name)
        if module is None:
            return matrix_of(self._checkpoint, name, self._options.device)
        return module.weight.detach()


def _rounded(
    names: Sequence[str],
    weights: Sequence[torch.Tensor],
    factors: Sequence[UpperFactor | None],
    settings: Mapping[str, Any],
) -> list[PackedTensor | None]:
    """Weights by rule ``gptq``, those of one shape together; None where there is no factor or
    errors overflowed."""
    found: list[PackedTensor | None] = [None] * len(names)
    alike: dict[torch.Size, list[int]] = {}
    for place, (weight, factor) in enumerate(zip(weights, factors, strict=True)):
        if factor is not None:
            alike.setdefault(weight.shape, []).append(place)
    for places in alike.values():
        some = [(weights[place], factors[place], names[place]) for place in places]
        chosen, own, called = zip(*some, strict=True)
        rounded = quantize_factored_alike(chosen, own, names=called, **settings)
        for place, packed in zip(places, rounded, strict=True):
            found[place] = packed
    return found


def groups_of(inputs: Sequence[ExpertInput], block: torch.nn.Module) -> list[list[ExpertInput]]:
    """The experts' inputs of a loaded block, in groups whose moments are in memory together.

    They and one factor take no more than the block's weights do. There is at least one group.
    """
    widest = max((entry.columns for entry in inputs), default=0)
    weights = sum(4 * p.numel() for p in block.parameters())
    return in_groups(inputs, weights - 4 * widest**2) or [[]]


def matrix_of(checkpoint: Checkpoint, name: str, device: str) -> torch.Tensor:
    """A matrix of an expert, float32 [N, K]."""
    elements = math.prod(checkpoint.weights[name].shape)
    (whole,) = checkpoint.read_rows(name, max(1, elements))
    return whole.to(device, torch.float32)


def open_calibration(
    checkpoint: Checkpoint, layers: Collection[str], options: CalibrationOptions
) -> tuple[DecoderBlocks, CalibrationText]:
    """Build the empty model and read the text.

    Args:
        checkpoint: a 16-bit checkpoint.
        layers: names of its linear layers to calibrate, experts' matrices among them.
        options: text, windows and device.

    Raises:
        CheckpointError: one sentence, if text, tokenizer, model or device cannot be used.
    """
    if find_spec("transformers") is None:
        raise CheckpointError(
            "--calibrate: needs transformers; install it with pip install 'blockdialect[calibrate]'"
        )
    check_device(options.device)
    blocks = DecoderBlocks(checkpoint, layers, options.device)
    longest = blocks.longest
    if longest is not None and options.sequence_length > longest:
        raise CheckpointError(
            f"--sequence-length: {options.sequence_length}; the model takes at most {longest} "
            "tokens: give fewer"
        )
    return blocks, read_text(checkpoint.path, options, blocks.vocabulary)


def _settings(form: LayerFormat) -> dict[str, Any]:
    """How a weight is quantized, as arguments of ``quantize``."""
    return {
        "book": form.formatbook,
        "block_size": form.block_size,
        "rotation": form.rotation,
    }


def check_device(name: str) -> None:
    """Raise CheckpointError unless tensors can be put on the device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # an unknown name, or torch was built without it
        raise CheckpointError(
            f"--device: {name!r}; this machine and this torch have no such device: give cpu, or "
            "cuda where there is a GPU"
        ) from None
