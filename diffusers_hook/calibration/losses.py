"""What rounding does to the output of each linear layer, measured on the inputs it really has."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dialect_kernels import PackedTensor, dialect_linear, quantize
from dialect_kernels.formatbook import ActivationFormat, book_by_name

from ..model.jobs import Job

__all__ = ["FORMATS", "LayerLoss", "Losses", "measure"]

FORMATS: tuple[ActivationFormat, ...] = ("dialect", "fp8", "none")
_NAMES = {"dialect": "W4A4", "fp8": "W4A8", "none": "W4A16"}


@dataclass(frozen=True)
class LayerLoss:
    """One linear layer.

    Attributes:
        name: its name in the pipeline.
        stream: the tokens that its rows are.
        rows, columns: of its weight.
        tokens: how many inputs were measured.
        loss: activation format -> sum of the squared errors of the outputs over the sum of their
            squares; 0 for a layer that was not called.
    """

    name: str
    stream: str
    rows: int
    columns: int
    tokens: int
    loss: Mapping[str, float]


@dataclass(frozen=True)
class Losses:
    """Every layer that would become 4 bit; `print` shows a table, the worst first."""

    layers: tuple[LayerLoss, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON's types, by name."""
        return {layer.name: asdict(layer) for layer in self.layers}

    def save(self, path: str | Path) -> None:
        """Write them as JSON."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        """The table."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title="Loss of the layers' outputs, percent", title_justify="left")
        table.add_column("layer")
        table.add_column("tokens of", justify="left")
        formats = [form for form in FORMATS if self.layers and form in self.layers[0].loss]
        for form in formats:
            table.add_column(_NAMES[form], justify="right")
        worst = sorted(self.layers, key=lambda layer: -max(layer.loss.values(), default=0.0))
        for layer in worst:
            cells = (f"{100 * layer.loss[form]:.2f}" for form in formats)
            table.add_row(layer.name, layer.stream, *cells)
        out = io.StringIO()
        Console(file=out, width=100).print(table)
        return out.getvalue().rstrip()

    __repr__ = __str__


def measure(
    jobs: Sequence[Job],
    run: Callable[[], object],
    formats: Sequence[ActivationFormat],
    tokens: int,
    calibrated: Mapping[str, PackedTensor],
) -> Losses:
    """Run the 16-bit models and measure their layers.

    Args:
        jobs: the models.
        run: runs them.
        formats: of activations.
        tokens: most tokens of a call that are measured, evenly spread.
        calibrated: weights to measure with in the place of those rounded to nearest.
    """
    measured = {
        f"{job.name}.{path}": _Measured(job, path, layer, formats, calibrated)
        for job in jobs
        for path, (layer, _) in job.choice.quantized.items()
    }
    handles = [
        found.layer.register_forward_pre_hook(partial(found.call, tokens), with_kwargs=True)
        for found in measured.values()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return Losses(tuple(found.result() for found in measured.values()))


class _Measured:
    """A layer, its packed weight and the sums of its errors."""

    def __init__(
        self,
        job: Job,
        path: str,
        layer: nn.Linear,
        formats: Sequence[ActivationFormat],
        calibrated: Mapping[str, PackedTensor],
    ) -> None:
        self.layer = layer
        self._job, self._path = job, path
        self._name = f"{job.name}.{path}"
        self._packed = calibrated.get(self._name)
        self._tokens, self._whole = 0, 0.0
        self._lost = dict.fromkeys(formats, 0.0)

    def call(
        self, most: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Measure a call of the layer."""
        x: torch.Tensor = args[0] if args else kwargs["input"]
        x = x.detach().reshape(-1, self.layer.in_features)
        step = -(-len(x) // most)
        x = x[:: max(1, step)].to(torch.float32)
        weight = self.layer.weight.detach()
        if self._packed is None:
            config = self._job.config
            self._packed = quantize(
                weight,
                book_by_name(config.book),
                config.block_size,
                "mse",
                name=f"{self._name}.weight",
                rotation=self._job.choice.rotation(self._path, config),
            )
        exact = x @ weight.to(torch.float32).T
        self._tokens += len(x)
        self._whole += float(exact.double().square().sum())
        for form in self._lost:
            y = dialect_linear(x, self._packed, None, form)
            self._lost[form] += float((y - exact).double().square().sum())

    def result(self) -> LayerLoss:
        """The sums in proportion."""
        stream = self._job.choice.quantized[self._path][1]
        rows, columns = self.layer.out_features, self.layer.in_features
        whole = self._whole or 1.0
        loss = {str(form): lost / whole for form, lost in self._lost.items()}
        return LayerLoss(self._name, stream.value, rows, columns, self._tokens, loss)
