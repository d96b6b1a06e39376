"""Other 4-bit and 8-bit formats: OCP MXFP4 and NVFP4 to compare with, FP8 for W4A8's tokens."""

from __future__ import annotations

import torch

from .arguments import check_finite, check_matrix
from .arithmetic import blocks_of, divisor, power_of_two, row_chunks
from .formatbook import E4M3_MAX

__all__ = [
    "mxfp4_scale",
    "nvfp4_block_scale",
    "nvfp4_tensor_scale",
    "quantize_fp8",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "round_scaled",
]

_CHUNK_ELEMENTS = 1 << 16  # float32 copies of a chunk stay in the cache of a core
_EXPONENT_BITS = 0x7F800000


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
    rows, columns = x.shape
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for part in row_chunks(rows, columns, _CHUNK_ELEMENTS):
        blocks = blocks_of(x[part], block_size)
        # exact: a quotient that float32 cannot hold lies far below the smallest element
        rounded = round_scaled(blocks, mxfp4_scale(_largest(blocks)))
        out[part] = rounded.flatten(1)[:, :columns]
    return out


def quantize_nvfp4(
    x: torch.Tensor, block_size: int = 16, largest: torch.Tensor | None = None
) -> torch.Tensor:
    """NVFP4: one float32 scale per tensor, an E4M3 scale per block, E2M1 elements, nearest even.

    Args:
        x: finite float32, bfloat16 or float16 [N, K].
        block_size: 16 (the standard's).
        largest: the largest magnitude of the tensor that `x` is some rows of, float32 []; default:
            that of `x`.

    Returns:
        float32 [N, K], the rounded values.

    Raises:
        ValueError: if shape or dtype do not fit, or `x` holds NaN or Inf.
    """
    check_matrix(x, "x")
    check_finite(x, "x")
    if largest is None:
        empty = torch.zeros((), device=x.device)
        largest = x.abs().amax().to(torch.float32) if x.numel() else empty
    tensor_scale = nvfp4_tensor_scale(largest)
    rows, columns = x.shape
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for part in row_chunks(rows, columns, _CHUNK_ELEMENTS):
        blocks = blocks_of(x[part], block_size)
        rounded = round_scaled(blocks, nvfp4_block_scale(_largest(blocks), tensor_scale))
        out[part] = rounded.flatten(1)[:, :columns]
    return out


def mxfp4_scale(largest: torch.Tensor) -> torch.Tensor:
    """MXFP4's scale of blocks with these largest magnitudes, float32, a power of two."""
    # frexp is exact for subnormals too: largest = mantissa * 2**power, mantissa in [0.5, 1)
    exponent = (torch.frexp(largest).exponent - 1 - 2).to(torch.int32).clamp_(min=-127)
    scale = power_of_two(exponent.clamp(min=-126))
    return scale.mul_(torch.where(exponent < -126, 0.5, 1.0))


def nvfp4_tensor_scale(largest: torch.Tensor) -> torch.Tensor:
    """NVFP4's scale of a tensor with this largest magnitude, float32 []."""
    scale = largest / divisor(E4M3_MAX * 6, largest)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def nvfp4_block_scale(largest: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """NVFP4's scale of blocks with these largest magnitudes, float32; 0 where they are lost."""
    wanted = largest / divisor(6.0, largest) / tensor_scale
    rounded: torch.Tensor = wanted.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)
    return rounded * tensor_scale


def round_scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Float32 numbers on the grids of E2M1 times their scales; 0 where the scale is 0."""
    return _round_to_e2m1(x / torch.where(scale == 0, torch.inf, scale)).mul_(scale)


def _largest(blocks: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block, [N, Kp/B, 1]."""
    ends = blocks.amax(dim=-1, keepdim=True), blocks.amin(dim=-1, keepdim=True).neg_()
    return torch.maximum(*ends).abs_()  # abs: of two zeros, maximum may return the negative one


def _round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 value of float32 numbers, ties to even, saturating at 6.

    Adding ``2**22 * b`` to a magnitude of the binade b..2b rounds it to multiples of b/2, which is
    E2M1's grid there (below 1, that of b = 1): float32 holds 23 bits behind the leading one.
    """
    magnitude = x.abs().clamp_(max=6.0)
    binade = (magnitude.view(torch.int32) & _EXPONENT_BITS).view(torch.float32).clamp_(1.0, 4.0)
    shift = binade.mul_(2.0**22)
    return magnitude.add_(shift).sub_(shift).copysign_(x)
