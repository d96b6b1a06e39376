"""The linear layer on a GPU: quantize the tokens, choose a plan, launch.

Which products the kernels cover is said by :func:`covers`; the rest is left to torch.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .activation_quantizer import quantize_activation
from .decode import decode_bf16, decode_e4m3
from .dispatch import GemmPlan, choose
from .fp8_quantizer import quantize_activation_fp8
from .gemm import launch_eight_bits, launch_sixteen_bits
from .packed import PackedTensor
from .packed_quantizer import quantize_weight
from .rows import interpreted, with_unit_stride

__all__ = [
    "EXACT_PLANS",
    "covers",
    "decomposed_product",
    "linear",
    "product",
    "quantize_weight",
    "runs_on",
]

_FP8_CAPABILITY = (8, 9)
_LEAST_CAPABILITY = (8, 0)
EXACT_PLANS = (
    (16, GemmPlan("fused", 16, 64, 64, num_stages=3)),
    (2**31, GemmPlan("fused", 64, 64, 64, num_stages=3)),
)
"""(largest T, tile) of the mode `exact`; any gives the same bits."""


class _Device(NamedTuple):
    name: str
    processors: int
    capability: tuple[int, int]


def runs_on(device: torch.device) -> bool:
    """Whether the device runs the kernels: compute capability 8.0, or Triton's interpreter."""
    if device.type == "cuda":
        return _device(device).capability >= _LEAST_CAPABILITY
    return device.type == "cpu" and interpreted()


def covers(x: torch.Tensor, p: PackedTensor, activation_format: str, accumulation: str) -> bool:
    """Whether the kernels compute this product.

    ``exact`` means the reference's bits, which the MMA gives for W4A4 only; W4A16 needs 16-bit
    tokens.
    """
    if not runs_on(x.device):
        return False
    if accumulation == "exact" and activation_format != "dialect":
        return False
    if activation_format == "none" and x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return p.shape[1] > 0


def linear(
    tokens: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
) -> torch.Tensor:
    """``tokens @ p.T + bias`` as :func:`dialect_kernels.dialect_linear`, for covered products.

    Args:
        tokens: float32, bfloat16 or float16 [T, K].

    Returns:
        [T, N] in the tokens' dtype, contiguous.
    """
    if tokens.shape[0] == 0 or p.shape[0] == 0:
        return tokens.new_empty(tokens.shape[0], p.shape[0])
    if activation_format == "none":
        return product(with_unit_stride(tokens), None, p, bias, activation_format, tokens.dtype)
    if activation_format == "dialect":
        q, scale = quantize_activation(tokens, p.book, p.block_size)
    else:
        q, scale = quantize_activation_fp8(tokens, p.block_size)
    exact = accumulation == "exact"
    return product(q, scale, p, bias, activation_format, tokens.dtype, exact)


def decomposed_product(
    tokens: torch.Tensor,
    p: PackedTensor,
    rows: torch.Tensor,
    group: torch.Tensor | None,
) -> torch.Tensor:
    """Rounded tokens, then the residuals of `rows`, times the weight (SemanticDialect).

    Args:
        tokens: float32, bfloat16 or float16 [T, K].
        p: packed weight [N, K], K > 0.
        rows: int64 [S], the salient tokens.
        group: integers [T] or None; tokens with the same number >= 0 share variants.

    Returns:
        float32 [T + S, N], without a bias.
    """
    if tokens.shape[0] == 0 or p.shape[0] == 0:
        return tokens.new_empty(tokens.shape[0] + len(rows), p.shape[0], dtype=torch.float32)
    if group is not None:  # any numbers; the quantizer's labels are smaller than T
        _, label = torch.unique(group, return_inverse=True)
        group = torch.where(group >= 0, label, -1).to(torch.int32)
    q, scale = quantize_activation(tokens, p.book, p.block_size, salient=rows, group=group)
    return product(q, scale, p, None, "dialect", torch.float32)


