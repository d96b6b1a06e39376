"""How sums of a product become its result: splits are added, scales applied, the bias added.

    y = (sum of splits) * x_scale * 2**(R - 5) + bias

Scales are applied in float64: powers of two of both signs must not overflow on the way.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .packed import NAN_ROW, PackedTensor
from .rows import interpreted

__all__ = ["add_splits", "store_tile", "workspace"]

_NAN_ROW = tl.constexpr(NAN_ROW)
_FEATURES = 1024


@triton.jit
def _rounded(y, p_y, ASM: tl.constexpr):
    """y in the output's type; the interpreter's own conversion to bfloat16 truncates."""
    if (p_y.dtype.element_ty == tl.bfloat16) and not ASM:
        bits = y.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(y != y, 0x7FC0, bits)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return y.to(p_y.dtype.element_ty)


@triton.jit
def _finished(
    total,
    p_x_scale,
    p_row_exponent,
    p_bias,
    o_token,
    o_feature,
    m_token,
    m_feature,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Sums with their scales and the bias, float32; `o_token` and `o_feature` broadcast."""
    exponent = tl.load(p_row_exponent + o_feature, mask=m_feature, other=0).to(tl.int64)
    power = ((tl.maximum(exponent, -120) + (1023 - 5)) << 52).to(tl.float64, bitcast=True)
    y = total.to(tl.float64) * tl.where(exponent == _NAN_ROW, float("nan"), power)
    if SCALED:
        y = y * tl.load(p_x_scale + o_token, mask=m_token, other=1.0).to(tl.float64)
    y = y.to(tl.float32)
    if BIAS:
        y += tl.load(p_bias + o_feature, mask=m_feature, other=0.0).to(tl.float32)
    return y


@triton.jit
def store_tile(
    total,
    p_x_scale,
    p_row_exponent,
    p_bias,
    p_y,
    o_token,
    o_feature,
    tokens,
    features,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
    ASM: tl.constexpr,
):
    """Write sums [BN, BM]: finished, or to this split's part of a workspace [splits, T, N]."""
    m_token = (o_token < tokens)[None, :]
    m_feature = (o_feature < features)[:, None]
    p_tile = p_y + o_token.to(tl.int64)[None, :] * features + o_feature[:, None]
    if PARTIAL:
        p_tile += tl.program_id(2).to(tl.int64) * tokens * features
        tl.store(p_tile, total, mask=m_token & m_feature)
    else:
        y = _finished(
            total,
            p_x_scale,
            p_row_exponent,
            p_bias,
            o_token[None, :],
            o_feature[:, None],
            m_token,
            m_feature,
            SCALED,
            BIAS,
        )
        tl.store(p_tile, _rounded(y, p_y, ASM), mask=m_token & m_feature)


@triton.jit(do_not_specialize=["splits", "tokens", "features"])
def reduce_kernel(
    p_partial,
    p_x_scale,
    p_row_exponent,
    p_bias,
    p_y,
    splits,
    tokens,
    features,
    BN: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add the splits in their order and finish. Grid (T, N/BN)."""
    i_token = tl.program_id(0).to(tl.int64)
    o_feature = tl.program_id(1) * BN + tl.arange(0, BN)
    m_feature = o_feature < features
    p_row = p_partial + i_token * features + o_feature
    total = tl.zeros((BN,), tl.float32)
    for _ in range(splits):
        total += tl.load(p_row, mask=m_feature, other=0.0)
        p_row += tokens.to(tl.int64) * features
    y = _finished(
        total, p_x_scale, p_row_exponent, p_bias, i_token, o_feature, i_token < tokens, m_feature,
        SCALED, BIAS,
    )  # fmt: skip
    tl.store(p_y + i_token * features + o_feature, _rounded(y, p_y, ASM), mask=m_feature)


def workspace(y: torch.Tensor, splits: int) -> torch.Tensor | None:
    """Memory for the sums of every split, or None if there is one."""
    if splits == 1:
        return None
    return torch.empty(splits, *y.shape, dtype=torch.float32, device=y.device)


def add_splits(
    total: torch.Tensor,
    scale: torch.Tensor | None,
    p: PackedTensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    splits, tokens, features = total.shape
    reduce_kernel[(tokens, triton.cdiv(features, _FEATURES))](
        total,
        scale,
        p.row_exponent,
        bias,
        y,
        splits,
        tokens,
        features,
        BN=_FEATURES,
        SCALED=scale is not None,
        BIAS=bias is not None,
        ASM=not interpreted(),
        num_warps=4,
    )
