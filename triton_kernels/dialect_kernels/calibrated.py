"""Rounding a weight so that the layer's output changes little on calibration text: rule ``gptq``.

:mod:`~.gptq` holds the loop; here are the formats that it rounds to: dialects, whose blocks choose
exponent and dialect by rule ``mse``, and the formats that they are compared with. The rule chooses
bytes; the format, its readers and its kernels do not know of it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    "numbers_together",
    "quantize_calibrated",
    "quantize_calibrated_baseline",
    "quantize_factored",
    "quantize_factored_alike",
]

_Baseline = Literal["mxfp4", "nvfp4"]

_ROWS = 2048
"""Rows of a weight that are rounded at a time: they are held twice in float32."""
_TOGETHER = 1 << 26
"""Numbers of weights that are rounded together on a GPU, where a column of few rows takes as long
as one of many."""
_TOGETHER_ON_CPU = 1 << 20
"""The same on a CPU, in whose cache they should stay."""


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
        packed = factor and _rounded([w], [factor], book, block_size, window, rotation)[0]
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
        if all(round_in_order(exact[None], [factor], block_size, rounder)):
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
    return _rounded([w], [factor], book, block_size, window, rotation)[0]


def quantize_factored_alike(
    weights: Sequence[torch.Tensor],
    factors: Sequence[UpperFactor],
    book: Formatbook = DIALECT_FP4,
    block_size: int = 32,
    rotation: Rotation = "none",
    names: Sequence[str] = (),
) -> list[PackedTensor | None]:
    """As :func:`quantize_factored` for weights of one shape, such as those of experts.

    The bytes are those of one after the other. On a GPU it takes little longer than for one weight,
    as long as all together hold no more than :func:`numbers_together` numbers.

    Args:
        weights: E times [N, K], on one device.
        factors: of each weight's moments; several may be the same.
        names: what error messages call the weights; default: tensor.

    Returns:
        For each weight what :func:`quantize_factored` returns.

    Raises:
        ValueError: as there, or if shapes or devices differ.
    """
    if not weights:
        return []
    alike = {(w.shape, w.device) for w in weights}
    if len(alike) > 1 or len(factors) != len(weights):
        raise ValueError(
            f"weights: {len(alike)} shapes and {len(factors)} factors for {len(weights)} weights; "
            "they must have one shape, and a factor each"
        )
    for w, name in zip(weights, names or ["tensor"] * len(weights), strict=True):
        window = check_quantize(w, book, block_size, "mse", None, name, rotation)
    step = max(1, numbers_together(weights[0].device) // max(1, weights[0].numel()))
    found: list[PackedTensor | None] = []
    for first in range(0, len(weights), step):
        some = slice(first, first + step)
        found += _rounded(weights[some], factors[some], book, block_size, window, rotation)
    return found


def numbers_together(device: torch.device) -> int:
    """How many numbers of weights are rounded together on a device."""
    return _TOGETHER_ON_CPU if device.type == "cpu" else _TOGETHER


def _rounded(
    weights: Sequence[torch.Tensor],
    factors: Sequence[UpperFactor],
    book: Formatbook,
    block_size: int,
    window: int,
    rotation: Rotation,
) -> list[PackedTensor | None]:
    """Weights of one shape by rule ``gptq``, some rows of all at a time; None where errors
    overflowed."""
    rows, columns = weights[0].shape
    parts, finite = [], [True] * len(weights)
    for start in range(0, max(1, rows), _ROWS):
        exact = torch.stack(
            [rotate_weight(w[start : start + _ROWS], rotation).to(torch.float32) for w in weights]
        )
        rounder = _DialectRounder(exact, book, block_size, window)
        done = round_in_order(exact, factors, block_size, rounder)
        finite = [before and now for before, now in zip(finite, done, strict=True)]
        if not any(finite):
            break
        parts.append(rounder.packed())
    found: list[PackedTensor | None] = []
    for number, fine in enumerate(finite):
        if not fine:
            found.append(None)
            continue
        codes, meta, row_exponent = (
            torch.cat([part[number] for part in stored]) for stored in zip(*parts, strict=True)
        )
        shape = (rows, columns)
        found.append(PackedTensor(codes, meta, row_exponent, shape, book, block_size, rotation))
    return found


class _DialectRounder:
    """Rounds to a formatbook; :class:`~.gptq.BlockRounder`.

    Args:
        w: the weights before anything is rounded, float32 [E, N, K]: their rows' exponents are
            kept.
    """

    def __init__(self, w: torch.Tensor, book: Formatbook, block_size: int, window: int) -> None:
        self._book, self._block_size, self._window = book, block_size, window
        self._shape = w.shape
        rows = w.flatten(0, 1)
        self._row_exponent = row_exponents(
            block_exponents(blocks_of(rows, block_size).abs().amax(dim=-1))
        )
        self._codes: list[torch.Tensor] = []
        self._meta: list[torch.Tensor] = []

    def round(self, block: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor) -> None:
        book = self._book
        grid, meta = _choose_grid(block, self._row_exponent, book, self._window)
        self._codes.append(feed_back(block, factor, grid, book, errors))
        self._meta.append(meta[:, None])

    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All blocks, after the last one: codes, meta bytes and row exponents, each [E, N, ...]."""
        count, rows, columns = self._shape
        empty = self._row_exponent.new_empty(count * rows, 0, dtype=torch.uint8)
        codes = torch.cat([empty.view(count, 0, rows), *self._codes], dim=1)
        codes = pack_codes(codes.transpose(1, 2).reshape(count * rows, columns))
        meta = torch.cat([empty, *self._meta], dim=1)
        row_exponent = self._row_exponent.to(torch.int8)
        return (
            codes.view(count, rows, codes.shape[1]),
            meta.view(count, rows, meta.shape[1]),
            row_exponent.view(count, rows),
        )


