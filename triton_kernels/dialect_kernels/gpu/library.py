"""Products of many tokens: the weight is decoded to memory, and the library's GEMM multiplies.

    q [T + S, Kp], scale [T + S], packed w [N, K]  ->  decode  ->  GEMM  ->  y [T, N]

Features are computed part by part where that saves time or memory: a part of the weight that fits
into the GPU's cache is multiplied before it ever leaves for memory, and results in float32 take
little room. The S last rows are residuals of S of the T tokens; both are added before the one
rounding. A weight that was decoded before (:class:`~dialect_kernels.backend.Decoded`) is not
decoded again. (Ours.)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..backend import Decoded
from ..packed import PackedTensor
from .decode import decode_bf16, decode_e4m3

__all__ = ["Library", "added_residuals", "decode_weight", "library_product"]

_CACHED_TOKENS = 1024
"""With more tokens a product takes so long that reading the weight from memory does not count."""
_SMALL_CACHE = 32 << 20
"""Bytes of a cache that is too small to hold a part of the weight worth a product of its own."""
_LARGEST_RESULT = 256 << 20
"""Bytes of a product in float32 before it is rounded."""
_FEATURES = 256
"""Parts are multiples of it: of the library's tiles, and of the rows a decoding program writes."""
_CONTRACT_BITS = 8
"""A sum may be 2**-7 of its terms' magnitudes away; half of that is left to its rounding."""
_MMA_COLUMNS = 32
"""Products that an FP8 MMA adds at a time."""


class Library(NamedTuple):
    """What decides how the library multiplies.

    Attributes:
        eight_bits: operands are E4M3 with scales; else 16-bit numbers.
        cache: bytes of the GPU's L2 cache.
        accumulator_bits: fraction bits that its FP8 MMA keeps of a sum from one step to the next,
            or None if nobody has measured them.
    """

    eight_bits: bool
    cache: int = 0
    accumulator_bits: int | None = None


def library_product(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    p: PackedTensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    how: Library,
    salient: torch.Tensor | None = None,
    decoded: Decoded | None = None,
) -> torch.Tensor:
    """``(x * scale) @ p.T + bias``, residuals added to their tokens.

    Args:
        x: operands of T tokens and of S residuals, as :class:`Library` says.
        scale: float32 [T + S], or None for 16-bit tokens.
        p: packed weight [N, K].
        bias: [N] or None.
        dtype: of the result.
        how: see :class:`Library`.
        salient: int64 [S], the token of each residual, each once, -1 for an unused place.
        decoded: from :func:`decode_weight`; None decodes now, in parts that the cache holds.

    Returns:
        [T, N] contiguous, rounded once where the library's GEMM returns float32.
    """
    count = x.shape[0] - (0 if salient is None else salient.shape[0])
    parts = list(_parts(x.shape[0], p, dtype, how, decoded is not None))
    if len(parts) == 1:
        weight = decoded or decode_weight(p, how.eight_bits)
        return _part(x, scale, p.shape, weight, bias, dtype, how, salient).contiguous()
    y = torch.empty(count, p.shape[0], dtype=dtype, device=x.device)
    for first, last in parts:
        added = None if bias is None else bias[first:last]
        if decoded is None:
            weight = decode_weight(p.slice_rows(first, last), how.eight_bits)
        else:
            weight = decoded.rows(first, last)
        shape = last - first, p.shape[1]
        y[:, first:last] = _part(x, scale, shape, weight, added, dtype, how, salient)
    return y


def decode_weight(p: PackedTensor, eight_bits: bool, into: Decoded | None = None) -> Decoded:
    """The operand that :func:`library_product` makes of a weight.

    Args:
        p: packed weight [N, K].
        eight_bits: E4M3, columns in the order of operands; else bfloat16.
        into: an earlier result for a weight of this shape, whose memory is written again.
    """
    if eight_bits:
        memory = None if into is None or into.scale is None else (into.weight, into.scale)
        return Decoded(*decode_e4m3(p, memory))
    return Decoded(decode_bf16(p, None if into is None else into.weight), None)


