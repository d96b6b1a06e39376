"""Powers of two that move between the input channels of layers and what produces them (ours).

Channels that are rounded together share an exponent. With mean squares ``x_i**2`` of the inputs and
sums of squares ``w_i**2`` of the weight's columns, rounding a group of rotated channels costs about
``sum(x_i**2) * sum(w_i**2)``, which is least where both grow alike: for inputs times
``s_i = sqrt(w_i / x_i)`` and columns divided by it. The norm or the layer that produces the
channels takes ``s_i``. As powers of two they change no bit of the block's output: this is tried
with one window, and where the output changes, the channels stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..checkpoint.calibrated import Rescaled
from .moments import SharedInput

__all__ = ["balance", "norms_in_front"]

_LARGEST = 12
"""Largest exponent of a factor."""

Stored = Callable[[str], tuple[str, torch.dtype] | None]
"""A parameter of the block -> its tensor in the checkpoint and its dtype; None without one."""


@contextmanager
def norms_in_front(
    block: torch.nn.Module, modules: Mapping[str, torch.nn.Linear]
) -> Iterator[dict[str, str]]:
    """Find out which norm's output is a layer's input, while the block runs.

    Yields:
        A table that the run fills: layer -> name of the norm in the block.
    """
    table: dict[str, str] = {}
    outputs: list[tuple[str, Any]] = []

    def returned(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: outputs.append((name, output))

    def called(layer: str) -> Callable[..., None]:
        def note(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            for name, output in outputs:
                if output is arguments[0]:
                    table[layer] = name

        return note

    handles = [
        module.register_forward_hook(returned(name))
        for name, module in block.named_modules()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor) and weight.dim() == 1
    ]
    handles += [m.register_forward_pre_hook(called(layer)) for layer, m in modules.items()]
    try:
        yield table
    finally:
        for handle in handles:
            handle.remove()


def balance(
    block: torch.nn.Module,
    modules: Mapping[str, torch.nn.Linear],
    inputs: list[SharedInput],
    norms: Mapping[str, str],
    changes: Callable[[], bool],
    stored: Stored,
) -> Rescaled:
    """Rescale the channels of a loaded block, in the modules and in the moments.

    Args:
        block: the block.
        modules: its layers that will be quantized.
        inputs: what they have in common; moments that are not rotated yet, and are then.
        norms: layer -> the norm whose output is its input.
        changes: runs the block and says whether its output has changed.
        stored: where a parameter of the block is stored.

    Returns:
        How the layers were scaled, and the tensors of the checkpoint that take part.
    """
    found = Rescaled({}, {})
    names = {id(module): name for name, module in block.named_modules()}
    for shared in inputs:
        scale = _scale(shared, modules)
        producers = [names[id(m)] for m in modules.values() if len(m.weight) == len(scale)]
        if shared.layers[0] in norms:
            producers.insert(0, norms[shared.layers[0]])
        moved = bool((scale != 1).any()) and any(
            _moved(block, name, scale, shared.layers, modules, changes, stored, found)
            for name in producers
        )
        shared.rotate(scale if moved else torch.ones_like(scale))
    return found


def _scale(shared: SharedInput, modules: Mapping[str, torch.nn.Linear]) -> torch.Tensor:
    """The powers of two that the input channels are multiplied by, float32 [K]."""
    x = shared.moments.diagonal()
    w = sum(modules[name].weight.detach().double().square().sum(dim=0) for name in shared.layers)
    exponent = 0.25 * torch.log2(w / x)
    known = exponent.isfinite()
    exponent = exponent - exponent[known].mean()
    exponent = torch.where(known, exponent.round().clamp(-_LARGEST, _LARGEST), 0.0)
    return torch.exp2(exponent).to(torch.float32)


def _moved(
    block: torch.nn.Module,
    producer: str,
    scale: torch.Tensor,
    layers: list[str],
    modules: Mapping[str, torch.nn.Linear],
    changes: Callable[[], bool],
    stored: Stored,
    found: Rescaled,
) -> bool:
    """Scale a producer's output and divide the columns behind it; whether nothing else changed."""
    module = block.get_submodule(producer)
    layer = next((name for name, known in modules.items() if known is module), None)
    if layer in layers:
        return False
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters(recurse=False):
        scaled = parameter.detach() * (scale if parameter.dim() == 1 else scale[:, None])
        if layer is not None and name == "weight":
            continue
        place = stored(f"{producer}.{name}")
        if place is None or not torch.equal(scaled.to(place[1]).to(scaled.dtype), scaled):
            return False
        tensors[place[0]] = scaled.to(place[1]).cpu()
    _multiply(module, layers, modules, scale)
    if changes():
        _multiply(module, layers, modules, 1 / scale)
        return False
    for name in layers:
        found.layers[name] = found.of(name, modules[name].weight).times(columns=1 / scale)
    if layer is not None:
        found.layers[layer] = found.of(layer, modules[layer].weight).times(rows=scale)
    found.tensors.update(tensors)
    return True


def _multiply(
    producer: torch.nn.Module,
    layers: list[str],
    modules: Mapping[str, torch.nn.Linear],
    scale: torch.Tensor,
) -> None:
    with torch.no_grad():
        for parameter in producer.parameters(recurse=False):
            parameter.mul_(scale if parameter.dim() == 1 else scale[:, None])
        for name in layers:
            modules[name].weight.div_(scale)
