"""The marks by which diffusers and transformers see that a model is quantized.

They then save its format too.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from ..config import QUANT_METHOD, SemanticDialectConfig
from ..layers.casting import is_of_transformers

__all__ = ["mark", "unmark"]

_KEY = "quantization_config"


def mark(module: nn.Module, config: SemanticDialectConfig, quantizer: Any) -> None:
    """Give a model its quantizer and put the configuration into its config.json.

    Modules of neither library are left alone: they have no saving of their own that could lose the
    format.
    """
    model: Any = module
    if is_of_transformers(module):
        model.config.quantization_config = config
    elif hasattr(module, "register_to_config"):
        quantizer.model = weakref.ref(module)
        model.register_to_config(**{_KEY: config})
    else:
        return
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def unmark(module: nn.Module) -> None:
    """Undo :func:`mark`."""
    model: Any = module
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    if is_of_transformers(module):
        vars(model.config).pop(_KEY, None)
    elif hasattr(module, "register_to_config"):
        kept = {key: value for key, value in model.config.items() if key != _KEY}
        model._internal_dict = type(model.config)(kept)
