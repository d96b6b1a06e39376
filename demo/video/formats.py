"""The number formats that the small video model is run in.

BlockDialect and SemanticDialect run through `enable_semantic_dialect`. Others have no layers of
their own here: they are emulated in the very same linear layers, by rounding both operands and
multiplying in float32. What stays in FP8 or 16 bit is the same in every 4-bit format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

import diffusers_hook
from dialect_kernels.baselines import quantize_fp8, quantize_mxfp4, quantize_nvfp4
from diffusers_hook.layers.dialect import DialectLinear

from ..rounded import RoundedLinear, Rounding
from .pipeline import MODEL, MovingShapesPipeline

__all__ = ["FP8", "MXFP4", "NVFP4", "PLAIN", "Emulated", "Format", "load", "transformer_bytes"]


@dataclass(frozen=True)
class Emulated:
    """A format that only rounds.

    Attributes:
        rounding: of weights, and of activations unless they stay as they are.
        bits: stored bits of a weight matrix [N, K].
    """

    rounding: Rounding
    bits: Callable[[int, int], float]


@dataclass(frozen=True)
class Format:
    """How a pipeline is run.

    Attributes:
        options: of `enable_semantic_dialect`; None leaves the pipeline in 16 bit.
        emulated: what takes the place of the dialects; None: nothing.
    """

    options: Mapping[str, Any] | None = field(default_factory=dict)
    emulated: Emulated | None = None


def _fp8(x: torch.Tensor) -> torch.Tensor:
    rounded, scale = quantize_fp8(x)
    return rounded.float() * scale[:, None]


FP8 = Emulated(_fp8, lambda rows, columns: 8 * rows * columns + 32 * rows)
"""E4M3 with a float32 scale per row or token."""

MXFP4 = Emulated(quantize_mxfp4, lambda rows, columns: 4.25 * rows * columns)
"""Blocks of 32 with an E8M0 byte each."""

NVFP4 = Emulated(quantize_nvfp4, lambda rows, columns: 4.5 * rows * columns + 32)
"""Blocks of 16 with an E4M3 byte each, and a float32 for the tensor; activations: for all tokens of
a call."""

PLAIN: Mapping[str, Any] = {"salient_fraction": 0.0, "seda": False, "protected_steps": "none"}
"""Dialects alone: no decomposed tokens, no groups, no protected steps."""


def load(format: Format, model: Path = MODEL, device: str = "cpu") -> MovingShapesPipeline:
    """The pipeline of the small video model in bfloat16, put into a format, without output."""
    logging.disable_progress_bar()
    pipe = MovingShapesPipeline.from_pretrained(model, dtype=torch.bfloat16).to(device)
    if format.options is None:
        return pipe
    weights = {  # enabling lets go of them
        name: layer.weight.detach().clone()
        for name, layer in pipe.transformer.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    diffusers_hook.enable(pipe, progress=False, **format.options)
    if format.emulated is not None:
        for name, layer in list(pipe.transformer.named_modules()):
            if isinstance(layer, DialectLinear):
                _put_emulated(pipe.transformer, name, weights[name], format.emulated.rounding)
    return pipe


def _put_emulated(
    transformer: torch.nn.Module, name: str, weight: torch.Tensor, rounding: Rounding
) -> None:
    layer = transformer.get_submodule(name)
    assert isinstance(layer, DialectLinear)
    of_activations = torch.Tensor.float if layer.activation_format == "none" else rounding
    parent, _, leaf = name.rpartition(".")
    emulated = RoundedLinear(rounding(weight), layer.bias, of_activations)
    setattr(transformer.get_submodule(parent), leaf, emulated)


def transformer_bytes(pipe: MovingShapesPipeline, format: Format) -> int:
    """Bytes of the transformer's weights in memory; for an emulated format what it would store."""
    total = 0.0
    for module in pipe.transformer.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, RoundedLinear):
            assert format.emulated is not None
            total += format.emulated.bits(*module.weight.shape) / 8
            tensors = [] if module.bias is None else [module.bias.bfloat16()]
        total += sum(tensor.nbytes for tensor in tensors)
    return round(total)
