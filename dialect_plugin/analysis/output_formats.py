"""The formats whose errors of outputs are measured: how each rounds weights, and tokens.

Weights are rounded as a calibrated conversion rounds them (rule ``gptq``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from dialect_kernels import PackedTensor, quantize
from dialect_kernels.baselines import quantize_mxfp4, quantize_nvfp4
from dialect_kernels.calibrated import quantize_calibrated_baseline, quantize_factored
from dialect_kernels.formatbook import BLOCK_SIZES, Formatbook, Rotation
from dialect_kernels.ops import dequantize, quantize_counted
from dialect_kernels.reference import round_activation
from dialect_kernels.rotation import rotate_weight
from dialect_kernels.second_moments import UpperFactor

from .report import dialect_bits, dialect_name

__all__ = ["Moments", "OutputFormat", "Stored", "dialect_formats", "output_formats"]

Stored = PackedTensor | torch.Tensor
"""Rounded rows of a weight."""


@dataclass(frozen=True)
class OutputFormat:
    """A format of weights, and of the activations that are rounded like them.

    Attributes:
        name: what tables call it.
        columns: the multiple of columns that it needs.
        bits: (rows, columns) -> stored bits per weight, scales included.
        weights: (rows of some layers with one input, its second moments or None without enough
            tokens, rotation) -> the rounded rows of each.
        tokens: (tokens, rotated if the layer is) -> the rounded tokens, float32.
        needs_mean: whether `weights` needs the moments themselves and not only their factor.
        rotation: of the layers in this format; None for each layer's own.
    """

    name: str
    columns: int
    bits: Callable[[int, int], float]
    weights: Callable[[Sequence[torch.Tensor], Moments | None, Rotation], list[Stored]]
    tokens: Callable[[torch.Tensor], torch.Tensor]
    needs_mean: bool = False
    rotation: Rotation | None = None


def dialect_formats(
    book: Formatbook, rotation: Rotation | None = None, suffix: str = ""
) -> tuple[OutputFormat, ...]:
    """BlockDialect in every block size.

    Args:
        book: the formatbook.
        rotation: of the layers; None for each layer's own.
        suffix: ends the formats' names.
    """
    return tuple(
        OutputFormat(
            f"{dialect_name(block_size)}{suffix}",
            block_size,
            partial(dialect_bits, block_size=block_size),
            partial(_dialect_rows, book, block_size),
            partial(_round_tokens, book=book, block_size=block_size),
            rotation=rotation,
        )
        for block_size in BLOCK_SIZES
    )


def output_formats(book: Formatbook, *, peers: bool = False) -> tuple[OutputFormat, ...]:
    """BlockDialect in every block size and, with `peers`, MXFP4 and NVFP4."""
    own = dialect_formats(book)
    if not peers:
        return own
    mxfp4 = OutputFormat(
        "MXFP4-32",
        32,
        lambda rows, columns: 4 + 8 / 32,
        partial(_baseline_rows, "mxfp4"),
        quantize_mxfp4,
        needs_mean=True,
    )
    nvfp4 = OutputFormat(
        "NVFP4-16",
        16,
        lambda rows, columns: 4 + 8 / 16,
        partial(_baseline_rows, "nvfp4"),
        quantize_nvfp4,
        needs_mean=True,
    )
    return (*own, mxfp4, nvfp4)


@dataclass(frozen=True)
class Moments:
    """Second moments of the input that some layers share.

    Attributes:
        factor: as rule ``gptq`` uses it.
        mean: the mean of ``x x.T``; None where no format needs it.
        damping: the least damping.
    """

    factor: UpperFactor
    mean: torch.Tensor | None
    damping: float


def _dialect_rows(
    book: Formatbook,
    block_size: int,
    rows: Sequence[torch.Tensor],
    moments: Moments | None,
    rotation: Rotation,
) -> list[Stored]:
    """Rows are rounded each for itself, so those of all layers are rounded as one matrix."""
    whole = torch.cat(list(rows))
    packed = None
    if moments is not None:
        packed = quantize_factored(whole, moments.factor, book, block_size, rotation)
    if packed is None:
        packed = quantize(whole, book, block_size, rotation=rotation)
    parts: list[Stored] = []
    first = 0
    for part in rows:
        parts.append(packed.slice_rows(first, first + len(part)).to("cpu"))
        first += len(part)
    return parts


def _round_tokens(x: torch.Tensor, book: Formatbook, block_size: int) -> torch.Tensor:
    """As ``reference.round_activation``, by the quantizer of weights, which is faster.

    Their exponents reach less far below the largest one; the few tokens that need more are rounded
    by the reference.
    """
    packed, below = quantize_counted(x, book, block_size, book.online_rule, finite=True)
    values = dequantize(packed)
    far = below > 0
    if bool(far.any()):
        values[far] = round_activation(x[far], book, block_size)
    return values


def _baseline_rows(
    name: Literal["mxfp4", "nvfp4"],
    rows: Sequence[torch.Tensor],
    moments: Moments | None,
    rotation: Rotation,
) -> list[Stored]:
    plain = quantize_mxfp4 if name == "mxfp4" else quantize_nvfp4
    return [
        plain(rotate_weight(part, rotation)).cpu()
        if moments is None or moments.mean is None
        else quantize_calibrated_baseline(
            part, moments.mean, name, damping=moments.damping, rotation=rotation
        ).values.cpu()
        for part in rows
    ]
