"""Other dtypes for a quantized model: what is not packed is cast, as it is while loading."""

from __future__ import annotations

import torch
from torch import nn

from .quantized import DTYPES, QuantizedLinear

__all__ = ["cast", "check_castable", "is_of_transformers", "kept_in_float32"]


def is_of_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, as text encoders are."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def kept_in_float32(module: nn.Module, name: str) -> bool:
    """Whether diffusers' class of a model keeps a part of it in float32, whatever its dtype.

    Those of transformers do so for some dtypes only, while loading.
    """
    if is_of_transformers(module):
        return False
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return not kept.isdisjoint(name.split("."))


def check_castable(dtype: torch.dtype) -> None:
    """Raise ValueError unless quantized layers compute in a dtype."""
    if dtype not in DTYPES:
        raise ValueError(
            f"to: {dtype} cannot be used: a quantized model computes in float32, bfloat16 or "
            "float16; call disable_semantic_dialect() first"
        )


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model to one of :data:`DTYPES`: it has then what diffusers' loading would give it.

    Packed weights stay as they are, and so does a model that is in this dtype already. Parameters
    that its class keeps in float32 become or stay float32, buffers beside them stay.
    """
    if getattr(module, "dtype", None) == dtype:
        return
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            wanted = torch.float32 if kept_in_float32(module, name) else dtype
            parameter.data = parameter.data.to(wanted)
            if parameter.grad is not None:
                parameter.grad.data = parameter.grad.data.to(wanted)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and not kept_in_float32(module, name):
            buffer.data = buffer.data.to(dtype)
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLinear):
            layer.original_dtype = torch.float32 if kept_in_float32(module, name) else dtype
