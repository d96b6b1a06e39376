"""The choice of the linear layers that are quantized, made and checked before any work is done."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dialect_kernels import PackedTensor
from dialect_kernels.arguments import check_dtype
from dialect_kernels.formatbook import ROTATION_GROUP, Rotation, book_by_name
from dialect_kernels.layer_names import matches, near_misses

from ..config import ConfigError, SemanticDialectConfig
from ..layers.casting import kept_in_float32
from ..layers.dialect import DialectLinear
from ..layers.fp8 import Fp8Linear
from ..layouts import Layout, LayoutError, Stream, without_adapters
from ..tokens.observe import Observed, observed_class

__all__ = ["LayerChoice", "check_mechanisms", "choose_layers", "put", "with_named_blocks"]

_log = logging.getLogger(__name__)
_MODULATION_SHARE = 0.05
"""Share of the parameters above which adaLN modulation is stored in FP8 by default."""


@dataclass(frozen=True)
class LayerChoice:
    """The linear layers of a transformer that are quantized; names are from the model's root.

    Attributes:
        quantized: the layers that become 4 bit, and their streams.
        modulation: the layers that become FP8.
    """

    quantized: Mapping[str, tuple[nn.Linear, Stream]]
    modulation: Mapping[str, nn.Linear]

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """Every layer that is replaced."""
        return {**{path: layer for path, (layer, _) in self.quantized.items()}, **self.modulation}

    def quantized_layer(
        self,
        path: str,
        config: SemanticDialectConfig,
        name: str,
        packed: PackedTensor | None = None,
    ) -> DialectLinear | Fp8Linear:
        """The layer that takes the place of `path`; its weight is `packed`, or rounded to nearest.

        Raises:
            ValueError: if its weight cannot be quantized (calling it `name`).
        """
        if path in self.modulation:
            return Fp8Linear.quantized(self.modulation[path], name)
        layer, stream = self.quantized[path]
        book, form = book_by_name(config.book), config.activation_format
        if packed is not None:
            return DialectLinear(packed, layer.bias, stream, form, layer.weight.dtype)
        rotation = _rotation(layer, config)
        return DialectLinear.quantized(layer, stream, book, config.block_size, form, name, rotation)

    def rotation(self, path: str, config: SemanticDialectConfig) -> Rotation:
        """The rotation of the 4-bit layer `path`."""
        return _rotation(self.quantized[path][0], config)

    def empty_layer(self, path: str, config: SemanticDialectConfig) -> DialectLinear | Fp8Linear:
        """The layer that takes the place of `path`, on the meta device, for a loader to fill."""
        if path in self.modulation:
            return Fp8Linear.empty(self.modulation[path])
        layer, stream = self.quantized[path]
        book, form = book_by_name(config.book), config.activation_format
        rotation = _rotation(layer, config)
        return DialectLinear.empty(layer, stream, book, config.block_size, form, rotation)


def choose_layers(
    module: nn.Module,
    config: SemanticDialectConfig,
    layout: Layout,
    name: str,
    *,
    empty: bool = False,
) -> tuple[SemanticDialectConfig, LayerChoice]:
    """Choose the layers that become 4 bit and FP8; all that can be checked is checked here.

    Args:
        module: the transformer.
        config: the configuration.
        layout: the transformer's layout.
        name: what error messages call the transformer.
        empty: whether the weights are yet to be loaded.

    Returns:
        (the configuration with `modulation` and the places of blocks in `ignore` resolved, so that
        the same layers are chosen again by whoever loads the quantized model; the choice).

    Raises:
        LayoutError, ConfigError, ValueError: if the model does not fit; one sentence.
    """
    check_mechanisms(module, config, layout, name)
    if getattr(module, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{name}: is quantized already; load the 16-bit checkpoint to quantize it another way"
        )
    config = with_named_blocks(module, config, layout)
    blocks = tuple(layout.blocks(module))
    linears = {
        f"{block.name}.{path}": (layer, stream)
        for block in blocks
        for path, layer, stream in block.linears()
    }
    quantized = {
        n: found
        for n, found in linears.items()
        if not _ignored(n, config) and not kept_in_float32(module, n)
    }
    if not quantized:
        raise ValueError(
            f"{name}: no linear layer is left to quantize, ignore={list(config.ignore)} matches "
            f"all of {len(linears)}; ignore fewer layers"
        )
    quantized = _divisible(name, quantized, config)
    for path, (layer, _) in quantized.items():
        _check_layer(f"{name}.{path}", layer, empty)
    _check_rotation(name, quantized, config)
    _check_ignore(name, config, [*linears, *_modulation_layers(module, layout)])
    config, modulation = _modulation(module, layout, config)
    return config, LayerChoice(quantized, modulation)


def with_named_blocks(
    module: nn.Module, config: SemanticDialectConfig, layout: Layout
) -> SemanticDialectConfig:
    """The configuration with names where `ignore` gives the places of a model's blocks."""
    lists: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for block in layout.blocks(module):
        path, _, index = block.name.rpartition(".")
        lists[path][int(index)] = block.name
    return config.with_named_blocks(
        [found[index] for index in sorted(found)] for found in lists.values()
    )


