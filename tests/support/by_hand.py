"""A model of transformers whose linear layers are quantized by hand, with the reference alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from dialect_kernels import PackedTensor, reference

__all__ = ["logits_of", "quantized_by_hand"]

TOKENS = torch.tensor([[1, 17, 300, 42, 199, 8, 8, 123, 77, 250, 3], list(range(20, 31))])


def quantized_by_hand(
    directory: Path,
    layers: dict[str, Callable[[torch.Tensor], PackedTensor]],
    activation_format: str | dict[str, str] = "dialect",
    dtype: torch.dtype = torch.bfloat16,
    model_class: type = transformers.AutoModelForCausalLM,
) -> torch.nn.Module:
    """The 16-bit model in `directory` with some of its linear layers replaced.

    Args:
        layers: module name -> what packs its weight.
        activation_format: of all layers, or of each.
        dtype: of everything else.
    """
    model = model_class.from_pretrained(directory, dtype=dtype)
    for parameter in model.parameters():  # files are mapped, and kernels see the alignment
        parameter.data = parameter.data.clone()
    for name, pack in layers.items():
        layer = model.get_submodule(name)
        form = activation_format if isinstance(activation_format, str) else activation_format[name]
        model.set_submodule(name, _Layer(pack(layer.weight.detach()), layer.bias, form))
    return model


def logits_of(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """What the model answers, [2, 11, vocabulary]."""
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


class _Layer(torch.nn.Module):
    def __init__(self, packed: PackedTensor, bias: torch.Tensor | None, form: str) -> None:
        super().__init__()
        self.packed, self.bias, self.form = packed, bias, form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = reference.dialect_linear(x.flatten(0, -2), self.packed, self.bias, self.form)
        return y.view(*x.shape[:-1], -1)
