"""The linear layers of a quantized transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dialect_kernels import PackedTensor, quantize
from dialect_kernels.formatbook import Formatbook, book_by_name
from dialect_kernels.reference import check_finite, quantize_fp8

from . import ops
from .layouts import Stream
from .state import NO_BLOCK

__all__ = ["DialectLinear", "Fp8Linear"]

_NO_BLOCK = torch.tensor([NO_BLOCK, 0])


class DialectLinear(nn.Linear):
    """A linear layer whose weight is a packed dialect tensor.

    It is an `nn.Linear`, because PEFT and diffusers look for that class; its `weight` is decoded
    whenever somebody asks for it, and the forward pass never asks.

    Attributes:
        weight_packed: uint8 [N, K/2], the codes.
        weight_meta: uint8 [N, K/B].
        weight_row_exponent: int8 [N].
        bias: parameter [N] or None.
        stream: whose tokens its input's rows are.
        slot: the block's slot, see :mod:`diffusers_hook.state`; set when the hook is attached.
    """

    weight_packed: torch.Tensor
    weight_meta: torch.Tensor
    weight_row_exponent: torch.Tensor

    def __init__(
        self,
        packed: PackedTensor,
        bias: nn.Parameter | None,
        stream: Stream,
        activation: str,
        dtype: torch.dtype,
    ) -> None:
        """A layer around a packed weight [N, K]; `dtype` is what `weight` is decoded to."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.book = packed.book.name
        self.block_size = packed.block_size
        self.activation = activation
        self.stream = stream
        self.original_dtype = dtype
        self.slot = _NO_BLOCK
        self.register_buffer("weight_packed", packed.codes)
        self.register_buffer("weight_meta", packed.meta)
        self.register_buffer("weight_row_exponent", packed.row_exponent)
        self.register_parameter("bias", bias)

    def leave_block(self) -> None:
        """Forget the block: rows are rounded alone from now on."""
        self.slot = _NO_BLOCK

    @classmethod
    def quantized(
        cls,
        layer: nn.Linear,
        stream: Stream,
        book: Formatbook,
        block_size: int,
        activation: str,
        name: str,
    ) -> DialectLinear:
        """Quantize a layer by exact error; its bias is shared.

        Args:
            layer: the layer; its weight is float32, bfloat16 or float16 [N, K].
            stream: whose tokens its input's rows are.
            book: the formatbook.
            block_size: 16, 32 or 64; it divides K.
            activation: activation format.
            name: what error messages call the layer.

        Raises:
            ValueError: if the weight cannot be quantized (naming it).
        """
        weight = layer.weight.detach()
        packed = quantize(weight, book, block_size, "mse", name=f"{name}.weight")
        return cls(packed, layer.bias, stream, activation, weight.dtype)

    @classmethod
    def empty(
        cls, layer: nn.Linear, stream: Stream, book: Formatbook, block_size: int, activation: str
    ) -> DialectLinear:
        """A layer of the same shape without contents, on the meta device."""
        rows, columns = layer.out_features, layer.in_features
        packed = PackedTensor(
            torch.empty(rows, columns // 2, dtype=torch.uint8, device="meta"),
            torch.empty(rows, columns // block_size, dtype=torch.uint8, device="meta"),
            torch.empty(rows, dtype=torch.int8, device="meta"),
            (rows, columns),
            book,
            block_size,
        )
        return cls(packed, layer.bias, stream, activation, layer.weight.dtype)

    def decoded(self) -> nn.Linear:
        """A plain linear layer with the decoded weight."""
        return _plain(self)

    def check(self, name: str) -> None:
        """Raise ValueError, naming tensor and position, if the stored bytes are not valid."""
        self.packed.validate(name, prefix="weight_")

    @property
    def packed(self) -> PackedTensor:
        """The weight as a packed tensor."""
        return PackedTensor(
            self.weight_packed,
            self.weight_meta,
            self.weight_row_exponent,
            (self.out_features, self.in_features),
            book_by_name(self.book),
            self.block_size,
        )

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The decoded weight [N, K], made anew in every access."""
        return self.packed.dequantize(torch.float32).to(self.original_dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input @ weight.T + bias``, [..., K] -> [..., N] in the input's dtype."""
        y: torch.Tensor = ops.linear(
            input,
            self.weight_packed,
            self.weight_meta,
            self.weight_row_exponent,
            self.bias,
            self.slot,
            self.in_features,
            self.book,
            self.block_size,
            self.activation,
            self.stream.value,
        )
        return y

    def extra_repr(self) -> str:
        """Sizes, format and stream."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, book={self.book}, block_size={self.block_size}, "
            f"activation={self.activation}, stream={self.stream.value}"
        )


class Fp8Linear(nn.Linear):
    """A linear layer whose weight is E4M3 with a float32 scale per row (ours).

    For adaLN modulation: a few rows of input, many weights. Both are stored as integers with the
    same bits, because loading a model in bfloat16 casts everything that is floating-point.

    Attributes:
        weight_fp8: uint8 [N, K], the bits of the E4M3 values.
        weight_scale: int32 [N], the bits of the float32 scales.
        bias: parameter [N] or None.
    """

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
        self.register_buffer("weight_fp8", weight.view(torch.uint8))
        self.register_buffer("weight_scale", scale.view(torch.int32))
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

    def decoded(self) -> nn.Linear:
        """A plain linear layer with the decoded weight."""
        return _plain(self)

    def check(self, name: str) -> None:
        """Raise ValueError, naming the tensor, if the stored bytes are not finite numbers."""
        check_finite(self.weight_fp8.view(torch.float8_e4m3fn).float(), f"{name}.weight_fp8")
        check_finite(self.weight_scale.view(torch.float32), f"{name}.weight_scale")

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The decoded weight [N, K], made anew in every access."""
        decoded = self.weight_fp8.view(torch.float8_e4m3fn).to(torch.float32)
        decoded = decoded * self.weight_scale.view(torch.float32)[:, None]
        return decoded.to(self.original_dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input @ weight.T + bias``, [..., K] -> [..., N] in the input's dtype."""
        return F.linear(input, self.weight.to(input.dtype), self.bias)


def _plain(layer: DialectLinear | Fp8Linear) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(layer.weight, requires_grad=False)
    plain.bias = layer.bias
    return plain.train(layer.training)
