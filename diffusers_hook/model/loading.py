"""What a quantized model must be when a loader of diffusers or transformers has filled it."""

from __future__ import annotations

from torch import nn

from dialect_kernels.packed import STORED_FIELDS

from ..layers.fp8 import Fp8Linear
from ..layers.quantized import QuantizedLinear

__all__ = ["STORED", "bytes_in_16_bit", "check_layers", "missing", "own_memory"]

STORED = {**{part.stored: part.dtype for part in STORED_FIELDS}, **Fp8Linear.STORED}
"""Last part of a packed tensor's name -> its dtype in files; loaders would cast any other."""


def missing(name: str) -> ValueError:
    """A tensor is not there."""
    return ValueError(
        f"{name}: is missing in the checkpoint; it is damaged or was saved by another "
        "release: quantize the 16-bit model again"
    )


def check_layers(model: nn.Module) -> None:
    """Raise ValueError, naming the tensor, if one of a quantized layer is not valid."""
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            layer.check(path)


def own_memory(model: nn.Module) -> None:
    """Copy what lies in a file's mapping: kernels round the same on aligned memory only."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def bytes_in_16_bit(model: nn.Module) -> int:
    """Bytes of a quantized model's parameters if its quantized layers were in 16 bit."""
    held = sum(parameter.nbytes for parameter in model.parameters())
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            held += 2 * layer.in_features * layer.out_features
            held -= sum(tensor.nbytes for tensor in layer.packed_tensors.values())
    return held
