"""Other options for a transformer that was loaded quantized, as far as its weights allow them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import ConfigError, SemanticDialectConfig
from ..layers.dialect import DialectLinear
from ..layouts import Layout, LayoutError
from .attach import Attached, attach, attached, detach
from .layer_choice import check_mechanisms, with_named_blocks
from .saved_mark import mark

__all__ = ["change_options", "changed_config"]

_IN_THE_WEIGHTS = ("book", "block_size", "rotation", "ignore", "modulation", "keep_original")
"""Options that decide which weights are stored where."""

_OFF = {"salient_fraction": 0.0, "seda": False, "protected_steps": "none"}
"""Options that need activation_format="dialect", and what switches them off."""


def changed_config(
    name: str, module: nn.Module, config: SemanticDialectConfig, layout: Layout | None
) -> SemanticDialectConfig:
    """The configuration of an enabled transformer with the options that `config` sets.

    Args:
        name: what error messages call the transformer.
        module: the transformer.
        config: the new options.
        layout: the new layout, or None.

    Returns:
        The present configuration itself where `config` sets nothing.

    Raises:
        RuntimeError: if it was not loaded quantized.
        ConfigError, LayoutError: if the options need other weights or do not fit the model.
    """
    hook = attached(module)
    assert hook is not None
    config = with_named_blocks(module, config, hook.layout)
    given = {n: getattr(config, n) for n in config.model_fields_set - {"format_version"}}
    if hook.originals is not None:
        raise RuntimeError(
            f"{name}: SemanticDialect is enabled already; call disable_semantic_dialect() first"
        )
    for option in _IN_THE_WEIGHTS:
        value = given.pop(option, None)
        present = getattr(hook.config, option)
        if value not in (None, present):
            raise ConfigError(
                f"{option}: {value!r} needs other weights than those loaded, which were quantized "
                f"with {present!r}; load the 16-bit checkpoint to quantize it another way"
            )
    if layout not in (None, hook.layout):
        raise LayoutError(
            f"{name}: was loaded quantized with layout {hook.layout.name!r}; load the 16-bit "
            "checkpoint to quantize it with another one"
        )
    if not given:
        return hook.config
    if given.get("activation_format", "dialect") != "dialect":
        # saved options give way to those of this call, as if they had been left out
        for option, off in _OFF.items():
            if getattr(hook.config, option) != off:
                given.setdefault(option, type(config).model_fields[option].default)
    changed = hook.config.replaced(**given)
    check_mechanisms(module, changed, hook.layout, name)
    return changed


def change_options(module: nn.Module, config: SemanticDialectConfig) -> None:
    """Put the configuration that :func:`changed_config` made in force."""
    hook = attached(module)
    assert hook is not None
    if config is hook.config:
        return
    detach(module)
    try:
        _attach_again(module, hook, config)
    except BaseException:
        if attached(module) is not None:
            detach(module)
        _attach_again(module, hook, hook.config)
        raise
    for layer in module.modules():
        if isinstance(layer, DialectLinear):
            layer.activation_format = config.activation_format
    quantizer: Any = module.hf_quantizer
    quantizer.quantization_config = config
    mark(module, config, quantizer)


def _attach_again(module: nn.Module, hook: Attached, config: SemanticDialectConfig) -> None:
    """Hook a transformer as it was hooked, with another configuration."""
    attach(module, config, hook.layout, hook.bytes_before)
    again = attached(module)
    assert again is not None
    again.state.pipeline = hook.state.pipeline
