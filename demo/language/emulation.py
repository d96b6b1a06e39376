"""Emulation in transformers: the layers a packed checkpoint names, in another number format.

The server's numbers are checked against it, and MXFP4, which no CPU engine serves, is measured by
it. It is made of the reference's rounding and torch's float32 products only, so that it shares no
kernel with the server. Activations between the layers are bfloat16, as in the server.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from dialect_kernels import baselines, reference
from dialect_plugin.checkpoint.reader import PackedCheckpoint, open_packed

from ..rounded import RoundedLinear

__all__ = ["emulate_blockdialect", "emulate_mxfp4", "load_bf16"]


def load_bf16(model: Path) -> PreTrainedModel:
    """The model in bfloat16."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, local_files_only=True
    ).eval()


def emulate_blockdialect(model: Path, packed: Path) -> PreTrainedModel:
    """The model in W4A4: the packed checkpoint's weights, activations rounded per token.

    Args:
        model: directory of the 16-bit checkpoint.
        packed: directory that ``blockdialect quantize`` made of it.
    """
    checkpoint = open_packed(packed)

    def rounded(layer: torch.nn.Linear, name: str) -> RoundedLinear:
        p = checkpoint.read(name)
        rounding = partial(reference.round_activation, book=p.book, block_size=p.block_size)
        return RoundedLinear(p.dequantize(torch.float32), layer.bias, rounding)

    return _replace(load_bf16(model), checkpoint, rounded)


def emulate_mxfp4(model: Path, packed: Path) -> PreTrainedModel:
    """The model in W4A4 MXFP4-32, in the layers that `packed` names."""

    def rounded(layer: torch.nn.Linear, _: str) -> RoundedLinear:
        weight = baselines.quantize_mxfp4(layer.weight.detach())
        return RoundedLinear(weight, layer.bias, baselines.quantize_mxfp4)

    return _replace(load_bf16(model), open_packed(packed), rounded)


def _replace(
    model: PreTrainedModel,
    checkpoint: PackedCheckpoint,
    rounded: Callable[[torch.nn.Linear, str], RoundedLinear],
) -> PreTrainedModel:
    modules = dict(model.named_modules())
    for name in checkpoint.layers:
        layer = modules.get(name)
        if not isinstance(layer, torch.nn.Linear):
            raise ValueError(
                f"{checkpoint.checkpoint.path}: transformers has no linear layer {name} in this "
                "architecture, so it cannot be emulated; serve the model with make serve"
            )
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, rounded(layer, name))
    return model
