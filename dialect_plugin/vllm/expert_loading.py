"""Taking the tensors of experts out of a checkpoint, before a model's own load_weights sees them.

Every model of vLLM has its own way to load experts: names, stacks, transposed and alternating rows,
copies that go past a parameter's loader. What a checkpoint's tensor holds is known from its name
and shape (:mod:`..experts`), 16-bit or packed, so that it is loaded here, the same for all models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from dialect_kernels.packed import STORED_FIELDS

from ..experts import WEIGHT, Expert, ExpertTensor
from . import compat
from .errors import LoadError
from .experts import BlockDialectExpertsMethod
from .places import Places

__all__ = ["expert_layers", "without_experts"]

_STORED = frozenset(field.stored for field in STORED_FIELDS)
_RUNNER = ".routed_experts"
"""What vLLM's module of the experts is called inside the one that has the model's name."""

Weights = Iterable[tuple[str, torch.Tensor]]


def expert_layers(model: torch.nn.Module) -> list[tuple[Any, BlockDialectExpertsMethod]]:
    """The layers of quantized experts, and their methods."""
    return [
        (module, method)
        for module in model.modules()
        if isinstance(method := getattr(module, "quant_method", None), BlockDialectExpertsMethod)
    ]


def without_experts(
    model: torch.nn.Module,
    weights: Weights,
    engine_name: Callable[[str], str | None],
    first: bool,
    inside: str = "",
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that are not loaded into quantized experts, in their order.

    Args:
        model: the complete model.
        weights: names and tensors of the checkpoint.
        engine_name: vLLM's name of the quantized experts that the checkpoint calls so; None if
            there are none.
        first: whether this is the model's first load, at which 16-bit experts must be 16-bit in the
            checkpoint, and packed ones packed.
        inside: what the names lack in front.

    Raises:
        LoadError: if a tensor of experts is not what the model needs, or packed experts arrive that
            the model has in 16 bit.
    """
    places = _places(model, engine_name)
    for name, tensor in weights:
        held = ExpertTensor.of(f"{inside}{name}")
        layer = None if held is None else places.find(held.prefix)
        if held is None or layer is None:
            yield name, tensor
            continue
        method = getattr(layer, "quant_method", None)
        if not isinstance(method, BlockDialectExpertsMethod):
            if held.field in _STORED:
                raise LoadError(
                    f"{name}: the checkpoint holds packed experts that vLLM builds in 16 bit; "
                    "convert the model again with --no-experts"
                )
            yield name, tensor
            continue
        if first:
            _check_kind(name, held, method)
        if held.field not in _STORED and not held.fits(tensor.shape):
            raise LoadError(
                f"{name}: the checkpoint's tensor has {tensor.dim()} dimensions, which a tensor of "
                "experts of this name does not have; download the checkpoint again"
            )
        if held.field in _STORED and held.number is not None:
            expert = Expert(held.prefix, held.number, held.parts[0])
            method.take(layer, expert, held.field, tensor)
            continue
        for matrix in held.matrices(tensor.shape, method.layout):
            method.take(layer, matrix.expert, held.field, matrix.cut(tensor))


def _check_kind(name: str, held: ExpertTensor, method: BlockDialectExpertsMethod) -> None:
    """Raise LoadError if the checkpoint has packed what its config calls 16-bit, or the reverse."""
    if held.field == WEIGHT and method.spec.serialized:
        raise LoadError(
            f"{name}: the checkpoint holds 16-bit weights of experts that its quantization_config "
            "calls packed; convert the model again"
        )
    if held.field in _STORED and not method.spec.serialized:
        raise LoadError(
            f"{name}: the checkpoint holds packed experts, and its quantization_config calls its "
            "weights 16-bit; convert the model again"
        )


def _places(model: torch.nn.Module, engine_name: Callable[[str], str | None]) -> Places:
    """Where a model has the experts of a checkpoint; `engine_name` as above."""
    return Places(
        (
            (place, name, module)
            for place, module in model.named_modules()
            if compat.is_expert_layer(module)
            for name in (place.removesuffix(_RUNNER), str(module.layer_name))
        ),
        lambda prefix: [engine_name(prefix) or prefix],
    )
