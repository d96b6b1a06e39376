"""Stored names and the names of transformers' parameters, which its releases rename."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["Names", "parameter_names"]


class Names(NamedTuple):
    """Where stored tensors go in a model."""

    conversions: list[Any]
    """transformers' own rules, which rename, join and split stored tensors."""
    parameters: dict[str, str]
    """Stored tensor -> the parameter or buffer it belongs to; its own name where there is none."""
    converted: frozenset[str]
    """Stored tensors that are joined with others, split or transposed."""


def parameter_names(model: Any, stored: Iterable[str]) -> Names:
    """Map stored tensors to a model of transformers by the rules that ``from_pretrained`` uses.

    Args:
        model: a ``PreTrainedModel``, which may lie on the meta device.
        stored: names of tensors in a checkpoint.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    held, prefix = model.state_dict(), model.base_model_prefix
    names, converted = {}, set()
    for tensor in stored:
        name, rule = rename_source_key(tensor, renamings, converters, prefix, held)
        if name not in held and tensor in held:
            name, rule = tensor, None
        names[tensor] = name
        if rule is not None:
            converted.add(tensor)
    return Names(conversions, names, frozenset(converted))
