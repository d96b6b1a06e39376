"""What was decided while vLLM built a model, looked at again when the model is complete.

vLLM says a layer's name while it builds the layer. Some layers have none there, or one that is not
theirs (``q_a_proj`` of MiniCPM3, the shared blocks of Zamba2); a part of a model may have a map of
names of its own, which begin where the part stands (the text model of Gemma 3n); and a model may
give a weight a loader of its own after the layer is built (Mamba 2 whose groups do not fit the
ranks). All of this is known before the first tensor is loaded: a layer that would have been decided
otherwise gets its parameters again, and so do embeddings and output projections
(:mod:`.vocabulary`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from dialect_kernels.packed import STORED_FIELDS

from .. import architectures
from ..scheme import Scheme
from . import compat
from .cache_means import give_room
from .linear import BlockDialectLinearMethod, LinearSpec
from .probes import WEIGHT
from .vocabulary import ChoosesVocabulary, settle_vocabulary

__all__ = ["Decides", "settle"]

_SETTLED = "_blockdialect_settled"
"""Attribute of a model."""
_PARAMETERS = (WEIGHT, *(field.stored for field in STORED_FIELDS))


class Decides(ChoosesVocabulary, Protocol):
    """What is needed of :class:`.config.BlockDialectConfig`, which stands above."""

    scheme: Scheme

    def see_parts(
        self,
        mappers: Mapping[str, Any],
        stacked: Mapping[str, list[str]],
        exists: Callable[[str], bool],
    ) -> None: ...

    def spec(self, layer: Any, *names: str) -> LinearSpec | None: ...


def settle(config: Decides, model: torch.nn.Module) -> None:
    """Decide again, for the complete `model`, which layers are quantized and how; once.

    Raises:
        ValueError: as :meth:`.config.BlockDialectConfig.get_quant_method`.
    """
    if hasattr(model, _SETTLED):
        return
    setattr(model, _SETTLED, True)
    places = dict(model.named_modules())
    mappers = {place: compat.name_mapper(module) for place, module in places.items() if place}
    config.see_parts(
        {place: mapper for place, mapper in mappers.items() if mapper is not None},
        _stacked(places.values()),
        places.__contains__,
    )
    for place, layer in places.items():
        method = getattr(layer, "quant_method", None)
        if not isinstance(method, BlockDialectLinearMethod | UnquantizedLinearMethod):
            continue
        ours = method if isinstance(method, BlockDialectLinearMethod) else None
        spec = ours.spec if ours is not None else None
        loader = ours.other_loader(layer) if ours is not None else None
        wanted = spec
        if isinstance(layer, LinearBase) and layer.quant_config is config:
            wanted = config.spec(layer, *_names(places, place, layer))
        if wanted != spec or loader is not None:
            _build_again(layer, wanted, loader)
    # what an online draft has none of is its target's, which vLLM puts in its place
    online = not config.scheme.serialized
    if not compat.has_targets_vocabulary(model) and not (online and compat.is_draft(model)):
        settle_vocabulary(config, model, places)
    if config.scheme.kv_cache != "none":
        give_room(model)


def _names(places: Mapping[str, torch.nn.Module], place: str, layer: Any) -> tuple[str, ...]:
    """Names of a layer, the best one first."""
    said = layer.prefix
    if places.get(said) is layer:
        return (said,)
    return (said, place) if architectures.is_in_numbered_block(said) else (place,)


def _stacked(modules: Any) -> dict[str, list[str]]:
    """Last words of fused layers and of their parts, as the models' maps of names tell."""
    found: dict[str, list[str]] = {}
    for module in modules:
        for part, fused in compat.stacked_names(module):
            parts = found.setdefault(fused, [])
            if part not in parts:
                parts.append(part)
    return found


def _build_again(layer: Any, spec: LinearSpec | None, loader: Callable[..., Any] | None) -> None:
    """Give a layer the parameters of another method, or another loader for them."""
    for name in _PARAMETERS:
        if name in layer._parameters:
            delattr(layer, name)
    layer.quant_method = (
        UnquantizedLinearMethod() if spec is None else BlockDialectLinearMethod(spec)
    )
    with compat.built_for_reload(layer):
        layer.quant_method.create_weights(
            layer,
            input_size_per_partition=getattr(layer, "input_size_per_partition", layer.input_size),
            output_partition_sizes=layer.output_partition_sizes,
            input_size=layer.input_size,
            output_size=layer.output_size,
            params_dtype=layer.params_dtype,
            weight_loader=loader or getattr(layer, "weight_loader_v2", layer.weight_loader),
        )
        layer.update_param_tp_status()
        if spec is not None:
            layer.quant_method.other_loader(layer)
