"""Rotation ``hadamard_32`` in registers, and of whole tokens (ours; format, section 9).

Every 32 columns of a row are multiplied by a Hadamard matrix, in the five steps of a butterfly
whose order is part of the format: step s makes a sum and a difference of the columns i and i + s,
for all i without the bit s. A thread holds whole groups of 32, in four parts of eight columns::

    columns of a group   | 0 .. 7 | 8 .. 15 | 16 .. 23 | 24 .. 31 |
                           part 0   part 1    part 2     part 3

so that the steps 1, 2 and 4 stay inside a part, 8 and 16 add whole parts, and nothing is sent from
thread to thread. Rows that are not rotated are loaded in the same way by quantizers that work block
by block: what they compute for a block is then computed once.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formatbook import ROTATION_GROUP
from .epilogue import rounded
from .launch import launch
from .layout import aligned, block_columns, interpreted, load_blocks, readable_rows, row_config

__all__ = ["butterfly", "load_activation", "load_weight", "rotate_tokens"]

_GROUP = tl.constexpr(ROTATION_GROUP)


@triton.jit
def _step(x, STEP: tl.constexpr):
    """Sums and differences of columns STEP apart, [G, W] -> [G, W]."""
    G: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    pairs = tl.reshape(x, (G, W // (2 * STEP), 2, STEP))
    a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    joined = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
    return tl.reshape(joined, (G, W))


@triton.jit
def butterfly(x):
    """Rows [R, K] of groups of 32 columns, unscaled, wherever their elements are: [R, K]."""
    groups = tl.reshape(x, (x.shape[0] * x.shape[1] // _GROUP, _GROUP))
    groups = _step(_step(_step(_step(_step(groups, 1), 2), 4), 8), 16)
    return tl.reshape(groups, (x.shape[0], x.shape[1]))


@triton.jit
def _load_part(p_row, o_column, columns, ROTATED: tl.constexpr, p_mean=None):
    """Columns of each group as float32, [G, 8] or [G, 4]; if rotated, after the steps inside it.

    A thread loads 16 bytes at a time. `p_mean` (float32) is subtracted before, if there is one.
    """
    x = tl.load(p_row + o_column, mask=o_column < columns, other=0.0).to(tl.float32)
    if p_mean is not None:
        x -= tl.load(p_mean + o_column, mask=o_column < columns, other=0.0)
    if ROTATED:
        x = _step(_step(x, 1), 2)
        if o_column.shape[1] == 8:
            x = _step(x, 4)
    return x


@triton.jit
def _sums(a, b, ROTATED: tl.constexpr):
    """A step of the butterfly on whole parts, if there is one."""
    if ROTATED:
        return a + b, a - b
    else:
        return a, b


@triton.jit
def _joined_parts(x0, x1, x2, x3, ROTATED: tl.constexpr):
    """Four parts of groups, [G, W] each, after the steps 8 and 16 -> [G, part 2, part 1, W]."""
    x0, x1 = _sums(x0, x1, ROTATED)
    x2, x3 = _sums(x2, x3, ROTATED)
    x0, x2 = _sums(x0, x2, ROTATED)
    x1, x3 = _sums(x1, x3, ROTATED)
    return tl.permute(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (0, 2, 3, 1))


@triton.jit
def _load_groups(
    p_row,
    first,
    columns,
    scale,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATED: tl.constexpr,
    p_mean=None,
):
    """A chunk of a row as float32 [CHUNK / B, B], zero beyond the row's end.

    Args:
        columns: of the row, a multiple of 32 if it is rotated.
        scale: what a rotated row is multiplied by: 1.0 for weights, 1/32 for activations.
        p_mean: as for :func:`load_weight`.
    """
    if ROTATED:
        columns = columns // _GROUP * _GROUP
    o_group = first + tl.arange(0, CHUNK // _GROUP)[:, None] * _GROUP
    if p_row.dtype.element_ty == tl.float32:  # every part in two halves, which the step 4 adds
        o_column = o_group + tl.arange(0, 4)[None, :]
        a0 = _load_part(p_row, o_column, columns, ROTATED, p_mean)
        b0 = _load_part(p_row, o_column + 4, columns, ROTATED, p_mean)
        a1 = _load_part(p_row, o_column + 8, columns, ROTATED, p_mean)
        b1 = _load_part(p_row, o_column + 12, columns, ROTATED, p_mean)
        a2 = _load_part(p_row, o_column + 16, columns, ROTATED, p_mean)
        b2 = _load_part(p_row, o_column + 20, columns, ROTATED, p_mean)
        a3 = _load_part(p_row, o_column + 24, columns, ROTATED, p_mean)
        b3 = _load_part(p_row, o_column + 28, columns, ROTATED, p_mean)
        a0, b0 = _sums(a0, b0, ROTATED)
        a1, b1 = _sums(a1, b1, ROTATED)
        a2, b2 = _sums(a2, b2, ROTATED)
        a3, b3 = _sums(a3, b3, ROTATED)
        a = _joined_parts(a0, a1, a2, a3, ROTATED)
        b = _joined_parts(b0, b1, b2, b3, ROTATED)
        group = tl.permute(tl.join(a, b), (0, 1, 2, 4, 3))
    else:
        o_column = o_group + tl.arange(0, 8)[None, :]
        x0 = _load_part(p_row, o_column, columns, ROTATED, p_mean)
        x1 = _load_part(p_row, o_column + 8, columns, ROTATED, p_mean)
        x2 = _load_part(p_row, o_column + 16, columns, ROTATED, p_mean)
        x3 = _load_part(p_row, o_column + 24, columns, ROTATED, p_mean)
        group = _joined_parts(x0, x1, x2, x3, ROTATED)
    return tl.reshape(group * scale if ROTATED else group, (CHUNK // B, B))


@triton.jit
def load_activation(
    p_row,
    first,
    columns,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATED: tl.constexpr,
    GROUPS: tl.constexpr = True,
):
    """A chunk of a token, rotated if its layer is, float32 [CHUNK / B, B].

    Args:
        GROUPS: whether a thread holds whole groups of 32 columns; if rotated, it always does.
    """
    if GROUPS or ROTATED:
        return _load_groups(p_row, first, columns, 1 / _GROUP, B, CHUNK, ROTATED)
    else:
        return load_blocks(p_row, first, columns, B, CHUNK)


@triton.jit
def load_weight(
    p_row,
    first,
    columns,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATED: tl.constexpr,
    p_mean=None,
):
    """A chunk of a row of a weight, rotated if its layer is, float32 [CHUNK / B, B].

    Args:
        p_mean: float32 [columns], subtracted before the rotation, as from the rows of a cache.
    """
    return _load_groups(p_row, first, columns, 1.0, B, CHUNK, ROTATED, p_mean)


@triton.jit(do_not_specialize=["columns", "stride"])
def _rotate_kernel(
    p_x,
    p_y,
    columns,
    stride,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
):
    columns = columns // _GROUP * _GROUP
    if ALIGNED:
        stride = stride // 16 * 16
    i_row = tl.program_id(0).to(tl.int64)
    for first in range(0, columns, CHUNK):
        b_x = load_activation(p_x + i_row * stride, first, columns, _GROUP, CHUNK, True)
        o_column = block_columns(first, _GROUP, CHUNK)
        p_out = p_y + i_row * columns + o_column
        tl.store(p_out, rounded(b_x, p_y, ASM), mask=o_column < columns)


def rotate_tokens(x: torch.Tensor) -> torch.Tensor:
    """Rotated activations in their own dtype, rounded once: what ``"none"`` multiplies.

    Args:
        x: float32, bfloat16 or float16 [T, K], K a multiple of 32.
    """
    x = readable_rows(x)
    rows, columns = x.shape
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    config = row_config(columns)
    if rows and columns:
        launch(
            _rotate_kernel,
            (rows,),
            (x, y, columns, x.stride(0)),
            {"CHUNK": config.chunk, "ALIGNED": aligned(x), "ASM": not interpreted()},
            num_warps=config.num_warps,
        )
    return y
