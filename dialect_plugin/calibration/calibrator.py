"""Quantizing a model's layers on calibration text, block by block (rule ``gptq``).

The text runs through the blocks in 16-bit weights and float32 activations; no block sees what
quantizing the blocks before it has changed. Each block's layers are quantized and stored before the
next one is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from dialect_kernels import PackedTensor, quantize
from dialect_kernels.calibrated import quantize_factored

from ..checkpoint.calibrated import CalibratedLayers, Rescaled
from ..checkpoint.layer_choice import LayerChoice
from ..checkpoint.progress import Progress
from ..checkpoint.reader import Checkpoint, CheckpointError
from ..experts import expert_of
from ..scheme import LayerFormat
from .blocks import DecoderBlocks
from .channels import balance, norms_in_front
from .moments import SharedInput, Watch
from .options import CalibrationOptions
from .text import CalibrationText, read_text

__all__ = ["Calibrator", "check_device", "open_calibration"]

_FEWEST = 4
"""A layer needs a token for so many columns."""


class Calibrator:
    """Calibrates one conversion; :class:`dialect_plugin.checkpoint.calibrated.Calibration`."""

    def __init__(self, options: CalibrationOptions) -> None:
        self._options = options
        self._checkpoint: Checkpoint
        self._forms: Mapping[str, LayerFormat]
        self._blocks: DecoderBlocks
        self._text: CalibrationText

    def prepare(self, checkpoint: Checkpoint, choice: LayerChoice) -> Mapping[str, Any]:
        """Build the empty model and read the text; see the protocol."""
        options = self._options
        # routed experts are no modules of transformers: they are rounded to nearest
        forms = {name: form for name, form in choice.formats.items() if expert_of(name) is None}
        self._checkpoint, self._forms = checkpoint, forms
        self._blocks, self._text = open_calibration(checkpoint, forms, options)
        import transformers

        balanced = {"balance": True} if options.balance else {}
        return {
            "rule": "gptq",
            "text": self._text.name,
            "tokens_sha256": self._text.sha256,
            "samples": len(self._text.windows),
            "sequence_length": options.sequence_length,
            "damping": options.damping,
            **balanced,
            "device": torch.device(options.device).type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def run(self, layers: Collection[str], done: CalibratedLayers, progress: Progress) -> None:
        """Quantize and store the layers that are not stored yet; see the protocol."""
        todo = [n for n in layers if n in self._blocks.linear and n not in done]
        if not todo:
            return
        sizes = {n: self._checkpoint.tensors[f"{n}.weight"].nbytes for n in self._blocks.linear}
        progress.begin("calibrating", len(sizes), sum(sizes.values()))
        hidden = self._blocks.embed(self._text.windows)
        last = max(self._blocks.linear[name] for name in todo)
        for number in range(last + 1):
            own = {name for name in self._blocks.linear if self._blocks.linear[name] == number}
            wanted = own & set(todo)
            if wanted and self._options.balance:
                wanted = own  # the channels of all depend on each other
            with self._blocks.loaded(number) as modules:
                inputs, rescaled = self._forward(
                    number, {n: m for n, m in modules.items() if n in wanted}, hidden
                )
                if wanted:
                    packed, dampings = self._quantized(inputs, modules)
                    done.add(number, packed, dampings, rescaled)
            for name in self._blocks.linear:
                if name in own:
                    progress.advance(sizes[name])

    def _forward(
        self,
        number: int,
        modules: Mapping[str, torch.nn.Linear],
        hidden: list[torch.Tensor],
    ) -> tuple[list[SharedInput], Rescaled]:
        """Run a block, put its outputs in the place of its inputs, and return the moments."""
        block, probe = self._blocks.block(number), hidden[0]
        watch = Watch(modules, self._forms, plain=self._options.balance)
        with norms_in_front(block, modules) as norms, watch.first_pass():
            hidden[0] = self._blocks.run(number, hidden[0])
        with watch.later_passes():
            for sample in range(1, len(hidden)):
                hidden[sample] = self._blocks.run(number, hidden[sample])
        if not self._options.balance:
            return watch.inputs, Rescaled({}, {})
        rescaled = balance(
            block,
            modules,
            watch.inputs,
            norms,
            changes=lambda: not torch.equal(self._blocks.run(number, probe), hidden[0]),
            stored=lambda parameter: self._blocks.stored(number, parameter),
        )
        return watch.inputs, rescaled

    def _quantized(
        self, inputs: list[SharedInput], modules: Mapping[str, torch.nn.Linear]
    ) -> tuple[dict[str, PackedTensor], dict[str, float | None]]:
        """The weights of a block, and the damping of each."""
        packed: dict[str, PackedTensor] = {}
        dampings: dict[str, float | None] = {}
        while inputs:
            shared = inputs.pop()  # what it holds is freed before the next is factored
            shared.check_finite()
            enough = shared.tokens * _FEWEST >= len(shared.moments)
            found = shared.factor(self._options.damping) if enough else None
            for name in shared.layers:
                weight = modules[name].weight.detach()
                rounded, dampings[name] = None, None
                if found is not None:
                    rounded = quantize_factored(weight, found[0], **_settings(shared.form, name))
                    dampings[name] = None if rounded is None else found[1]
                if rounded is None:
                    rounded = quantize(weight, **_settings(shared.form, name))
                packed[name] = rounded
        return packed, dampings


def open_calibration(
    checkpoint: Checkpoint, layers: Collection[str], options: CalibrationOptions
) -> tuple[DecoderBlocks, CalibrationText]:
    """Build the empty model and read the text.

    Args:
        checkpoint: a 16-bit checkpoint.
        layers: names of its linear layers to calibrate.
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


def _settings(form: LayerFormat, name: str) -> dict[str, Any]:
    """How a weight is quantized, as arguments of ``quantize``."""
    return {
        "book": form.formatbook,
        "block_size": form.block_size,
        "rotation": form.rotation,
        "name": name,
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
