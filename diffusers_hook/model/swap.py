"""The exchange of layers of transformers for quantized ones, and back: all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import SemanticDialectConfig
from ..layers.casting import is_of_transformers
from ..layers.offload import renew_group_offloading
from ..layers.originals import Originals, keep
from ..layers.quantized import QuantizedLinear
from .attach import attach, attached, detach
from .diffusers_quantizer import SemanticDialectQuantizer
from .jobs import Job
from .layer_choice import put
from .saved_mark import mark, unmark

__all__ = ["put_in", "take_out"]


def put_in(jobs: Sequence[Job], layers: Sequence[Mapping[str, QuantizedLinear]]) -> None:
    """Put each job's new layers in, hook the attention and let go of the 16-bit weights.

    Whatever interrupts it, the transformers are then what they were.

    Args:
        jobs: the transformers.
        layers: of each transformer, its new layers by the name of the layer they replace.
    """
    weights = [{path: layer.weight for path, layer in job.choice.layers.items()} for job in jobs]
    try:
        for job, new in zip(jobs, layers, strict=True):
            _put_in(job, new)
    except BaseException:
        for job, held in zip(jobs, weights, strict=True):
            _put_back(job, held)
        raise


def _put_in(job: Job, layers: Mapping[str, QuantizedLinear]) -> None:
    module = job.module
    bytes_before = sum(parameter.nbytes for parameter in module.parameters())
    for path, layer in layers.items():
        layer.original_name = path
        put(module, path, layer.train(module.training))
    originals = keep(job.place, job.choice.layers, job.sources)
    attach(module, job.config, job.layout, bytes_before, originals)
    mark(module, job.config, _quantizer(module, job.config))
    renew_group_offloading(module)


def _quantizer(module: nn.Module, config: SemanticDialectConfig) -> Any:
    """What lets the library of a model save it."""
    if is_of_transformers(module):
        from .transformers_quantizer import EncoderQuantizer  # needs transformers

        return EncoderQuantizer(config, pre_quantized=False)
    return SemanticDialectQuantizer(config, pre_quantized=False)


def _put_back(job: Job, weights: Mapping[str, torch.Tensor]) -> None:
    """Undo :func:`_put_in`, wherever it stopped; `weights` are those of the replaced layers."""
    for path, layer in job.choice.layers.items():
        layer.weight = weights[path]
        put(job.module, path, layer)
    unmark(job.module)
    if attached(job.module) is not None:
        detach(job.module)
    renew_group_offloading(job.module)


def take_out(modules: Sequence[nn.Module]) -> None:
    """Put the 16-bit layers back where the quantized ones are now, and remove the hooks.

    A quantized layer need not be where it was put: adapters that came or went in the meantime
    have moved it. Whatever interrupts the exchange, the transformers are then still quantized.

    Raises:
        RuntimeError: if there are no weights to put back; nothing is changed then.
    """
    changes = [change for module in modules for change in _changes(module)]
    try:
        for change in changes:
            change.make()
    except BaseException:
        for change in changes:
            change.undo()
        raise
    for module in modules:
        left = [n for n, part in module.named_modules() if isinstance(part, QuantizedLinear)]
        assert not left, f"still quantized: {left}"
        unmark(module)
        renew_group_offloading(module)
        detach(module)


@dataclass(frozen=True)
class _Change:
    """One quantized layer, the layer that takes its place, and that layer's weight."""

    module: nn.Module
    path: str
    quantized: QuantizedLinear
    original: nn.Linear
    held: torch.Tensor
    """The original's weight while it is not in the transformer."""
    weight: nn.Parameter

    def make(self) -> None:
        self.original.weight = self.weight
        self.original.bias = self.quantized.bias
        put(self.module, self.path, self.original.train(self.quantized.training))

    def undo(self) -> None:
        self.original.weight = self.held
        put(self.module, self.path, self.quantized)


def _changes(module: nn.Module) -> list[_Change]:
    """What gives a transformer its 16-bit layers back; reads their weights, changes nothing."""
    originals = _originals(module)
    changes = []
    for path, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, QuantizedLinear):
            weight = originals.weight(layer)
            original = originals.layers[layer.original_name]
            held = original.weight
            new = nn.Parameter(weight, requires_grad=held.requires_grad)
            changes.append(_Change(module, path, layer, original, held, new))
    return changes


def _originals(module: nn.Module) -> Originals:
    hook = attached(module)
    if hook is None or hook.originals is None:
        raise RuntimeError(
            f"{type(module).__name__} was loaded quantized; load the 16-bit checkpoint with "
            "from_pretrained instead"
        )
    return hook.originals
