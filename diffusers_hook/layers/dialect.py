"""Linear layers with packed dialect weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from .together import can_be_shared, shared_product

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
        part: name of the module it is in, inside the block; set then too.
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
        self.part = ""
        for stored, tensor in packed.stored.items():
            self._register(stored, tensor)
        self.register_parameter("bias", bias)

    def enter_block(self, slot: torch.Tensor, name: str) -> None:
        """Belong to the block with this slot; `name` is the layer's in it."""
        self.slot = slot
        self.part = name.rpartition(".")[0]

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
        if can_be_shared(x) and self.activation_format != "none":
            return shared_product(self, x)
        y: torch.Tensor = ops.linear(x, *self.tensors, self.slot, *self._how)
        return y

    def products(self, x: torch.Tensor, others: Sequence[DialectLinear]) -> list[torch.Tensor]:
        """:meth:`product` of this layer and of others that :meth:`reads_as` it does, in order."""
        if not others:
            return [ops.linear(x, *self.tensors, self.slot, *self._how)]
        fields = zip(*(layer.tensors for layer in (self, *others)), strict=True)
        codes, meta, row_exponent, bias = (list(field) for field in fields)
        biases = [] if self.bias is None else bias
        found: list[torch.Tensor] = ops.linears(
            x, codes, meta, row_exponent, biases, self.slot, *self._how
        )
        return found

    def reads_as(self, other: DialectLinear) -> bool:
        """Whether both layers round an input alike and can do it together, where they are now."""
        return (
            self.slot is other.slot
            and self.part == other.part
            and self._how == other._how
            and (self.bias is None) == (other.bias is None)
            and self.weight_packed.device == other.weight_packed.device
        )

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The packed weight's tensors, and the bias or None, in the order in which ops take them.

        That is the order in which they were registered: looking up four attributes takes longer.
        """
        return tuple(self._parameters.values())

    @property
    def _how(self) -> tuple[int, str, int, str, str, str]:
        """What decides how an input is rounded, in the order in which the ops take it."""
        return (
            self.in_features,
            self.book,
            self.block_size,
            self.activation_format,
            self.stream.value,
            self.rotation,
        )

    def extra_repr(self) -> str:
        """Sizes, format and stream."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, book={self.book}, block_size={self.block_size}, "
            f"activation_format={self.activation_format}, rotation={self.rotation}, "
            f"stream={self.stream.value}"
        )