def check_mechanisms(
    module: nn.Module, config: SemanticDialectConfig, layout: Layout, name: str
) -> None:
    """Raise LayoutError if the model has no attention that the configuration needs.

    A layout without any such attention is refused with `strict` only.
    """
    if not (config.decomposes or config.groups):
        return
    if config.strict and not layout.has_saliency:
        raise LayoutError(
            f"{name}: {type(module).__name__} has no attention from which salient tokens could be "
            f"read ({layout.remark}); pass strict=False, or salient_fraction=0 and seda=False"
        )
    for block in layout.blocks(module):
        if block.kind.attention is not None:
            attention: Any = block.module.get_submodule(block.kind.attention)
            if not isinstance(attention.processor, Observed):
                _check_processor(f"{name}.{block.name}.{block.kind.attention}", attention.processor)


def _check_processor(name: str, processor: object) -> None:
    """Raise LayoutError, naming the attention, if its processor cannot be observed."""
    try:
        observed_class(type(processor))
    except LayoutError as error:
        raise LayoutError(
            f"{name.rstrip('.')}: {error}; pass salient_fraction=0 and seda=False, or set one of "
            "diffusers' processors first"
        ) from None


def _divisible(
    name: str, layers: Mapping[str, tuple[nn.Linear, Stream]], config: SemanticDialectConfig
) -> dict[str, tuple[nn.Linear, Stream]]:
    """The layers whose columns the block size divides, after one warning of the others.

    Raises:
        ValueError: if there are others with `strict`, or if there is no other.
    """
    size = config.block_size
    odd = {path: layer for path, (layer, _) in layers.items() if layer.in_features % size}
    if not odd:
        return dict(layers)
    fault = (
        f"{name}: block_size {size} does not divide the columns of {len(odd)} of {len(layers)} "
        f"layers ({_first_of(odd)})"
    )
    if len(odd) == len(layers):
        raise ValueError(f"{fault}; choose a smaller block_size")
    if config.strict:
        raise ValueError(
            f"{fault}; choose a smaller block_size, add them to ignore, or pass strict=False"
        )
    _log.warning("%s, which stay in 16 bit; a smaller block_size may divide them", fault)
    return {path: found for path, found in layers.items() if path not in odd}


def _first_of(layers: Mapping[str, nn.Linear]) -> str:
    """The first layer and its columns."""
    path, layer = next(iter(layers.items()))
    return f"{path}: {layer.in_features}" + (", ..." if len(layers) > 1 else "")


def _check_layer(name: str, layer: nn.Linear, empty: bool) -> None:
    weight = layer.weight
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"{name}: is a {type(layer).__name__}, not a plain linear layer; unload or fuse its "
            "adapters, or add it to ignore"
        )
    if weight.device.type == "meta" and not empty:
        raise ValueError(
            f"{name}.weight: is not in memory (offloaded); enable SemanticDialect before offloading"
        )
    check_dtype(weight, f"{name}.weight")


def _rotation(layer: nn.Linear, config: SemanticDialectConfig) -> Rotation:
    """The rotation of a layer: none where it does not divide the columns."""
    return "none" if layer.in_features % ROTATION_GROUP else config.rotation


def _check_rotation(
    name: str, layers: Mapping[str, tuple[nn.Linear, Stream]], config: SemanticDialectConfig
) -> None:
    """Warn of layers that cannot be rotated; with `strict`, raise ValueError."""
    left = [path for path, (layer, _) in layers.items() if _rotation(layer, config) == "none"]
    if config.rotation == "none" or not left:
        return
    fault = (
        f"{name}: the columns of {', '.join(left)} are not a multiple of {ROTATION_GROUP}, which "
        f"the rotation {config.rotation} needs"
    )
    if config.strict:
        raise ValueError(f"{fault}; add these layers to ignore, or pass strict=False")
    _log.warning("%s; they are not rotated", fault)


def _modulation(
    module: nn.Module, layout: Layout, config: SemanticDialectConfig
) -> tuple[SemanticDialectConfig, dict[str, nn.Linear]]:
    """(The configuration with `modulation` resolved, the layers that are stored in FP8, by name).

    By default these are layers that are a large share of the model, and none that its class keeps
    in float32.
    """
    layers = {
        name: layer
        for name, layer in _modulation_layers(module, layout).items()
        if not _ignored(name, config)
    }
    if config.modulation is None:
        kept = tuple(name for name in layers if kept_in_float32(module, name))
        layers = {name: layer for name, layer in layers.items() if name not in kept}
        held = sum(layer.weight.numel() for layer in layers.values())
        whole = sum(parameter.numel() for parameter in module.parameters())
        if held > _MODULATION_SHARE * whole:
            return config.replaced(modulation="fp8", ignore=[*config.ignore, *kept]), layers
    elif config.modulation == "fp8" and layers:
        return config, layers
    return config.replaced(modulation="16bit"), {}


def _modulation_layers(module: nn.Module, layout: Layout) -> dict[str, nn.Linear]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and any(re.fullmatch(p, without_adapters(name)) for p in layout.modulation)
    }


def _check_ignore(name: str, config: SemanticDialectConfig, candidates: Sequence[str]) -> None:
    """Raise ConfigError if a pattern matches none of the layers that could be quantized."""
    names = [without_adapters(candidate) for candidate in candidates]
    for pattern in config.ignore:
        if any(matches(pattern, candidate) for candidate in names):
            continue
        near = ", ".join(near_misses(pattern, names))
        hint = f"; near it are {near}" if near else ""
        raise ConfigError(
            f"ignore: {pattern!r} matches no layer of {name} that would be quantized{hint}; give "
            "an exact name from the model's root or 're:' and a regular expression"
        )


def _ignored(name: str, config: SemanticDialectConfig) -> bool:
    return config.is_ignored(without_adapters(name))


def put(module: nn.Module, path: str, child: nn.Module) -> None:
    """Put a module in the place of another, by its name from the root."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)
