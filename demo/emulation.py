"""Emulation in transformers: the layers a packed checkpoint names, in another number format.

The server's numbers are checked against it, and MXFP4, which no CPU engine serves, is measured by
it. Activations between the layers have the model's own dtype, as in the server.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from dialect_kernels import PackedTensor, dialect_linear
from dialect_kernels.reference import quantize_mxfp4
from dialect_plugin.checkpoint import open_packed

__all__ = ["emulate_blockdialect", "emulate_mxfp4", "load_bf16"]

Emulated = Callable[[torch.nn.Linear, str], torch.nn.Module]


class _DialectLayer(torch.nn.Module):
    """The packed weight of one layer, applied to rounded activations."""

    def __init__(self, packed: PackedTensor, bias: torch.Tensor | None, fmt: str) -> None:
        super().__init__()
        self.packed, self.bias, self.activation_format = packed, bias, fmt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        return dialect_linear(x, self.packed, self.bias, self.activation_format)


class _Mxfp4Layer(torch.nn.Module):
    """W4A4 in MXFP4-32: weights and activations rounded, products in float32."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = quantize_mxfp4(layer.weight.detach()), layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        rounded = quantize_mxfp4(x.reshape(-1, x.shape[-1]))
        bias = None if self.bias is None else self.bias.float()
        y = F.linear(rounded, self.weight, bias)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def load_bf16(model: Path) -> PreTrainedModel:
    """The 16-bit model."""
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, local_files_only=True
    ).eval()


def emulate_blockdialect(model: Path, packed: Path, activation_format: str) -> PreTrainedModel:
    """The model with the packed checkpoint's layers.

    Args:
        model: directory of the 16-bit checkpoint.
        packed: directory that ``blockdialect quantize`` made of it.
        activation_format: ``"dialect"``, ``"fp8"`` or ``"none"``.
    """
    checkpoint = open_packed(packed)

    def emulated(layer: torch.nn.Linear, name: str) -> torch.nn.Module:
        return _DialectLayer(checkpoint.read(name), layer.bias, activation_format)

    return _replace(load_bf16(model), checkpoint.layers, emulated)


def emulate_mxfp4(model: Path, packed: Path) -> PreTrainedModel:
    """The model with MXFP4-32 weights and activations in the layers that `packed` names."""
    return _replace(
        load_bf16(model), open_packed(packed).layers, lambda layer, _: _Mxfp4Layer(layer)
    )


def _replace(
    model: PreTrainedModel, layers: tuple[str, ...], emulated: Emulated
) -> PreTrainedModel:
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, emulated(getattr(owner, leaf), name))
    return model
