"""The CPU back end: a kernel in C++ that quantizes, decodes and multiplies.

Results are those of :mod:`dialect_kernels.reference`, bit for bit, whatever the processor, the
batch and the number of threads; only products of many tokens in the mode ``default`` are added up
in another order. Where there is no compiled library, :func:`runs_on` is false.
"""

from __future__ import annotations

import torch

from ..backend import BlockGrid, Decoded, Quantized, Weights, with_residuals
from ..formatbook import Formatbook, Rotation
from ..packed import PackedTensor
from ..packed_experts import PackedExperts
from ..reference import group_variants
from . import calls
from .library import INSTRUCTIONS, available, describe, features, why_not

__all__ = [
    "INSTRUCTIONS",
    "available",
    "covers",
    "dequantize",
    "describe",
    "dialect_linear",
    "embedding",
    "features",
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
    "why_not",
]


def runs_on(device: torch.device) -> bool:
    """Whether `device` is the CPU and the compiled library is there."""
    return device.type == "cpu" and available()


def covers(x: torch.Tensor, p: PackedTensor, activation_format: str, accumulation: str) -> bool:
    """The kernel computes every product."""
    return x.device.type == "cpu" and available()


def quantize(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int,
    rotation: Rotation,
) -> PackedTensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    return quantize_counted(x, book, block_size, rule, window, rotation).packed


def quantize_counted(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int,
    rotation: Rotation,
) -> Quantized:
    """See :class:`~dialect_kernels.backend.Backend`; the kernel counts while it quantizes."""
    return calls.quantize(x, book, block_size, rule, window, rotation)


def dequantize(p: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    return calls.dequantize(p).to(dtype)


def embedding(ids: torch.Tensor, p: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    return calls.embedding(ids, p, dtype)


def rounding_loss(x: torch.Tensor, p: PackedTensor) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    return calls.rounding_loss(x, p)


def feed_back(
    block: torch.Tensor,
    factor: torch.Tensor,
    grid: BlockGrid,
    book: Formatbook,
    errors: torch.Tensor,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`; weight by weight."""
    codes = torch.empty(block.shape, dtype=torch.uint8, device="cpu")
    rows = block.shape[2]
    for number, own in enumerate(block):
        own_grid = BlockGrid(*(part[number * rows : (number + 1) * rows] for part in grid))
        codes[number] = calls.feed_back(own, factor[number], own_grid, book, errors[number])
    return codes


def dialect_linear(
    tokens: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
    decoded: Decoded | None = None,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    return calls.linear(tokens, p, bias, activation_format, accumulation)


def grouped_linear(
    tokens: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    experts: PackedExperts,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`; all experts in one call."""
    return calls.grouped_linear(
        tokens, rows, offsets, experts, bias, activation_format, accumulation
    )


def semantic_linear(
    tokens: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    y, named = _decomposed(tokens, p, salient, group)
    return with_residuals(y, named, bias, tokens.dtype)


def linears(
    tokens: torch.Tensor,
    weights: Weights,
    activation_format: str,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
) -> list[torch.Tensor]:
    """See :class:`~dialect_kernels.backend.Backend`; one call, with copies of all weights' rows.

    The kernel rounds tokens inside its products. Copying packed rows takes about a hundredth of
    what it takes to multiply with them, rounding tokens once more a quarter to a half.
    """
    together = PackedTensor.concatenated([p for p, _ in weights])
    features = [p.shape[0] for p, _ in weights]
    if salient is None and group is None:
        biases = [bias for _, bias in weights if bias is not None]
        bias = torch.cat(biases) if biases else None
        y = calls.linear(tokens, together, bias, activation_format, "default")
        return [part.contiguous() for part in torch.split(y, features, dim=1)]
    y, named = _decomposed(tokens, together, salient, group)
    return [
        with_residuals(part, named, bias, tokens.dtype).contiguous()
        for part, (_, bias) in zip(torch.split(y, features, dim=1), weights, strict=True)
    ]


def _decomposed(
    tokens: torch.Tensor,
    p: PackedTensor,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of tokens and of residuals, float32 [T + S, N], and the S tokens of the latter."""
    named = tokens.new_empty(0, dtype=torch.int64) if salient is None else salient[salient >= 0]
    variants = None
    if group is not None:
        costs = calls.variant_costs(tokens, p.book, p.block_size, p.rotation)
        variants = group_variants(costs, group)
    return calls.decomposed_linear(tokens, p, variants, named), named


def warm_up(
    p: PackedTensor,
    activation_format: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    decoded: Decoded | None = None,
) -> None:
    """The kernel was compiled before."""


def warm_up_experts(
    experts: PackedExperts,
    activation_format: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    """Nothing is compiled."""
