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
from typing import Literal, cast

import torch
from safetensors.torch import load_file, save_file

from dialect_kernels.calibrated import quantize_calibrated_baseline

from ..calibration.calibrator import open_calibration
from ..calibration.moments import SharedInput, Watch
from ..calibration.options import CalibrationOptions
from ..checkpoint.reader import Checkpoint
from ..scheme import LayerFormat
from .options import FormatName
from .progress import Progress

__all__ = ["CalibratedPeers"]


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
            with self._blocks.loaded(number) as modules:
                self._round(number, self._forward(number, modules, hidden), modules)
            progress.advance()

    def read(self, name: FormatName) -> dict[str, torch.Tensor]:
        """The rounded weights of a format, float32; a layer that was not calibrated is missing."""
        found: dict[str, torch.Tensor] = {}
        for number in range(len(self._blocks)):
            found |= load_file(self._file(name, number))
        return found

    def _forward(
        self, number: int, modules: Mapping[str, torch.nn.Linear], hidden: list[torch.Tensor]
    ) -> list[SharedInput]:
        """Run a loaded block on all windows, in place, and return its inputs in each rotation."""
        watches = []
        for rotation in {name.rotation: name for name in self._formats}.values():
            forms = {
                layer: LayerFormat(
                    "dialect_fp4", 32, "dialect", rotation.rotation_for(module.in_features)
                )
                for layer, module in modules.items()
            }
            watches.append(Watch(modules, forms))
        with ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.first_pass())
            hidden[0] = self._blocks.run(number, hidden[0])
        with ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.later_passes())
            for sample in range(1, len(hidden)):
                hidden[sample] = self._blocks.run(number, hidden[sample])
        return [shared for watch in watches for shared in watch.inputs]

    def _round(
        self, number: int, inputs: list[SharedInput], modules: Mapping[str, torch.nn.Linear]
    ) -> None:
        """Round the layers of a block, and write one file for each format."""
        rounded: dict[FormatName, dict[str, torch.Tensor]] = {name: {} for name in self._formats}
        while inputs:
            shared = inputs.pop()  # its moments are freed before the next are factored
            moments = shared.mean()
            if not shared.enough:
                continue
            for name, layer in product(self._formats, shared.layers):
                columns = len(moments)
                if shared.form.rotation != name.rotation_for(columns) or columns % name.block_size:
                    continue
                rounded[name][layer] = quantize_calibrated_baseline(
                    modules[layer].weight.detach(),
                    moments,
                    cast(Literal["mxfp4", "nvfp4"], name.format),  # others have no +gptq
                    name.block_size,
                    self._damping,
                    shared.form.rotation,
                    layer,
                ).values
        for name, values in rounded.items():
            tensors = {layer: value.cpu().contiguous() for layer, value in values.items()}
            save_file(tensors, self._file(name, number))

    def _file(self, name: FormatName, number: int) -> Path:
        return Path(self._files.name, f"{name},{number}")
