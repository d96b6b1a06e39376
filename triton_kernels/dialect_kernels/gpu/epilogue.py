"""How sums of a product become its result: splits are added, scales applied, the bias added.

    y = (sum of splits) * x_scale * 2**(R - 5) + bias

The programs that share the columns of a tile leave their sums in memory and count themselves; the
last one adds all sums in the order of the splits, so that the result does not depend on who was
last, and needs no launch of its own. Scales are applied in float64: powers of two of both signs
must not overflow on the way.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ..formatbook import LOWEST_EXPONENT, NAN_ROW

__all__ = ["MOST_EARLY", "load_scales", "rounded", "rounded_to", "store_tile"]

_LOWEST_EXPONENT = tl.constexpr(LOWEST_EXPONENT)
_NAN_ROW = tl.constexpr(NAN_ROW)
MOST_EARLY = tl.constexpr(32)


@triton.jit
def rounded(y, p_y, ASM: tl.constexpr):
    """y in the output's type."""
    return rounded_to(y, p_y.dtype.element_ty, ASM)


@triton.jit
def rounded_to(y, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """y in another type of floats; the interpreter's own conversion to bfloat16 truncates."""
    if (tl.bfloat16 == DTYPE) and not ASM:
        bits = y.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(y != y, 0x7FC0, bits)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return y.to(DTYPE)


@triton.jit
def load_scales(pointers, o_token, tokens, o_row):
    """Token scales [BM], row exponents [BN] and bias [BN]; no meaning without a pointer to them.

    Args:
        pointers: to all of them; None where there are none.
        o_token: rows of the result [BM], all below `tokens` exist.
        o_row: rows of the weight [BN], all of which exist.
    """
    p_x_scale, p_row_exponent, p_bias = pointers
    exponent = tl.load(p_row_exponent + o_row)
    scale = exponent
    if p_x_scale is not None:
        scale = tl.load(p_x_scale + o_token, mask=o_token < tokens, other=1.0)
    bias = exponent
    if p_bias is not None:
        bias = tl.load(p_bias + o_row)
    return scale, exponent, bias


@triton.jit
def _write(
    total, pointers, scales, p_y, o_token, o_feature, o_row, tokens, features, ASM: tl.constexpr
):
    """Sums [BN, BM] with their scales and the bias, to y [T, N]."""
    p_x_scale, _, p_bias = pointers
    if total.shape[1] > MOST_EARLY:
        scales = load_scales(pointers, o_token, tokens, o_row)
    scale, exponent, bias = scales
    exponent = exponent.to(tl.int64)
    power_bits = (tl.maximum(exponent, _LOWEST_EXPONENT) + (1023 - 5)) << 52
    power = power_bits.to(tl.float64, bitcast=True)
    power = tl.where(exponent == _NAN_ROW, float("nan"), power)
    y = total.to(tl.float64) * power[:, None]
    if p_x_scale is not None:
        y = y * scale.to(tl.float64)[None, :]
    y = y.to(tl.float32)
    if p_bias is not None:
        y += bias.to(tl.float32)[:, None]
    p_tile = p_y + o_token.to(tl.int64)[None, :] * features + o_feature[:, None]
    mask = (o_token < tokens)[None, :] & (o_feature < features)[:, None]
    tl.store(p_tile, rounded(y, p_y, ASM), mask=mask)


@triton.jit
def store_tile(
    total,
    pointers,
    scales,
    p_y,
    p_partial,
    p_arrived,
    o_token,
    o_feature,
    o_row,
    tokens,
    features,
    SPLIT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Finish and write sums [BN, BM]; where K is split, the last of a tile's programs does.

    Args:
        total: float32 [BN, BM].
        pointers: to token scales, row exponents and bias, None where there are none.
        scales: from :func:`load_scales`, loaded before the loop so that nothing waits for them
            after it. Tiles of more than `MOST_EARLY` tokens have no registers for that: they load
            them here, whatever is given.
        o_row: rows of the weight [BN], all of which exist.
        p_partial: float32 [tiles, splits, BN, BM], for the sums of the splits.
        p_arrived: int32 [tiles], zeros: how many of a tile's programs have written theirs.
    """
    if SPLIT:
        BN: tl.constexpr = total.shape[0]
        BM: tl.constexpr = total.shape[1]
        splits = tl.num_programs(2)
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        p_sum = p_partial + tile.to(tl.int64) * splits * (BN * BM)
        p_sum += (tl.arange(0, BN) * BM)[:, None] + tl.arange(0, BM)[None, :]
        tl.store(p_sum + tl.program_id(2) * (BN * BM), total)
        tl.debug_barrier()  # every thread has written before one of them counts
        arrived = tl.atomic_add(p_arrived + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for _ in range(splits):
                total += tl.load(p_sum, cache_modifier=".cg")  # written by other processors
                p_sum += BN * BM
            _write(total, pointers, scales, p_y, o_token, o_feature, o_row, tokens, features, ASM)
    else:
        _write(total, pointers, scales, p_y, o_token, o_feature, o_row, tokens, features, ASM)
