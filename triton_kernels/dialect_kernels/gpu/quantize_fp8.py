"""Per-token FP8, the activation format of W4A8 (ours).

    x [T, K] -> q E4M3 [T, Kp], scale float32 [T];  scale = amax / 448, q = RNE(x / scale)

Division and rounding are those of IEEE arithmetic, so that every device gets the same bytes. The
rounding is one instruction from sm_89 on, else it is done in float32, where the sum of a magnitude
and a power of two whose last place is the E4M3 step rounds to nearest even. A quotient of 16-bit
tokens takes three instructions instead of a division::

    q = x * RN(1 / scale);  q = RN(q + RN(x - q * scale) * RN(1 / scale))

which has the bits of ``RN(x / scale)`` for every bfloat16 or float16 `x` and every scale that such
a row can have, as a test over all of them shows. Scaling both by a power of two changes nothing as
long as no term is subnormal: rows of small numbers, rotated rows and float32 are divided.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ..arguments import check_matrix
from ..arithmetic import padded_columns
from ..formatbook import E4M3_MAX, Rotation
from ..packed import check_block_size
from ..rotation import check_rotation
from .launch import launch
from .layout import (
    RowConfig,
    aligned,
    block_columns,
    clear,
    interpreted,
    operand_columns,
    readable_rows,
    row_config,
    written_dtype,
)
from .rotation import load_activation
from .rounding import INFINITY_BITS, block_largest, e4m3_values

__all__ = ["quantize_activation_fp8"]

_E4M3_MAX = tl.constexpr(E4M3_MAX)
_B = tl.constexpr(32)
_SMALL_BITS = tl.constexpr((127 - 50) << 23)
"""Bits of 2**-50, the largest magnitude of a row that is divided."""


# Operands: four results in one word, four numbers; the second operand goes to the low byte.
_CONVERT_ASM = tl.constexpr("""{
.reg .b16 a, b;
cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;
mov.b32 $0, {a, b};
}""")


@triton.jit
def _rounded_bytes(x, NATIVE: tl.constexpr):
    """The nearest E4M3 number of each float32, ties to even, saturating; uint8."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            _CONVERT_ASM, "=r,f,f,f,f", [x], dtype=tl.uint8, is_pure=True, pack=4
        )
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), _E4M3_MAX)
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)  # 2**-6
    place = (exponent + (20 << 23)).to(tl.float32, bitcast=True)
    rounded = (magnitude + place) - place
    # 2**120 times smaller, a float32 has the bits of E4M3 from bit 20 on, subnormals included
    small = (rounded * 7.52316384526264e-37).to(tl.int32, bitcast=True)
    return ((small >> 20) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _quotient(x, scale, inverse, whole, CORRECTED: tl.constexpr):
    """The nearest float32 to x / scale.

    Args:
        inverse: the nearest float32 to 1 / scale.
        whole: whether no term of a corrected product is subnormal.
        CORRECTED: whether x has few enough bits for one correction.
    """
    if CORRECTED:
        if whole:
            q = x * inverse
            q = tl.fma(tl.fma(-q, scale, x), inverse, q)
        else:
            q = tl.div_rn(x, scale)
    else:
        q = tl.div_rn(x, scale)
    return q


@triton.jit(do_not_specialize=["columns", "padded", "stride", "zeros"])
def _quantize_activation_fp8_kernel(
    p_x,
    p_q,
    p_scale,
    p_zeros,
    columns,
    padded,
    stride,
    zeros,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    OPERANDS: tl.constexpr,
    ROTATED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
    NATIVE: tl.constexpr,
):
    CORRECTED: tl.constexpr = ASM and not ROTATED and p_x.dtype.element_ty != tl.float32
    if ALIGNED:
        columns = columns // 16 * 16
        padded = padded // 16 * 16
        stride = stride // 16 * 16
    if not ROTATED:
        clear(p_zeros, zeros)
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_x + i_row * stride
    # with constant ends, a loop of one step is none
    end, padded_end = (CHUNK, CHUNK) if ONE_CHUNK else (columns, padded)
    b_x = tl.zeros((CHUNK // _B, _B), tl.float32)
    largest = tl.zeros((CHUNK // _B,), tl.int32)
    for first in range(0, end, CHUNK):
        b_x = load_activation(p_row, first, columns, _B, CHUNK, ROTATED, False)
        largest = tl.maximum(largest, block_largest(b_x))
    top = tl.max(largest, axis=0)
    finite = top < INFINITY_BITS
    scale = tl.div_rn(top.to(tl.float32, bitcast=True), _E4M3_MAX)
    scale = tl.where(finite & (scale != 0.0), scale, 1.0)
    inverse = tl.div_rn(1.0, scale)
    tl.store(p_scale + i_row, tl.where(finite, scale, float("nan")))

    for first in range(0, padded_end, CHUNK):
        if not ONE_CHUNK:
            b_x = load_activation(p_row, first, columns, _B, CHUNK, ROTATED, False)
        o_column = block_columns(first, _B, CHUNK)
        b_q = _rounded_bytes(_quotient(b_x, scale, inverse, top > _SMALL_BITS, CORRECTED), NATIVE)
        b_q = tl.where(finite | (o_column >= columns), b_q, 0x7F)
        if p_q.dtype.element_ty == tl.bfloat16:
            b_q = e4m3_values(b_q).to(tl.bfloat16)
        o_place = operand_columns(o_column, padded) if OPERANDS else o_column
        tl.store(p_q + i_row * padded + o_place, b_q, mask=o_column < padded)
    if ROTATED:
        clear(p_zeros, zeros)  # not before: on sm_100 two registers would be spilled


@cache
def _converts(device: torch.device) -> bool:
    """Whether a GPU has an instruction that rounds float32 to E4M3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_activation_fp8(
    x: torch.Tensor,
    block_size: int = 32,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    operand_order: bool = False,
    zeros: torch.Tensor | None = None,
    rotation: Rotation = "none",
    config: RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize tokens as ``baselines.quantize_fp8`` does, padded to a weight's columns.

    Args:
        x: float32, bfloat16 or float16 [T, K].
        block_size: the weight's block size, 16, 32 or 64; K is padded to whole blocks.
        dtype: of q: float8_e4m3fn, or bfloat16 with the same numbers.
        operand_order: write the columns in the order of the GEMM's operands, see
            :mod:`dialect_kernels.gpu.layout`.
        zeros: int32, contiguous: memory that the same launch fills with zeros if T > 0.
        rotation: the weight's; the tokens are rotated before anything else (ours).
        config: how a program works on a row; any gives the same bytes.

    Returns:
        (q [T, Kp], float32 scale [T]): a value is about ``q * scale``; the tail is zero. A token
        with NaN or Inf has NaN as its scale, and in q as E4M3.

    Raises:
        ValueError: if dtype, shape or block size are not allowed.
    """
    check_matrix(x, "x")
    check_block_size(block_size)
    check_rotation(rotation, x.shape[1], "x")
    x = readable_rows(x)
    rows, columns = x.shape
    padded = padded_columns(columns, block_size)
    q = torch.empty(rows, padded, dtype=written_dtype(dtype), device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    config = config or row_config(padded, rotation != "none")
    if rows:
        cleared = 0 if zeros is None else zeros.numel()
        launch(
            _quantize_activation_fp8_kernel,
            (rows,),
            (x, q, scale, zeros, columns, padded, x.stride(0), cleared),
            {
                "CHUNK": config.chunk,
                "ONE_CHUNK": padded <= config.chunk,
                "OPERANDS": operand_order,
                "ROTATED": rotation != "none",
                "ALIGNED": aligned(x),
                "ASM": not interpreted(),
                "NATIVE": _converts(x.device),
            },
            num_warps=config.num_warps,
        )
    return q.view(dtype), scale
