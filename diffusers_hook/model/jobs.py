"""What is decided about a model before it is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import ConfigError, SemanticDialectConfig
from ..layers.offload import check_offloading
from ..layers.originals import Source, choose_place
from ..layouts import Layout, LayoutError, generic_layout, layout_for, layout_named
from .layer_choice import LayerChoice, choose_layers
from .text_encoder import encoder_defaults, encoder_layout

__all__ = ["Job", "config_of", "layout_of", "prepare"]


@dataclass(frozen=True)
class Job:
    """One transformer or encoder and everything that was decided about it."""

    name: str
    module: nn.Module
    layout: Layout
    config: SemanticDialectConfig
    choice: LayerChoice
    place: str
    sources: dict[str, Source]


def config_of(config: object, options: Mapping[str, Any]) -> SemanticDialectConfig:
    """The configuration that a user gave, with single options.

    Raises:
        ConfigError: if one cannot be used.
    """
    if config is None:
        config = SemanticDialectConfig()
    if not isinstance(config, SemanticDialectConfig):
        raise ConfigError(
            f"config: {config!r} cannot be used: it must be a SemanticDialectConfig; give single "
            "options as keywords, e.g. salient_fraction=0.2"
        )
    return config.replaced(**options)


def layout_of(layout: object) -> Layout | None:
    """The layout that a user gave, or its name.

    Raises:
        LayoutError: if it is none.
    """
    if isinstance(layout, str):
        return layout_named(layout)
    if layout is not None and not isinstance(layout, Layout):
        raise LayoutError(
            f"layout: {layout!r} cannot be used: it must be a diffusers_hook.Layout or the name of "
            "a known one, e.g. 'wan'"
        )
    return layout


def prepare(
    name: str, module: nn.Module, config: SemanticDialectConfig, layout: Layout | None
) -> Job:
    """Decide everything about a model; all that can be checked is checked here.

    Args:
        name: what errors call the model.
        module: the model.
        config: its configuration.
        layout: the layout that was given, or None.

    Raises:
        ConfigError, LayoutError, RuntimeError, ValueError: as :func:`diffusers_hook.enable`.
    """
    check_offloading(name, module)
    encoder = encoder_layout(module)
    if encoder is not None:
        layout, config = encoder, encoder_defaults(module, config)
    layout = layout or layout_for(module) or generic_layout(module)
    if layout is None:
        raise LayoutError(
            f"{name}: the layout of {type(module).__name__} is not known; pass one as layout=, see "
            "diffusers_hook.Layout"
        )
    config, choice = choose_layers(module, config, layout, name)
    place, sources = choose_place(module, choice.layers, config.keep_original)
    return Job(name, module, layout, config, choice, place, sources)
