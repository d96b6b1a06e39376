"""Emulation in transformers: the layers a packed checkpoint names, in another number format.

The server's numbers are checked against it, and MXFP4, which no CPU engine serves, is measured by
it. It shares no model code with the server. Its BlockDialect layers run the product that the server
runs, so that a real model does not take hours; `LayerCheck` therefore compares a sample of their
outputs with the reference. Activations between the layers are bfloat16, as in the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from dialect_kernels import baselines, reference
from dialect_plugin.checkpoint.reader import PackedCheckpoint, open_packed
from dialect_plugin.scheme import ActivationFormat
from dialect_plugin.transformers import DialectLinear

from ..rounded import RoundedLinear

__all__ = ["LayerCheck", "emulate_blockdialect", "emulate_mxfp4", "load_bf16"]

_SAMPLED_TOKENS = 4


def load_bf16(model: Path) -> PreTrainedModel:
    """The model in bfloat16."""
    return _load(model, torch.bfloat16)


def emulate_blockdialect(
    model: Path,
    packed: Path,
    activation_format: ActivationFormat = "dialect",
    dtype: torch.dtype = torch.bfloat16,
) -> PreTrainedModel:
    """The model with the packed checkpoint's weights in the product that a server uses.

    Args:
        model: directory of the 16-bit checkpoint.
        packed: directory that ``blockdialect quantize`` made of it.
        activation_format: ``"dialect"`` (W4A4), ``"fp8"`` (W4A8) or ``"none"`` (W4A16).
        dtype: of everything that is not packed, and of the activations between the layers.
    """
    checkpoint = open_packed(packed)

    def packed_layer(layer: torch.nn.Linear, name: str) -> DialectLinear:
        form = checkpoint.scheme.layer(name)._replace(activation_format=activation_format)
        weight = checkpoint.read(name)
        # LayerCheck compares its bits; the server adds many tokens' products in another order
        return DialectLinear(weight, layer.bias, form, "exact", layer.weight.dtype)

    return _replace(_load(model, dtype), checkpoint, packed_layer)


def emulate_mxfp4(model: Path, packed: Path) -> PreTrainedModel:
    """The model in W4A4 MXFP4-32, in the layers that `packed` names."""

    def rounded(layer: torch.nn.Linear, _: str) -> RoundedLinear:
        weight = baselines.quantize_mxfp4(layer.weight.detach())
        return RoundedLinear(weight, layer.bias, baselines.quantize_mxfp4)

    return _replace(load_bf16(model), open_packed(packed), rounded)


class LayerCheck:
    """Compares the BlockDialect layers of an emulation with the reference, on real activations.

    When a layer runs for the first time after `watching` began, its outputs for four tokens are
    computed again by :func:`dialect_kernels.reference.dialect_linear`. The bits must be equal.

    Attributes:
        compared: how many layers were compared.
        unequal: names of the layers whose outputs differ.
    """

    def __init__(self) -> None:
        self.compared = 0
        self.unequal: list[str] = []

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Compare the layers of `model` that run inside the ``with`` block, each once."""
        hooks = []
        for name, layer in model.named_modules():
            if isinstance(layer, DialectLinear):
                hooks.append(layer.register_forward_hook(self._comparison(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _comparison(self, name: str) -> Callable[..., None]:
        seen = False

        def compare(layer: DialectLinear, inputs: tuple[Any, ...], y: torch.Tensor) -> None:
            nonlocal seen
            if seen:
                return
            seen = True
            x = inputs[0].flatten(0, -2)
            # the first token is among them: real models give it activations like no other's
            sample = torch.linspace(0, len(x) - 1, min(_SAMPLED_TOKENS, len(x))).long()
            expected = reference.dialect_linear(
                x[sample], layer.packed, layer.bias, layer.format.activation_format
            )
            self.compared += 1
            if not torch.equal(y.flatten(0, -2)[sample], expected):
                self.unequal.append(name)

        return compare


def _load(model: Path, dtype: torch.dtype) -> PreTrainedModel:
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).eval()


def _replace(
    model: PreTrainedModel,
    checkpoint: PackedCheckpoint,
    replacement: Callable[[torch.nn.Linear, str], torch.nn.Module],
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
        setattr(modules[parent], leaf, replacement(layer, name))
    return model
