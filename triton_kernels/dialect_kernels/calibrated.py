"""Rounding a weight so that the layer's output changes little on calibration text: rule ``gptq``.

:mod:`~.gptq` holds the loop; here are the formats that it rounds to: dialects, whose blocks choose
exponent and dialect by rule ``mse``, and the formats that they are compared with. The rule chooses
bytes; the format, its readers and its kernels do not know of it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from .arguments import check_finite, check_matrix, check_quantize, check_rotates
from .arithmetic import block_exponents, blocks_of, flat_table, power_of_two, row_exponents
from .backend import BlockGrid
from .baselines import (
    mxfp4_scale,
    nvfp4_block_scale,
    nvfp4_tensor_scale,
    quantize_mxfp4,
    quantize_nvfp4,
    round_scaled,
)
from .formatbook import CELLS, DIALECT_FP4, Formatbook, Rotation
from .gptq import check_moments, feed_back_columns, round_in_order
from .ops import feed_back, quantize, quantize_counted
from .packed import PackedTensor, check_block_size, pack_codes
from .rotation import check_rotation, rotate_weight
from .second_moments import SecondMoments, UpperFactor, growing_dampings

__all__ = [
    "CalibratedValues",
    "CalibratedWeight",
    "quantize_calibrated",
    "quantize_calibrated_baseline",
    "quantize_factored",
]

_Baseline = Literal["mxfp4", "nvfp4"]

_ROWS = 2048
"""Rows that are rounded at a time: they are held twice in float32."""


class CalibratedWeight(NamedTuple):
    """A calibrated weight, and how firm its second moments were."""

    packed: PackedTensor
    damping: float | None
    """The damping that was used; None if no damping helped and rule ``mse`` was used instead."""


class CalibratedValues(NamedTuple):
    """A weight that was calibrated in a format to compare with."""

    values: torch.Tensor
    """float32 [N, K]; of the rotated weight, if it is rotated."""
    damping: float | None
    """The damping that was used; None if no damping helped and each value was rounded alone."""


def quantize_calibrated(
    w: torch.Tensor,
    A: torch.Tensor,
    book: Formatbook = DIALECT_FP4,
    block_size: int = 32,
    window: int | None = None,
    damping: float = 0.01,
    rotation: Rotation = "none",
    name: str = "tensor",
) -> CalibratedWeight:
    """Quantize a weight by rule ``gptq``.

    Args:
        w: float32, bfloat16 or float16 [N, K], K a multiple of `block_size`.
        A: float32 [K, K] on w's device: mean of ``x x.T`` over the tokens that the layer sees; of
            the rotated tokens (:func:`~.rotation.rotate_activation`) where the layer is rotated.
            Columns with 0 on its diagonal are rounded to nearest.
        book: the formatbook.
        block_size: 16, 32 or 64.
        window: as for :func:`dialect_kernels.quantize`.
        damping: share of the mean diagonal that is added to the diagonal, above 0, at most 1. Where
            `A` is not positive definite with it, ten times as much is tried, up to 1.
        rotation: of the weight, as for :func:`dialect_kernels.quantize`.
        name: what error messages call the weight.

    Returns:
        The packed weight, and the damping that was used.

    Raises:
        ValueError: if shape, dtype, block size, window, damping or rotation are not allowed, or `w`
            or `A` hold NaN or Inf.
    """
    window = check_quantize(w, book, block_size, "mse", window, name, rotation)
    check_moments(w, A, block_size, damping, name)
    for share in growing_dampings(damping):
        factor = SecondMoments.of(A).factor(share)
        packed = factor and _rounded(w, factor, book, block_size, window, rotation)
        if packed:
            return CalibratedWeight(packed, share)
    return CalibratedWeight(quantize(w, book, block_size, "mse", window, name, rotation), None)


def quantize_calibrated_baseline(
    w: torch.Tensor,
    A: torch.Tensor,
    format_name: _Baseline,
    block_size: int | None = None,
    damping: float = 0.01,
    rotation: Rotation = "none",
    name: str = "tensor",
) -> CalibratedValues:
    """Round a weight to MXFP4 or NVFP4 by rule ``gptq``, to compare with the same care.

    A block's scale is chosen as these formats do, from the weights as they have become; NVFP4's
    scale of the tensor is that of the weight before any rounding.

    Args:
        w: float32, bfloat16 or float16 [N, K], K a multiple of `block_size`.
        A: as for :func:`quantize_calibrated`.
        format_name: ``"mxfp4"`` or ``"nvfp4"``.
        block_size: default: 32 for MXFP4, 16 for NVFP4.
        damping: as for :func:`quantize_calibrated`.
        rotation: of the weight, as for :func:`dialect_kernels.quantize`.
        name: what error messages call the weight.

    Returns:
        The rounded values, and the damping that was used.

    Raises:
        ValueError: if shape, dtype, format, block size, damping or rotation are not allowed, or `w`
            or `A` hold NaN or Inf.
    """
    if format_name not in get_args(_Baseline):
        raise ValueError(f"format_name: {format_name!r}; allowed are 'mxfp4' and 'nvfp4'")
    block_size = block_size or (32 if format_name == "mxfp4" else 16)
    check_matrix(w, name)
    check_block_size(block_size)
    check_rotation(rotation, w.shape[1], name)
    check_finite(w, name)
    check_rotates(w, rotation, name)
    check_moments(w, A, block_size, damping, name)
    exact = rotate_weight(w, rotation).to(torch.float32)
    largest = exact.abs().amax() if exact.numel() else exact.new_zeros(())
    for share in growing_dampings(damping):
        factor = SecondMoments.of(A).factor(share)
        if factor is None:
            continue
        scale = None if format_name == "mxfp4" else nvfp4_tensor_scale(largest)
        rounder = _E2M1Rounder(exact, scale)
        if round_in_order(exact, factor, block_size, rounder):
            return CalibratedValues(rounder.values(), share)
    plain = quantize_mxfp4 if format_name == "mxfp4" else quantize_nvfp4
    return CalibratedValues(plain(exact, block_size), None)


def quantize_factored(
    w: torch.Tensor,
    factor: UpperFactor,
    book: Formatbook = DIALECT_FP4,
    block_size: int = 32,
    rotation: Rotation = "none",
    name: str = "tensor",
) -> PackedTensor | None:
    """As :func:`quantize_calibrated`, with a factor that serves several weights.

    Args:
        factor: U of the second moments, from :meth:`~.second_moments.SecondMoments.factor`.

    Returns:
        None if the errors overflowed on their way to the right.
    """
    window = check_quantize(w, book, block_size, "mse", None, name, rotation)
    return _rounded(w, factor, book, block_size, window, rotation)


def _rounded(
    w: torch.Tensor,
    factor: UpperFactor,
    book: Formatbook,
    block_size: int,
    window: int,
    rotation: Rotation,
) -> PackedTensor | None:
    """A weight by rule ``gptq``, some rows at a time; None if errors overflowed."""
    parts = []
    for start in range(0, max(1, len(w)), _ROWS):
        exact = rotate_weight(w[start : start + _ROWS], rotation).to(torch.float32)
        rounder = _DialectRounder(exact, book, block_size, window)
        if not round_in_order(exact, factor, block_size, rounder):
            return None
        parts.append(rounder.packed())
    codes, meta, row_exponent = map(torch.cat, zip(*(p.tensors for p in parts), strict=True))
    shape = (w.shape[0], w.shape[1])
    return PackedTensor(codes, meta, row_exponent, shape, book, block_size, rotation)


class _DialectRounder:
    """Rounds to a formatbook; :class:`~.gptq.BlockRounder`.

    Args:
        w: the weight before anything is rounded, float32 [N, K]: its rows' exponents are kept.
    """

    def __init__(self, w: torch.Tensor, book: Formatbook, block_size: int, window: int) -> None:
        self._book, self._block_size, self._window = book, block_size, window
        self._shape = (w.shape[0], w.shape[1])
        self._row_exponent = row_exponents(
            block_exponents(blocks_of(w, block_size).abs().amax(dim=-1))
        )
        self._codes: list[torch.Tensor] = []
        self._meta: list[torch.Tensor] = []

    def round(self, block: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor) -> None:
        book = self._book
        grid, meta = _choose_grid(block, self._row_exponent, book, self._window)
        self._codes.append(feed_back(block, factor, grid, book, errors))
        self._meta.append(meta[:, None])

    def packed(self) -> PackedTensor:
        """All blocks, after the last one."""
        rows, columns = self._shape
        empty = self._row_exponent.new_empty(rows, 0, dtype=torch.uint8)
        codes = torch.cat([empty.T, *self._codes])
        return PackedTensor(
            pack_codes(codes.T),
            torch.cat([empty, *self._meta], dim=1),
            self._row_exponent.to(torch.int8),
            (rows, columns),
            self._book,
            self._block_size,
        )


class _E2M1Rounder:
    """Rounds to MXFP4, or to NVFP4 where a scale of the tensor is given."""

    def __init__(self, w: torch.Tensor, tensor_scale: torch.Tensor | None) -> None:
        self._tensor_scale = tensor_scale
        self._values = [w.new_empty(0, len(w))]

    def round(self, block: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor) -> None:
        largest = block.abs().amax(dim=0)
        if self._tensor_scale is None:
            scale = mxfp4_scale(largest)
        else:
            scale = nvfp4_block_scale(largest, self._tensor_scale)
        feed_back_columns(block, factor, errors, lambda x: round_scaled(x, scale))
        self._values.append(round_scaled(block, scale))

    def values(self) -> torch.Tensor:
        """All blocks, after the last one, float32 [N, K]."""
        return torch.cat(self._values).T.contiguous()


def _choose_grid(
    block: torch.Tensor, row_exponent: torch.Tensor, book: Formatbook, window: int
) -> tuple[BlockGrid, torch.Tensor]:
    """The grids of a block [B, N] by rule ``mse``, below given row exponents [N]; its meta bytes.

    The quantizer takes the row's exponent from a second block, which holds ``2**(R + 2)``.
    """
    block_size, rows = block.shape
    pair = torch.zeros(rows, 2 * block_size, device=block.device)
    pair[:, :block_size] = block.T
    pair[:, block_size] = power_of_two(row_exponent + 2)
    packed = quantize_counted(pair, book, block_size, "mse", window, finite=True).packed
    zero = (packed.codes[:, : block_size // 2] == 0).all(dim=1)
    dialect = packed.ids()[:, 0].to(torch.int32)
    delta = packed.deltas()[:, 0].to(torch.int32)
    above = packed.row_exponent.to(torch.int32) > row_exponent
    if bool(above.any()):
        delta = delta.masked_fill(above, 0)
        dialect[above] = _saturated_dialects(block[:, above], row_exponent[above], book)
    effective = row_exponent - delta
    unit = power_of_two(effective - 1).masked_fill(zero, 0)
    meta = torch.where(zero, 0, (delta << book.id_bits) | dialect).to(torch.uint8)
    return BlockGrid(dialect, power_of_two(2 - effective), unit), meta


def _saturated_dialects(
    block: torch.Tensor, exponent: torch.Tensor, book: Formatbook
) -> torch.Tensor:
    """Rule ``mse`` for blocks [B, n] that are larger than their exponents [n] allow, int32 [n]."""
    quarters = (block.abs() * power_of_two(2 - exponent)).T  # [n, B]
    cell = quarters.clamp(max=CELLS - 1).to(torch.int64)
    rounded = flat_table(book, "rounded_half_units", torch.float64, block.device).view(-1, CELLS)
    half_units = rounded[:, cell]  # [dialects, n, B]
    cost = (half_units * (half_units - quarters.to(torch.float64))).sum(dim=-1)
    return cost.argmin(dim=0).to(torch.int32)
