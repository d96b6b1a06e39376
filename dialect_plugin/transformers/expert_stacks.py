"""Which modules of a model take packed experts, and how stored tensors become their stacks.

A packed checkpoint has a matrix for each expert and part, whatever the 16-bit one had
(:mod:`..experts`); transformers joins the tensors of all experts while it loads, and takes them
apart again while it saves, by rules of its own kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from dialect_kernels import quantize
from dialect_kernels.packed import STORED_FIELDS

from ..checkpoint.reader import Checkpoint, CheckpointError
from ..experts import DOWN, WEIGHT, expert_of, prefixes
from ..scheme import LayerFormat, SchemeError, experts_disagreement
from .errors import missing, wrong_shape
from .experts import DialectExperts, ExpertsLayout, ExpertsPlace, joined, parts_of, stacked
from .names import parameter_names

__all__ = ["ExpertsModule", "conversions", "find_experts", "places_of"]

_INSTEAD = "serve the model with vLLM, or leave its experts in 16 bit with --no-experts or ignore"


class ExpertsModule(NamedTuple):
    """A module of transformers whose experts are packed, or have to be."""

    stored: str
    """The checkpoint's name of the experts, such as ``model.layers.0.mlp.experts``."""
    place: ExpertsPlace
    forms: Mapping[str, LayerFormat]
    """Name of a stack -> its format."""

    def empty(self, accumulation: str, dtype: torch.dtype) -> DialectExperts:
        """Packed experts of the same shapes on the meta device, without contents."""
        return DialectExperts.empty(self.place, self.forms, accumulation, dtype)

    def read_in(self, dtype: torch.dtype) -> None:
        """Let transformers read the 16-bit tensors in this dtype."""
        for stack in self.place.layout.stacks:
            weight = self.place.module.get_parameter(stack).to(dtype)
            setattr(self.place.module, stack, nn.Parameter(weight, requires_grad=False))

    def pack(self, stack: str, weight: torch.Tensor, into: DialectExperts) -> None:
        """Quantize a tensor of all experts, matrix by matrix.

        Args:
            stack: its name.
            weight: as transformers' module has it.
            into: takes the packed matrices.

        Raises:
            CheckpointError: if it has another shape than the module's.
            ValueError: if a weight holds NaN or Inf.
        """
        layout, needed = self.place.layout, self.place.module.get_parameter(stack).shape
        if weight.shape != needed:
            raise wrong_shape(f"{self.stored}.{stack}", weight.shape, needed)
        form = self.forms[stack]
        parts = [
            [
                quantize(
                    matrix.contiguous(),
                    form.formatbook,
                    form.block_size,
                    name=f"{self.stored}.{number}.{part}.{WEIGHT}",
                    rotation=form.rotation,
                )
                for number, matrix in enumerate(matrices)
            ]
            for part, matrices in layout.parts(stack, layout.rows(weight)).items()
        ]
        into.put(stack, stacked(layout, parts), form)


def places_of(model: Any, layers: Iterable[str]) -> dict[str, ExpertsPlace]:
    """The modules that the experts among some layers belong to.

    Args:
        model: of transformers; it may lie on the meta device.
        layers: names of layers as a checkpoint stores them.

    Returns:
        The checkpoint's name of the experts of a decoder layer -> their module.

    Raises:
        CheckpointError: if the model has no module that packed experts can replace, or fewer
            experts.
    """
    listed = prefixes(layers)
    names = parameter_names(model, [f"{stored}.{DOWN}" for stored in listed]).parameters
    found = {}
    for stored, own in listed.items():
        path = names[f"{stored}.{DOWN}"].rpartition(".")[0]
        try:
            module = model.get_submodule(path)
        except AttributeError:
            module = None
        place = None if module is None else ExpertsPlace.of(path, module)
        if place is None:
            there = "nothing" if module is None else type(module).__name__
            raise CheckpointError(
                f"{stored}: {type(model).__name__} of transformers has {there} in the place of "
                f"these experts, which packed ones do not replace; {_INSTEAD}"
            )
        for layer in own:
            expert = expert_of(layer)
            if expert is not None and expert.number >= place.count:
                raise CheckpointError(
                    f"{layer}: transformers' model has {place.count} experts in this layer; "
                    "config.json belongs to another model: copy it and the weights again"
                )
        found[stored] = place
    return found


