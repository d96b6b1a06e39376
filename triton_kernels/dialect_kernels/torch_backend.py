"""The back end of plain torch, for any device: exact operands, the library's float32 GEMM.

Weights are decoded in every call: a decoded copy kept beside the packed weight could not see that
an engine has written other weights into the same memory.
"""

from __future__ import annotations

import logging
from functools import cache, partial

import torch
import torch.nn.functional as F

from . import reference
from .backend import BlockGrid, Decoded, Quantized, Weights, expert_by_expert, with_residuals
from .baselines import quantize_fp8
from .formatbook import Formatbook, Rotation
from .packed import PackedTensor
from .packed_experts import PackedExperts
from .rotation import rotate_activation, rotate_weight

__all__ = [
    "covers",
    "dequantize",
    "dialect_linear",
    "embedding",
    "feed_back",
    "grouped_linear",
    "linears",
    "quantize",
    "quantize_counted",
    "rounding_loss",
    "runs_on",
    "semantic_linear",
    "warm_up",
    "warm_up_experts",
]

_log = logging.getLogger(__name__)


def runs_on(device: torch.device) -> bool:
    """Torch runs everywhere."""
    return True


def covers(x: torch.Tensor, p: PackedTensor, activation_format: str, accumulation: str) -> bool:
    """Torch computes every product."""
    return True


def quantize(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int,
    rotation: Rotation,
) -> PackedTensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    return reference.pack_rounded(x, book, block_size, rule, window, rotation)


def quantize_counted(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int,
    rotation: Rotation,
) -> Quantized:
    """See :class:`~dialect_kernels.backend.Backend`."""
    packed = quantize(x, book, block_size, rule, window, rotation)
    rounded = rotate_weight(x, rotation)
    return Quantized(packed, reference.blocks_below_window(rounded, block_size, window))


def dequantize(p: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    return p.dequantize(dtype)


def embedding(ids: torch.Tensor, p: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    codes, meta, row_exponent = (tensor.index_select(0, ids) for tensor in p.tensors)
    shape = (ids.shape[0], p.shape[1])
    return PackedTensor(codes, meta, row_exponent, shape, p.book, p.block_size).dequantize(dtype)


def rounding_loss(x: torch.Tensor, p: PackedTensor) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    return reference.rounding_loss(x, p)


def feed_back(
    block: torch.Tensor,
    factor: torch.Tensor,
    grid: BlockGrid,
    book: Formatbook,
    errors: torch.Tensor,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`; torch computes it."""
    return reference.feed_back(block, factor, grid, book, errors)


def dialect_linear(
    tokens: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
    decoded: Decoded | None = None,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    if accumulation == "exact":
        return reference.dialect_linear(tokens, p, bias, activation_format, accumulation)
    _warn_once(
        "no compiled kernel for this product: weights are decoded in every call, which is slow"
    )
    weight = p.dequantize(torch.float32)
    x = rotate_activation(tokens, p.rotation)
    if activation_format == "dialect":
        y = F.linear(reference.round_activation(x, p.book, p.block_size), weight)
    elif activation_format == "fp8":
        q, scale = quantize_fp8(x)
        # the scale goes first: tiny activations times huge weights must not overflow on the way
        y = F.linear(q.to(torch.float32) * scale[:, None], weight)
    else:
        y = F.linear(x.to(tokens.dtype).to(torch.float32), weight)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(tokens.dtype)


def grouped_linear(
    tokens: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    experts: PackedExperts,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`; expert by expert."""
    multiply = partial(
        dialect_linear, activation_format=activation_format, accumulation=accumulation
    )
    return expert_by_expert(multiply, tokens, rows, offsets, experts, bias)


def semantic_linear(
    tokens: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    named = tokens.new_empty(0, dtype=torch.int64) if salient is None else salient[salient >= 0]
    x = rotate_activation(tokens, p.rotation)
    rounded = reference.round_activation(x, p.book, p.block_size, group)
    residual = x[named].to(torch.float32) - rounded[named]
    residual = reference.round_activation(residual, p.book, p.block_size)
    y = F.linear(torch.cat([rounded, residual]), p.dequantize(torch.float32))
    return with_residuals(y, named, bias, tokens.dtype)


def linears(
    tokens: torch.Tensor,
    weights: Weights,
    activation_format: str,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
) -> list[torch.Tensor]:
    """See :class:`~dialect_kernels.backend.Backend`; weight by weight."""
    if salient is None and group is None:
        return [dialect_linear(tokens, p, b, activation_format, "default") for p, b in weights]
    return [semantic_linear(tokens, p, b, salient, group) for p, b in weights]


def warm_up(
    p: PackedTensor,
    activation_format: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    decoded: Decoded | None = None,
) -> None:
    """Torch compiles nothing."""


def warm_up_experts(
    experts: PackedExperts,
    activation_format: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    """Nothing is compiled."""


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)