def product(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    p: PackedTensor,
    bias: torch.Tensor | None,
    activation_format: str,
    dtype: torch.dtype,
    exact: bool = False,
) -> torch.Tensor:
    """``(x * scale) @ p.T + bias`` of tokens that are quantized already, at least one.

    Args:
        x: float8_e4m3fn [T, Kp], or bfloat16 or float16 [T, K] with neighbouring elements.
        scale: float32 [T], or None for 16-bit tokens.
        p: packed weight [N, K], N > 0.
        bias: [N] or None.
        activation_format: what x is, to choose a plan.
        dtype: of the result.
        exact: add block by block (tokens rounded with the weight's book and block size).

    Returns:
        [T, N], contiguous.
    """
    device = _device(x.device)
    eight_bits = scale is not None and device.capability >= _FP8_CAPABILITY
    bias = None if bias is None else bias.contiguous()
    if exact:
        plan = next(plan for most, plan in EXACT_PLANS if x.shape[0] <= most)
    else:
        plan = choose(
            x.shape[0],
            p.shape[0],
            p.shape[1],
            activation_format,
            device.name,
            device.processors,
            _table(device) if eight_bits else "sixteen_bits",
        )
        if plan.kind == "scratch" and x.dtype != torch.float16:
            return _scratch_product(x, scale, p, bias, dtype, eight_bits)
    y = torch.empty(x.shape[0], p.shape[0], dtype=dtype, device=x.device)
    if eight_bits and not exact:
        launch_eight_bits(x, _given(scale), p, bias, y, plan)
    else:
        tokens = x if scale is None else x.to(torch.bfloat16)  # exact
        launch_sixteen_bits(tokens, scale, p, bias, y, plan, exact)
    return y


def _scratch_product(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    p: PackedTensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    eight_bits: bool,
) -> torch.Tensor:
    """Decode the weight to memory that is free again afterwards; the library multiplies.

    float16 tokens have no place here: beside a weight of bfloat16 they would lose bits, and one of
    float16 could overflow.
    """
    if eight_bits:
        weight, weight_scale = decode_e4m3(p)
        fused = bias is not None and bias.dtype == dtype == torch.bfloat16
        fused = fused and len(weight) == p.shape[0]
        y = scaled_product(x, _given(scale), weight, weight_scale, bias if fused else None)
        y = y[:, : p.shape[0]]
        bias = None if fused else bias
    elif scale is not None:
        y = F.linear(x[:, : p.shape[1]].to(torch.bfloat16), decode_bf16(p)).float()
        y = y * scale[:, None]
    else:
        y = F.linear(x, decode_bf16(p))
    if bias is not None:
        y = y.to(torch.float32) + bias.to(torch.float32)
    return y.to(dtype).contiguous()


def scaled_product(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The library's FP8 GEMM, float32 accumulation; bfloat16 is the one result all of them have.

    Args:
        x: float8_e4m3fn [T, Kp], Kp a multiple of 16.
        scale: float32 [T].
        weight: float8_e4m3fn [Np, Kp], Np a multiple of 16.
        weight_scale: float32 [Np].
        bias: bfloat16 [Np] or None.

    Returns:
        bfloat16 [T, Np].
    """
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=scale.unsqueeze(1),
        scale_b=weight_scale.unsqueeze(0),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )


def _table(device: _Device) -> str:
    """The dispatch table of FP8 operands: Hopper and data-centre Blackwell have large MMAs."""
    return "fp8" if device.capability[0] in (9, 10) else "fp8_in_warps"


def _given(scale: torch.Tensor | None) -> torch.Tensor:
    assert scale is not None, "8-bit tokens have scales"
    return scale


@cache
def _device(device: torch.device) -> _Device:
    if device.type == "cpu":  # Triton's interpreter
        return _Device("interpreter", 4, (9, 0))
    properties = torch.cuda.get_device_properties(device)
    return _Device(
        properties.name, properties.multi_processor_count, (properties.major, properties.minor)
    )
