"""Other 4-bit and 8-bit formats: OCP MXFP4 and NVFP4 to compare with, FP8 for W4A8's tokens."""

from __future__ import annotations

import torch

from .arguments import check_finite, check_matrix
from .arithmetic import blocks_of, divisor, double_power_of_two, row_chunks
from .formatbook import E4M3_MAX

__all__ = ["quantize_fp8", "quantize_mxfp4", "quantize_nvfp4"]


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token FP8, the activation format ``"fp8"`` (ours).

    ``s = amax / 448`` in float32 (1 for a row of zeros, or where the quotient underflows to 0) and
    ``q`` = round-to-nearest-even E4M3 of ``x / s``, saturating.

    Args:
        x: float32, bfloat16 or float16 [T, K].

    Returns:
        (float8_e4m3fn [T, K], float32 scale [T]); NaN scale and NaN values for a row with NaN or
        Inf.
    """
    check_matrix(x, "x")
    values = x.to(torch.float32)
    finite = values.isfinite().all(dim=1)
    values = torch.where(finite[:, None], values, torch.zeros_like(values))
    largest = values.abs().amax(dim=1) if x.shape[1] else values.new_zeros(x.shape[0])
    scale = largest / divisor(E4M3_MAX, x)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (values / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX)
    q = torch.where(finite[:, None], q, torch.nan)
    return q.to(torch.float8_e4m3fn), torch.where(finite, scale, torch.nan)


def quantize_mxfp4(x: torch.Tensor, block_size: int = 32) -> torch.Tensor:
    """OCP MXFP4: a power-of-two (E8M0) scale per block, E2M1 elements, nearest even.

    Args:
        x: finite float32, bfloat16 or float16 [N, K].
        block_size: 32 (the standard's), or 16.

    Returns:
        float32 [N, K], the rounded values.

    Raises:
        ValueError: if shape or dtype do not fit, or `x` holds NaN or Inf.
    """
    check_matrix(x, "x")
    check_finite(x, "x")
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for part in row_chunks(*x.shape):
        blocks = blocks_of(x[part], block_size)
        largest = blocks.abs().amax(dim=-1, keepdim=True)
        # frexp is exact for subnormals too: largest = mantissa * 2**power, mantissa in [0.5, 1)
        exponent = (torch.frexp(largest).exponent - 1 - 2).clamp(min=-127)
        scale = double_power_of_two(exponent.to(torch.int64))
        rounded = _round_to_e2m1(blocks.to(torch.float64) / scale) * scale
        out[part] = rounded.to(torch.float32).flatten(1)[:, : x.shape[1]]
    return out


def quantize_nvfp4(x: torch.Tensor, block_size: int = 16) -> torch.Tensor:
    """NVFP4: one float32 scale per tensor, an E4M3 scale per block, E2M1 elements, nearest even.

    Args:
        x: finite float32, bfloat16 or float16 [N, K].
        block_size: 16 (the standard's).

    Returns:
        float32 [N, K], the rounded values.

    Raises:
        ValueError: if shape or dtype do not fit, or `x` holds NaN or Inf.
    """
    check_matrix(x, "x")
    check_finite(x, "x")
    largest = x.abs().amax().to(torch.float32) if x.numel() else torch.zeros((), device=x.device)
    tensor_scale = largest / divisor(E4M3_MAX * 6, x)
    if tensor_scale == 0:
        tensor_scale = torch.ones_like(tensor_scale)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for part in row_chunks(*x.shape):
        blocks = blocks_of(x[part], block_size)
        wanted = blocks.abs().amax(dim=-1, keepdim=True) / divisor(6.0, x) / tensor_scale
        block_scale = wanted.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)
        scale = block_scale * tensor_scale
        quotient = torch.where(scale == 0, 0.0, blocks / scale)
        rounded = _round_to_e2m1(quotient) * scale
        out[part] = rounded.flatten(1)[:, : x.shape[1]]
    return out


def _round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 value, ties to even, saturating at 6; dtype kept."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    # torch.round rounds halves to even, and E2M1's mantissa bit is the parity of x / step
    return torch.copysign((magnitude / step).round() * step, x).clamp(-6.0, 6.0)
