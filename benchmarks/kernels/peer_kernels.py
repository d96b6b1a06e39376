"""Other projects' kernels for 4-bit weights, where they are installed: peers of a comparison.

A peer is a function that takes a weight [N, K] (bfloat16, on the GPU) and returns a module that
multiplies tokens [T, K] with it, in the way that its own documentation recommends; a deep copy of
the module has a weight of its own. None of these
projects is a dependency; the result names each one that is missing or does not run on this device,
with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

__all__ = ["PEERS", "Peer"]

Peer: TypeAlias = Callable[[torch.Tensor], torch.nn.Module]


def _humming(weight: torch.Tensor, activation: str | None) -> torch.nn.Module:
    """`humming-kernels`: MXFP4 weights (E2M1, E8M0 scales of 32), compiled on the device."""
    from humming.layer import HummingLayer

    rows, columns = weight.shape
    layer = HummingLayer(
        shape_n=rows,
        shape_k=columns,
        weight_config={"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"},
        input_config={} if activation is None else {"dtype": activation},
        torch_dtype=weight.dtype,
    ).to(weight.device)
    layer.load_from_unquantized(weight)
    layer.transform()
    module: torch.nn.Module = layer
    return module


def _gemlite(weight: torch.Tensor, helper: str) -> torch.nn.Module:
    """`gemlite`: MXFP4 weights, Triton, tuned by itself on the first calls."""
    import gemlite.helper

    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    make = getattr(gemlite.helper, helper)(device=str(weight.device), dtype=weight.dtype)
    module: torch.nn.Module = make.from_linear(plain)
    return module


class _Marlin(torch.nn.Module):
    """vLLM's Marlin: MXFP4 weights, 16-bit activations. Random weights of the shape are as fast."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_fp4

        self.features, self.columns = weight.shape
        _, packed, scales = marlin_utils_fp4.rand_marlin_weight_mxfp4_like(weight, 32)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        workspace = marlin_utils.marlin_make_workspace_new(weight.device)
        self.register_buffer("workspace", workspace)
        self._multiply = marlin_utils_fp4.apply_fp4_marlin_linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._multiply(
            x, self.packed, self.scales, None, self.workspace, self.features, self.columns
        )
        return y


PEERS: dict[str, Peer] = {
    "Humming MXFP4 W4A16": lambda weight: _humming(weight, None),
    "Humming MXFP4 W4A8": lambda weight: _humming(weight, "float8e4m3"),
    "gemlite MXFP4 W4A16": lambda weight: _gemlite(weight, "A16W4_MXFP"),
    "gemlite MXFP4 W4A8": lambda weight: _gemlite(weight, "A8W4_MXFP_dynamic"),
    "Marlin MXFP4 W4A16": _Marlin,
}
