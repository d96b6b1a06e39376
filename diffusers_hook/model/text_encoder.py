"""Text and image encoders of a pipeline: models of transformers, whose tokens are rounded alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import ConfigError, SemanticDialectConfig
from ..layers.casting import is_of_transformers
from ..layouts import Layout, LayoutError, generic_layout

__all__ = ["encoder_defaults", "encoder_layout", "encoder_options"]

_SHARED = ("book", "block_size", "rotation", "keep_original", "strict")
"""Options of a call that hold for its encoders too."""
_OWN = (*_SHARED, "activation_format", "ignore")
"""Options that an encoder can have."""
_OF_FILES = ("quant_method", "format_version")
"""What a configuration says of itself."""
_OFF: Mapping[str, Any] = {"salient_fraction": 0.0, "seda": False, "protected_steps": "none"}
"""What holds for every encoder: its tokens are rounded alone, in one call for a video."""
_ACTIVATIONS = "none"
"""Encoders run once for a video, so that their time hardly counts, and have large outliers."""


def encoder_options(
    name: str, config: SemanticDialectConfig, own: Mapping[str, Any]
) -> SemanticDialectConfig:
    """What a call says about an encoder; see :func:`encoder_defaults`.

    Args:
        name: what errors call the encoder.
        config: the options of all components.
        own: those of this one.

    Raises:
        ConfigError: if an encoder has no such option.
    """
    own = {o: v for o, v in own.items() if o not in _OF_FILES and (o, v) not in _OFF.items()}
    for option in own:
        if option in SemanticDialectConfig.model_fields and option not in _OWN:
            raise ConfigError(
                f"{option}: has no effect on {name}, an encoder of transformers, whose tokens are "
                f"rounded alone; its options are {', '.join(_OWN)}"
            )
    shared = {o: getattr(config, o) for o in _SHARED if o in config.model_fields_set}
    return SemanticDialectConfig(**{**shared, **own})


def encoder_defaults(module: nn.Module, config: SemanticDialectConfig) -> SemanticDialectConfig:
    """The configuration with what holds for an encoder where nothing else is said.

    Its activations stay in 16 bit, and so do the layers that its class wants in float32: T5's `wo`.
    """
    defaults: dict[str, Any] = dict(_OFF)
    if "activation_format" not in config.model_fields_set:
        defaults["activation_format"] = _ACTIVATIONS
    if "ignore" not in config.model_fields_set:
        defaults["ignore"] = _kept(module)
    return config.replaced(**defaults)


def encoder_layout(module: nn.Module) -> Layout | None:
    """The layout of an encoder; None for other modules.

    Raises:
        LayoutError: if it has no list of blocks.
    """
    if not is_of_transformers(module):
        return None
    layout = generic_layout(module)
    if layout is None:
        raise LayoutError(
            f"{type(module).__name__}: has no list of blocks with linear layers; quantize other "
            "components"
        )
    return layout


def _kept(module: nn.Module) -> tuple[str, ...]:
    """Patterns of the linear layers that the class of an encoder wants in float32."""
    parts: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        parts.update(getattr(module, attribute, None) or ())
    layout = encoder_layout(module)
    assert layout is not None
    names = [f"{b.name}.{path}" for b in layout.blocks(module) for path, _, _ in b.linears()]
    patterns = (f"(?:.*\\.)?{re.escape(part)}(?:\\..*)?\\Z" for part in sorted(parts))
    return tuple(f"re:{p}" for p in patterns if any(re.match(p, name) for name in names))