def added_residuals(y: torch.Tensor, salient: torch.Tensor | None) -> torch.Tensor:
    """The first T of T + S rows, to which the others have been added; no row twice.

    Args:
        y: float32 [T + S, N]; written to.
        salient: int64 [S], the row that each of the last S belongs to, or -1.
    """
    if salient is None:
        return y
    count = y.shape[0] - salient.shape[0]
    place = torch.arange(salient.shape[0], device=y.device).clamp(max=max(0, count - 1))
    # residuals of unused places are zeros: they may go anywhere, but not all to the same row
    y[:count].index_add_(0, torch.where(salient < 0, place, salient), y[count:])
    return y[:count]


def _parts(
    rows: int, p: PackedTensor, dtype: torch.dtype, how: Library, decoded: bool = False
) -> Iterator[tuple[int, int]]:
    """Ranges of features that are computed one after the other."""
    features, columns = p.shape[0], p.codes.shape[1] * 2
    count = 1
    if not decoded and rows <= _CACHED_TOKENS and how.cache >= _SMALL_CACHE:
        weight = features * columns * (1 if how.eight_bits else 2)
        count = -(-weight // (how.cache * 7 // 16))
    if dtype != torch.bfloat16:
        count = max(count, -(-4 * rows * features // _LARGEST_RESULT))
    step = -(-features // (count * _FEATURES)) * _FEATURES
    for first in range(0, features, step):
        yield first, min(features, first + step)


def _part(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shape: tuple[int, int],
    decoded: Decoded,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    how: Library,
    salient: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`library_product`, in one product with a weight of `shape` [N, K]; any strides."""
    features, columns = shape
    weight, weight_scale = decoded
    if weight_scale is None:
        y = F.linear(x[:, :columns], weight[:features, :columns])
        y = y if scale is None else y.float() * scale[:, None]
    else:
        assert scale is not None, "8-bit tokens have scales"
        fused = bias is not None and bias.dtype == dtype == torch.bfloat16
        fused = fused and len(weight) == features and salient is None
        rounds_later = salient is not None or dtype != torch.bfloat16 or bias is not None
        wide = rounds_later and not fused and _returns_float32(x.device)
        y = _scaled_product(
            x,
            scale,
            weight,
            weight_scale,
            bias if fused else None,
            torch.float32 if wide else torch.bfloat16,
            _accumulates_fast(x.shape[1], how.accumulator_bits),
        )[:, :features]
        bias = None if fused else bias
    if salient is not None:
        y = added_residuals(y.to(torch.float32), salient)
    if bias is not None:
        y = y.to(torch.float32) + bias.to(torch.float32)
    return y.to(dtype)


def _accumulates_fast(columns: int, bits: int | None) -> bool:
    """Whether the MMA's own accumulator keeps sums of so many products within the contract.

    In each step the accumulator and 32 products are cut off at the same bit below the largest.
    """
    if bits is None:
        return False
    steps = -(-columns // _MMA_COLUMNS)
    return steps * (_MMA_COLUMNS + 1) <= 1 << max(0, bits - _CONTRACT_BITS)


def _scaled_product(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
    fast: bool = False,
) -> torch.Tensor:
    """The library's FP8 GEMM.

    Args:
        x: float8_e4m3fn [T, Kp], Kp a multiple of 16.
        scale: float32 [T].
        weight: float8_e4m3fn [Np, Kp], Np a multiple of 16.
        weight_scale: float32 [Np].
        bias: bfloat16 [Np] or None.
        dtype: of the result: bfloat16, or float32 where :func:`_returns_float32`.
        fast: leave sums in the MMA's accumulator instead of adding steps in float32.

    Returns:
        `dtype` [T, Np].
    """
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=scale.unsqueeze(1),
        scale_b=weight_scale.unsqueeze(0),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=fast,
    )


@cache
def _returns_float32(device: torch.device) -> bool:
    """Whether the library's FP8 GEMM with scales of rows can return float32; it is tried once."""
    ones = torch.ones(16, 16, dtype=torch.float32, device=device)
    operand, scale = ones.to(torch.float8_e4m3fn), ones[0].contiguous()
    try:
        y = _scaled_product(operand, scale, operand, scale, None, torch.float32)
    except (RuntimeError, ValueError):  # all of torch's errors of this kind
        return False
    return y.dtype == torch.float32
