"""Other options for a transformer that was loaded quantized, as far as its weights allow them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .attach import attach, attached, detach
from .config import ConfigError, SemanticDialectConfig
from .layouts import Layout, LayoutError
from .linear import DialectLinear
from .mark import mark
from .plan import check_mechanisms

__all__ = ["change_options", "changed_config"]

_IN_THE_WEIGHTS = ("book", "block_size", "skip", "modulation", "keep_original")
"""Options that decide which weights are stored where."""


def changed_config(
    name: str, module: nn.Module, config: SemanticDialectConfig, layout: Layout | None
) -> SemanticDialectConfig:
    """The configuration of an enabled transformer with what `config` says explicitly.

    Args:
        name: what error messages call the transformer.
        module: the transformer.
        config: the configuration asked for.
        layout: the layout asked for.

    Raises:
        RuntimeError: if it was not loaded quantized, or nothing is asked for.
        ConfigError, LayoutError: if that needs other weights, or does not fit the model.
    """
    hook = attached(module)
    assert hook is not None
    given = {n: getattr(config, n) for n in config.model_fields_set}
    if hook.originals is not None or not given:
        raise RuntimeError(
            f"{name}: SemanticDialect is enabled already; call disable_semantic_dialect() first"
        )
    for option in _IN_THE_WEIGHTS:
        value = given.pop(option, None)
        present = getattr(hook.config, option)
        if value not in (None, present):
            raise ConfigError(
                f"{option}: {value!r} cannot be had of weights that were loaded quantized with "
                f"{present!r}; load the 16-bit checkpoint to quantize it another way"
            )
    if layout not in (None, hook.layout):
        raise LayoutError(
            f"{name}: was loaded quantized with layout {hook.layout.name!r}; load the 16-bit "
            "checkpoint to quantize it with another one"
        )
    changed = hook.config.replaced(**given)
    check_mechanisms(module, changed, hook.layout, name)
    return changed


def change_options(module: nn.Module, config: SemanticDialectConfig) -> None:
    """Put the configuration that :func:`changed_config` made in force."""
    hook = attached(module)
    assert hook is not None
    detach(module)
    try:
        attach(module, config, hook.layout, hook.bytes_before)
    except BaseException:
        if attached(module) is not None:
            detach(module)
        attach(module, hook.config, hook.layout, hook.bytes_before)
        raise
    for layer in module.modules():
        if isinstance(layer, DialectLinear):
            layer.activation = config.activation
    quantizer: Any = module.hf_quantizer
    quantizer.quantization_config = config
    mark(module, config, quantizer)