def find_experts(
    model: Any, checkpoint: Checkpoint, formats: Mapping[str, LayerFormat]
) -> list[ExpertsModule]:
    """The modules that the experts among some layers belong to, all of whose tensors are there.

    Args:
        model: of transformers, on the meta device.
        checkpoint: packed or not.
        formats: layer -> its format.

    Raises:
        CheckpointError, SchemeError: as :func:`places_of`, or if a tensor is missing, or has
            another shape than the model's.
    """
    found, listed = [], prefixes(formats)
    for stored, place in places_of(model, formats).items():
        own = {layer: formats[layer] for layer in listed[stored]}
        module = ExpertsModule(stored, place, _forms(stored, place.layout, own))
        _check_tensors(module, checkpoint)
        found.append(module)
    return found


def _forms(
    stored: str, layout: ExpertsLayout, own: Mapping[str, LayerFormat]
) -> dict[str, LayerFormat]:
    """Stack -> the format that all its matrices have."""
    different = experts_disagreement(own)
    if different is not None:
        listed, _ = different
        raise SchemeError(f"quantization_config: the experts of {stored} disagree ({listed})")
    found = {}
    for stack, parts in layout.stacks.items():
        names = [layer for layer in own if layer.rpartition(".")[2] in parts]
        if not names:
            raise missing(f"{stored}.0.{parts[0]}.{STORED_FIELDS[0].stored}")
        found[stack] = own[names[0]]
    return found


def _check_tensors(module: ExpertsModule, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a matrix is missing, or has another shape than the model's.

    transformers joins what there is, and says only that the result has another shape.
    """
    for stack, parts in module.place.layout.stacks.items():
        count, rows, columns = module.place.shape(stack)
        shape = (rows // len(parts), columns)
        needed = {
            field.stored: field.shape(*shape, module.forms[stack].block_size)
            for field in STORED_FIELDS
        }
        for number, part in product(range(count), parts):
            layer = f"{module.stored}.{number}.{part}"
            if (info := checkpoint.weights.get(layer)) is not None:
                if info.shape != shape:
                    raise wrong_shape(f"{layer}.{WEIGHT}", info.shape, shape)
                continue
            for field, of_field in needed.items():
                if (info := checkpoint.tensors.get(f"{layer}.{field}")) is None:
                    raise missing(f"{layer}.{field}")
                if info.shape != of_field:
                    raise wrong_shape(f"{layer}.{field}", info.shape, of_field)


def conversions(modules: Iterable[ExpertsModule]) -> list[WeightConverter]:
    """transformers' rules that join packed tensors of all experts, and take them apart to save.

    They must come before those of the model, which would take the names for their own.
    """
    found: dict[str, WeightConverter] = {}
    for layout in (module.place.layout for module in modules):
        for stack, parts in layout.stacks.items():
            sources = [rf"\.experts.*.{part}.weight_" for part in parts]
            interleaved = layout.interleaved and len(parts) > 1
            found[stack] = WeightConverter(
                sources, rf"\.experts.{stack}.weight_", [_Join(interleaved)]
            )
    return list(found.values())


class _Join(ConversionOps):
    """Joins the tensors of all experts, gates with ups."""

    def __init__(self, interleaved: bool) -> None:
        self._interleaved = interleaved

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Tensors by their patterns -> the stack."""
        parts = [torch.stack(input_dict.pop(pattern)) for pattern in source_patterns]
        return {target_patterns[0]: joined(parts, self._interleaved)}

    @property
    def reverse_op(self) -> ConversionOps:
        """What saving does."""
        return _Part(self._interleaved)


class _Part(ConversionOps):
    """Takes a stack apart into the tensors of each expert."""

    def __init__(self, interleaved: bool) -> None:
        self._interleaved = interleaved

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """The stack -> tensors by their names."""
        value = next(iter(input_dict.values()))
        rows = value[0] if isinstance(value, list) else value
        parts = parts_of(rows, len(target_patterns), self._interleaved)
        return {
            pattern.replace("*", str(number)): tensor.contiguous()
            for pattern, part in zip(target_patterns, parts, strict=True)
            for number, tensor in enumerate(part)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        """What loading does."""
        return _Join(self._interleaved)