class _E2M1Rounder:
    """Rounds one weight [N, K] to MXFP4, or to NVFP4 where a scale of the tensor is given."""

    def __init__(self, w: torch.Tensor, tensor_scale: torch.Tensor | None) -> None:
        self._tensor_scale = tensor_scale
        self._values = [w.new_empty(0, len(w))]

    def round(self, block: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor) -> None:
        (block,), (factor,), (errors,) = block, factor, errors
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
    """The grids of a block [E, B, N] by rule ``mse``, below given row exponents [E * N]; its meta
    bytes.

    The quantizer takes the row's exponent from a second block, which holds ``2**(R + 2)``.
    """
    block_size = block.shape[1]
    pair = torch.zeros(len(row_exponent), 2 * block_size, device=block.device)
    pair[:, :block_size] = block.transpose(1, 2).reshape(-1, block_size)
    pair[:, block_size] = power_of_two(row_exponent + 2)
    packed = quantize_counted(pair, book, block_size, "mse", window, finite=True).packed
    zero = (packed.codes[:, : block_size // 2] == 0).all(dim=1)
    dialect = packed.ids()[:, 0].to(torch.int32)
    delta = packed.deltas()[:, 0].to(torch.int32)
    above = packed.row_exponent.to(torch.int32) > row_exponent
    if bool(above.any()):
        delta = delta.masked_fill(above, 0)
        saturating = pair[above, :block_size]
        dialect[above] = _saturated_dialects(saturating, row_exponent[above], book)
    effective = row_exponent - delta
    unit = power_of_two(effective - 1).masked_fill(zero, 0)
    meta = torch.where(zero, 0, (delta << book.id_bits) | dialect).to(torch.uint8)
    return BlockGrid(dialect, power_of_two(2 - effective), unit), meta


def _saturated_dialects(
    blocks: torch.Tensor, exponent: torch.Tensor, book: Formatbook
) -> torch.Tensor:
    """Rule ``mse`` for blocks [n, B] that are larger than their exponents [n] allow, int32 [n]."""
    quarters = blocks.abs() * power_of_two(2 - exponent)[:, None]
    cell = quarters.clamp(max=CELLS - 1).to(torch.int64)
    rounded = flat_table(book, "rounded_half_units", torch.float64, blocks.device).view(-1, CELLS)
    half_units = rounded[:, cell]  # [dialects, n, B]
    cost = (half_units * (half_units - quarters.to(torch.float64))).sum(dim=-1)
    return cost.argmin(dim=0).to(torch.int32)
