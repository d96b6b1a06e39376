"""Linear layers with FP8 weights, for adaLN modulation (ours)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from dialect_kernels.arguments import check_finite
from dialect_kernels.baselines import quantize_fp8
from dialect_kernels.formatbook import E4M3_MAX

from .quantized import QuantizedLinear, check_stored

__all__ = ["Fp8Linear"]

_CHUNK = 2**24
"""Weights that are taken out of FP8 at a time."""
_LARGEST_SCALE = torch.finfo(torch.float32).max / E4M3_MAX


class Fp8Linear(QuantizedLinear):
    """A linear layer whose weight is E4M3 with a float32 scale per row (ours).

    For adaLN modulation: a few rows of input, many weights. Both are stored as integers with the
    same bits, because loading a model in bfloat16 casts everything that is floating-point.

    Attributes:
        weight_fp8: uint8 [N, K], the bits of the E4M3 values.
        weight_scale: int32 [N], the bits of the float32 scales.
    """

    STORED: ClassVar[dict[str, torch.dtype]] = {
        "weight_fp8": torch.uint8,
        "weight_scale": torch.int32,
    }
    """Names of the stored tensors and their dtypes."""

    weight_fp8: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
    ) -> None:
        """A layer around float8_e4m3fn [N, K] and float32 [N]; `dtype` is what it decodes to."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.original_dtype = dtype
        for (name, dtype), tensor in zip(self.STORED.items(), (weight, scale), strict=True):
            self._register(name, tensor.view(dtype))
        self.register_parameter("bias", bias)

    @classmethod
    def quantized(cls, layer: nn.Linear, name: str) -> Fp8Linear:
        """Round a layer's weight; its bias is shared.

        Raises:
            ValueError: if the weight holds NaN or Inf (naming it).
        """
        weight = layer.weight.detach()
        check_finite(weight, f"{name}.weight")
        rounded, scale = quantize_fp8(weight)
        return cls(rounded, scale, layer.bias, weight.dtype)

    @classmethod
    def empty(cls, layer: nn.Linear) -> Fp8Linear:
        """A layer of the same shape without contents, on the meta device."""
        weight = torch.empty(layer.weight.shape, dtype=torch.float8_e4m3fn, device="meta")
        scale = torch.empty(layer.out_features, dtype=torch.float32, device="meta")
        return cls(weight, scale, layer.bias, layer.weight.dtype)

    def check(self, name: str) -> None:
        """Raise ValueError, naming the tensor, if what was loaded is not valid."""
        super().check(name)
        check_stored(self._e4m3.float(), f"{name}.weight_fp8")
        scale = self._scale
        outside = ~((scale > 0) & (scale <= _LARGEST_SCALE))
        if outside.any():
            at = int(outside.nonzero()[0])
            raise ValueError(
                f"{name}.weight_scale: {float(scale[at])} at [{at}]; allowed are numbers above 0 "
                f"and up to {_LARGEST_SCALE:.3g}: the file is damaged, quantize the 16-bit model "
                "again"
            )

    def decode(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weight [N, K], a new tensor in `dtype` or the original's."""
        values = self._e4m3.to(torch.float32) * self._scale[:, None]
        return values.to(dtype or self.original_dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``(x @ e4m3.T) * scale + bias``, [..., K] -> [..., N] in x's dtype.

        E4M3 numbers are exact in every dtype of inputs. All else is done in float32 and rounded
        once; the weight is never whole in anything but FP8.
        """
        tokens = x.reshape(-1, self.in_features)
        y = x.new_empty(len(tokens), self.out_features)
        e4m3, scale = self._e4m3, self._scale
        step = max(1, _CHUNK // self.in_features)
        for first in range(0, self.out_features, step):
            rows = slice(first, first + step)
            part = _product(tokens, e4m3[rows]) * scale[rows]
            if self.bias is not None:
                part = part + self.bias[rows].to(torch.float32)
            y[:, rows] = part
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def _e4m3(self) -> torch.Tensor:
        return self.weight_fp8.view(torch.float8_e4m3fn)

    @property
    def _scale(self) -> torch.Tensor:
        return self.weight_scale.view(torch.float32)


def _product(x: torch.Tensor, e4m3: torch.Tensor) -> torch.Tensor:
    """``x @ e4m3.T``, [T, K] and [N, K] -> float32 [T, N]."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, e4m3.to(x.dtype).T, out_dtype=torch.float32)
    # elsewhere a product of 16-bit numbers has a 16-bit result
    return x.to(torch.float32) @ e4m3.to(torch.float32).T
