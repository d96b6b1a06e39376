"""Weights of formats to compare with, rounded on calibration text by rule ``gptq``.

One pass of the text through the model's blocks serves all formats: each block's layers are rounded
to every format while their second moments are there, and wait in files until they are evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias, cast

import torch
from safetensors.torch import load_file, save_file

from dialect_kernels.calibrated import quantize_calibrated_baseline

from ..calibration.calibrator import groups_of, matrix_of, open_calibration
from ..calibration.experts import ExpertInput, collected, expert_inputs
from ..calibration.moments import SharedInput, Watch
from ..calibration.options import CalibrationOptions
from ..checkpoint.reader import Checkpoint
from ..scheme import LayerFormat
from .options import FormatName
from .progress import Progress

__all__ = ["CalibratedPeers"]

_Rounded: TypeAlias = dict[FormatName, dict[str, torch.Tensor]]
"""Format -> layer -> the values that its weight is rounded to."""


class CalibratedPeers:
    """The calibrated weights of some formats, in files of their own; a context manager.

    Args:
        checkpoint: the 16-bit model.
        layers: names of the layers.
        formats: with ``+gptq``.
        options: of the calibration.

    Raises:
        CheckpointError: if text, model or device cannot be used.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[str],
        formats: Sequence[FormatName],
        options: CalibrationOptions,
    ) -> None:
        self._blocks, text = open_calibration(checkpoint, layers, options)
        self._checkpoint, self._device = checkpoint, options.device
        self._windows = text.windows
        self._formats = formats
        self._damping = options.damping
        self._files = TemporaryDirectory()

    def __enter__(self) -> CalibratedPeers:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.cleanup()

    def run(self, progress: Progress) -> None:
        """Round the layers of all blocks to all formats."""
        progress.begin("calibrating", len(self._blocks))
        hidden = self._blocks.embed(self._windows)
        for number in range(len(self._blocks)):
            rounded: _Rounded = {name: {} for name in self._formats}
            with self._blocks.loaded(number) as modules:
                *groups, last = self._groups(number)
                for group in groups:
                    with collected(self._blocks.experts_in(number), group) as inputs:
                        for state in hidden:
                            self._blocks.run(number, state)
                    self._round(inputs, {}, rounded)
                inputs = self._forward(number, modules, last, hidden)
                self._blocks.drop_experts(number)  # which are read one by one
                self._round(inputs, modules, rounded)
            for name, values in rounded.items():
                tensors = {layer: value.cpu().contiguous() for layer, value in values.items()}
                save_file(tensors, self._file(name, number))
            progress.advance()

    def read(self, name: FormatName) -> dict[str, torch.Tensor]:
        """The rounded weights of a format, float32; a layer that was not calibrated is missing."""
        found: dict[str, torch.Tensor] = {}
        for number in range(len(self._blocks)):
            found |= load_file(self._file(name, number))
        return found

    def _groups(self, number: int) -> list[list[ExpertInput]]:
        """The experts' inputs of a loaded block in each rotation, in groups of some memory."""
        columns = {
            layer: self._checkpoint.weights[layer].shape[1]
            for layer, holder in self._blocks.experts.items()
            if holder == number
        }
        inputs = [
            entry
            for forms in self._rotations(columns)
            for entry in expert_inputs(forms, lambda layer: columns[layer])
        ]
        return groups_of(inputs, self._blocks.block(number))

    def _rotations(self, columns: Mapping[str, int]) -> list[dict[str, LayerFormat]]:
        """For each rotation that a format has, layer -> a format with that rotation.

        Args:
            columns: layer -> its columns.
        """
        return [
            {
                layer: LayerFormat("dialect_fp4", 32, "dialect", name.rotation_for(count))
                for layer, count in columns.items()
            }
            for name in {name.rotation: name for name in self._formats}.values()
        ]

    def _forward(
        self,
        number: int,
        modules: Mapping[str, torch.nn.Linear],
        experts: Sequence[ExpertInput],
        hidden: list[torch.Tensor],
    ) -> list[SharedInput]:
        """Run a loaded block on all windows, in place, and return its inputs in each rotation."""
        columns = {layer: module.in_features for layer, module in modules.items()}
        watches = [Watch(modules, forms) for forms in self._rotations(columns)]
        with collected(self._blocks.experts_in(number), experts) as inputs:
            self._run(number, watches, hidden)
        return [shared for watch in watches for shared in watch.inputs] + inputs

    def _run(self, number: int, watches: Sequence[Watch], hidden: list[torch.Tensor]) -> None:
        """Run a loaded block on all windows, in place."""
        with ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.first_pass())
            hidden[0] = self._blocks.run(number, hidden[0])
        with ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.later_passes())
            for sample in range(1, len(hidden)):
                hidden[sample] = self._blocks.run(number, hidden[sample])

    def _round(
        self,
        inputs: list[SharedInput],
        modules: Mapping[str, torch.nn.Linear],
        rounded: _Rounded,
    ) -> None:
        """Round the layers behind `inputs`, which are used up, to all formats."""
        while inputs:
            shared = inputs.pop()  # its moments are freed before the next are factored
            moments = shared.mean()
            if not shared.enough:
                continue
            for name, layer in product(self._formats, shared.layers):
                columns = len(moments)
                if shared.form.rotation != name.rotation_for(columns) or columns % name.block_size:
                    continue
                module = modules.get(layer)
                rounded[name][layer] = quantize_calibrated_baseline(
                    matrix_of(self._checkpoint, layer, self._device)
                    if module is None
                    else module.weight.detach(),
                    moments,
                    cast(Literal["mxfp4", "nvfp4"], name.format),  # others have no +gptq
                    name.block_size,
                    self._damping,
                    shared.form.rotation,
                    layer,
                ).values

    def _file(self, name: FormatName, number: int) -> Path:
        return Path(self._files.name, f"{name},{number}")
