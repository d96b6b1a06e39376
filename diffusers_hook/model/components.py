"""Which modules of a pipeline are quantized, and with which options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..config import ConfigError, SemanticDialectConfig
from ..layers.casting import is_of_transformers
from ..layouts import Layout, LayoutError, layout_for
from .pipeline import modules_of, uncompiled
from .text_encoder import encoder_options

__all__ = ["Components", "chosen_components"]

Components = Sequence[str] | Mapping[str, Mapping[str, Any]]
"""Names of a pipeline's components, or for each of them the options that are its own."""


def chosen_components(
    target: Any,
    config: SemanticDialectConfig,
    components: Components | None,
    layout: Layout | None,
) -> dict[str, tuple[nn.Module, SemanticDialectConfig]]:
    """The modules that are quantized, and their configurations, by name.

    Args:
        target: a pipeline, or a module.
        config: the options of the call.
        components: those to quantize, in a pipeline; None for its transformers.
        layout: the layout that was given, or None.

    Raises:
        ConfigError: if a pipeline has no such component, or a component no such option.
        LayoutError: if there is nothing to quantize.
    """
    if components is None:
        modules, own = _transformers(target, layout), {}
    else:
        own = _options(components)
        modules = _named(target, list(own))
    if isinstance(target, nn.Module):
        # what was given for it is its own
        own = {name: _given(config) for name in modules}
    return {
        name: (module, _config(name, module, config, own.get(name, {})))
        for name, module in modules.items()
    }


def _given(config: SemanticDialectConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.model_fields_set}


def _config(
    name: str, module: nn.Module, config: SemanticDialectConfig, own: Mapping[str, Any]
) -> SemanticDialectConfig:
    if is_of_transformers(module):
        return encoder_options(name, config, own)
    return config.replaced(**own) if own else config


def _options(components: object) -> dict[str, Mapping[str, Any]]:
    """Name of a component -> options that are its own."""
    if isinstance(components, Mapping):
        found: dict[str, Any] = dict(components)
    elif isinstance(components, Sequence) and not isinstance(components, str):
        found = {name: {} for name in components}
    else:
        found = {}
    fine = all(isinstance(n, str) and isinstance(own, Mapping) for n, own in found.items())
    if not found or not fine:
        raise ConfigError(
            f"components: {components!r} cannot be used: it must be a list of names, or options by "
            "name, e.g. {'transformer': {}, 'text_encoder': {'activation_format': 'fp8'}}"
        )
    return found


def _named(target: Any, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of those names, each once."""
    if isinstance(target, nn.Module):
        raise ConfigError(
            f"components: {list(names)} are those of a pipeline, and {type(target).__name__} is "
            "one model; leave components out"
        )
    parts: Mapping[str, Any] = getattr(target, "components", None) or {}
    known = {n: uncompiled(part) for n, part in parts.items() if isinstance(part, nn.Module)}
    found: dict[str, nn.Module] = {}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"components: {type(target).__name__} has no model {name!r}; it has "
                f"{', '.join(known)}"
            )
        if known[name] not in found.values():
            found[name] = known[name]
    return found


def _transformers(target: Any, layout: Layout | None) -> dict[str, nn.Module]:
    """The transformers of a target that can be enabled, by name.

    Raises:
        LayoutError: if there is none.
    """
    modules = modules_of(target)
    if isinstance(target, nn.Module):
        return modules
    if layout is None:
        found = {n: m for n, m in modules.items() if layout_for(m) is not None}
        # where no class is known, diffusers' names say which parts are the transformers
        found = found or {n: m for n, m in modules.items() if n in ("transformer", "transformer_2")}
    else:
        found = {n: m for n, m in modules.items() if _is_of(m, layout)}
    if not found:
        classes = ", ".join(f"{n}: {type(m).__name__}" for n, m in modules.items()) or "no modules"
        raise LayoutError(
            f"{type(target).__name__}: has no video transformer with a known layout ({classes}); "
            "give the transformer itself to diffusers_hook.enable() with a layout"
        )
    return found


def _is_of(module: nn.Module, layout: Layout) -> bool:
    """Whether a layout names a module's class or one of its base classes."""
    return any(base.__name__ in layout.models for base in type(module).__mro__)
