"""The marks by which diffusers sees that a model is quantized, so that it saves the format too."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from ..config import QUANT_METHOD, SemanticDialectConfig

__all__ = ["mark", "unmark"]

_KEY = "quantization_config"


def mark(module: nn.Module, config: SemanticDialectConfig, quantizer: Any) -> None:
    """Give a diffusers model its quantizer and put the configuration into its config.json.

    Other modules are left alone: they have no saving of their own that could lose the format.
    """
    if not hasattr(module, "register_to_config"):
        return
    model: Any = module
    quantizer.model = weakref.ref(module)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.register_to_config(**{_KEY: config})


def unmark(module: nn.Module) -> None:
    """Undo :func:`mark`."""
    model: Any = module
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    if hasattr(module, "register_to_config"):
        kept = {key: value for key, value in model.config.items() if key != _KEY}
        model._internal_dict = type(model.config)(kept)
