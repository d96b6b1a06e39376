"""Embeddings on a GPU: the rows of a packed weight that token ids name.

    ids int64 [T], packed weight [V, K]  ->  its rows [T, K], each element rounded once

A program decodes 256 columns of eight tokens' rows, as :mod:`dialect_kernels.gpu.decode` decodes a
weight, and multiplies them by the row's scale. Ids that are not rows read row 0 and give NaN: the
kernel stays inside the weight, and nobody waits for the GPU. (Ours.)
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formatbook import LOWEST_EXPONENT, NAN_ROW
from ..packed import PackedTensor
from .decode import joined_sixteen, sixteen_parts, sixteen_table
from .launch import launch
from .layout import interpreted, readable
from .rounding import power_of_two

__all__ = ["gather"]

_LOWEST_EXPONENT = tl.constexpr(LOWEST_EXPONENT)
_NAN_ROW = tl.constexpr(NAN_ROW)
_TOKENS = 8
_COLUMNS = 256


@triton.jit(do_not_specialize=["tokens", "rows", "columns", "padded"])
def _embedding_kernel(
    p_ids,
    p_codes,
    p_meta,
    p_row_exponent,
    p_table,
    p_out,
    tokens,
    rows,
    columns,
    padded,
    B: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
):
    """A tile of the rows. Grid (T/BT, Kp/BK); out [T, K] of any float type."""
    padded = padded // 16 * 16
    o_token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_token = o_token < tokens
    id_ = tl.load(p_ids + o_token, mask=m_token, other=0)
    known = (id_ >= 0) & (id_ < rows)
    o_row = tl.where(known, id_, 0)
    first = tl.program_id(1) * BK
    exponent = tl.load(p_row_exponent + o_row).to(tl.int32)
    scale = power_of_two(tl.maximum(exponent, _LOWEST_EXPONENT) - 5)
    scale = tl.where(known & (exponent != _NAN_ROW), scale, float("nan"))
    part0, part1, part2, part3 = sixteen_parts(
        p_codes, p_meta, p_table, o_row, first, padded, B, BT, BK, False, ASM
    )
    bits = joined_sixteen(part0, part1, part2, part3, BT, BK)
    values = bits.to(tl.bfloat16, bitcast=True).to(tl.float32) * scale[:, None]
    o_column = first + tl.arange(0, BK)
    p_tile = p_out + o_token[:, None] * columns + o_column[None, :]
    m_tile = m_token[:, None] & (o_column < columns)[None, :]
    tl.store(p_tile, values.to(p_out.dtype.element_ty), mask=m_tile)


def gather(ids: torch.Tensor, p: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows `ids` of a packed tensor.

    Args:
        ids: int64 [T] on p's device.
        p: packed tensor [V, K] on a GPU (or anywhere, in Triton's interpreter), not rotated.
        dtype: float32, bfloat16 or float16.

    Returns:
        `dtype` [T, K]: the bits of ``p.dequantize(dtype)[ids]``; NaN for ids outside 0..V-1.
    """
    tokens, columns = ids.shape[0], p.shape[1]
    if p.shape[0] == 0:
        return torch.full((tokens, columns), float("nan"), dtype=dtype, device=p.device)
    out = torch.empty(tokens, columns, dtype=dtype, device=p.device)
    if not out.numel():
        return out
    padded = p.codes.shape[1] * 2
    table = sixteen_table(p.book, torch.bfloat16, p.device)
    launch(
        _embedding_kernel,
        (-(-tokens // _TOKENS), -(-padded // _COLUMNS)),
        (readable(ids), *p.tensors, table, out, tokens, p.shape[0], columns, padded),
        {"B": p.block_size, "BT": _TOKENS, "BK": _COLUMNS, "ASM": not interpreted()},
        num_warps=4,
    )
    return out
