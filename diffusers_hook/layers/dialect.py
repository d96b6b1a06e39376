"""Linear layers with packed dialect weights."""

from __future__ import annotations

import torch
from torch import nn

from dialect_kernels import PackedTensor, quantize
from dialect_kernels.formatbook import ActivationFormat, Formatbook, Rotation, book_by_name
from dialect_kernels.ops import dequantize
from dialect_kernels.rotation import rotate_activation

from ..layouts import Stream
from ..tokens import ops
from ..tokens.block_state import NO_BLOCK
from .quantized import QuantizedLinear

__all__ = ["DialectLinear"]

_NO_BLOCK = torch.tensor([NO_BLOCK, 0], device="cpu")  # whatever the default device is


class DialectLinear(QuantizedLinear):
    """A linear layer whose weight is a packed dialect tensor.

    Attributes:
        weight_packed: uint8 [N, K/2], the codes.
        weight_meta: uint8 [N, K/B].
        weight_row_exponent: int8 [N].
        stream: the tokens that its input's rows are.
        slot: the block's slot, see :mod:`~diffusers_hook.tokens.block_state`; set when the hook is
            attached.
    """

    weight_packed: torch.Tensor
    weight_meta: torch.Tensor
    weight_row_exponent: torch.Tensor

    def __init__(
        self,
        packed: PackedTensor,
        bias: nn.Parameter | None,
        stream: Stream,
        activation_format: ActivationFormat,
        dtype: torch.dtype,
    ) -> None:
        """A layer around a packed weight [N, K]; `dtype` is what `weight` is decoded to."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.book = packed.book.name
        self.block_size = packed.block_size
        self.rotation = packed.rotation
        self.activation_format = activation_format
        self.stream = stream
        self.original_dtype = dtype
        self.slot = _NO_BLOCK
        for stored, tensor in packed.stored.items():
            self._register(stored, tensor)
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
        activation_format: ActivationFormat,
        name: str,
        rotation: Rotation = "none",
    ) -> DialectLinear:
        """Quantize a layer by exact error; its bias is shared.

        Args:
            layer: the layer; its weight is float32, bfloat16 or float16 [N, K].
            stream: the tokens that its input's rows are.
            book: the formatbook.
            block_size: 16, 32 or 64; it divides K.
            activation_format: see :class:`~diffusers_hook.config.SemanticDialectConfig`.
            name: what error messages call the layer.
            rotation: of weight and activations; it divides K.

        Raises:
            ValueError: if the weight cannot be quantized (naming it).
        """
        weight = layer.weight.detach()
        packed = quantize(weight, book, block_size, "mse", name=f"{name}.weight", rotation=rotation)
        return cls(packed, layer.bias, stream, activation_format, weight.dtype)

    @classmethod
    def empty(
        cls,
        layer: nn.Linear,
        stream: Stream,
        book: Formatbook,
        block_size: int,
        activation_format: ActivationFormat,
        rotation: Rotation = "none",
    ) -> DialectLinear:
        """A layer of the same shape without contents, on the meta device."""
        shape = (layer.out_features, layer.in_features)
        packed = PackedTensor.empty(shape, book, block_size, "meta", rotation)
        return cls(packed, layer.bias, stream, activation_format, layer.weight.dtype)

    def check(self, name: str) -> None:
        """Raise ValueError, naming tensor and position, if what was loaded is not valid."""
        super().check(name)
        self.packed.validate(name, prefix="weight_")

    @property
    def packed(self) -> PackedTensor:
        """The weight as a packed tensor."""
        book = book_by_name(self.book)
        tensors, columns = self.packed_tensors, self.in_features
        return PackedTensor.from_stored(tensors, columns, book, self.block_size, self.rotation)

    def decode(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weight [N, K], rotated back, a new tensor in `dtype` or the original's."""
        values = dequantize(self.packed, torch.float32)
        return rotate_activation(values, self.rotation).to(dtype or self.original_dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T + bias``, [..., K] -> [..., N] in x's dtype."""
        y: torch.Tensor = ops.linear(
            x,
            self.weight_packed,
            self.weight_meta,
            self.weight_row_exponent,
            self.bias,
            self.slot,
            self.in_features,
            self.book,
            self.block_size,
            self.activation_format,
            self.stream.value,
            self.rotation,
        )
        return y

    def extra_repr(self) -> str:
        """Sizes, format and stream."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, book={self.book}, block_size={self.block_size}, "
            f"activation_format={self.activation_format}, rotation={self.rotation}, "
            f"stream={self.stream.value}"
        )
