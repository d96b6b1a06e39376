"""The linear layer of a packed model in transformers, and what its embeddings share with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dialect_kernels import PackedTensor
from dialect_kernels.formatbook import book_by_name
from dialect_kernels.ops import dequantize, linear
from dialect_kernels.packed import STORED_FIELDS
from dialect_kernels.packed_weight import PackedWeight
from dialect_kernels.rotation import rotate_activation
from dialect_kernels.straight_through import straight_through

from ..scheme import LayerFormat

__all__ = ["DialectLinear", "PackedModule", "decoded"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TO_WRITE = "keep an adapter apart, or call the model's dequantize() before merging it"


class PackedModule(nn.Module):
    """A module with a packed matrix, or with a stack of E of them.

    Attributes:
        weight_packed: uint8 [N, K/2], the codes; weight_meta: uint8 [N, K/B]; weight_row_exponent:
            int8 [N]; in a stack all are [E, ...]. All three are parameters, because accelerate
            offloads no buffers.
        format: how it is quantized.
    """

    weight_packed: torch.Tensor
    weight_meta: torch.Tensor
    weight_row_exponent: torch.Tensor
    format: LayerFormat

    _is_hf_initialized = True  # or transformers would write random numbers

    def hold(
        self, stored: Mapping[str, torch.Tensor], form: LayerFormat, dtype: torch.dtype
    ) -> None:
        """Take the tensors of the matrix; ``weight`` is decoded to `dtype`."""
        self.format = form
        self._decoded_dtype = dtype
        for name, tensor in stored.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def packed(self) -> PackedTensor:
        """The weight as a packed tensor, [N, K] or, the rows of a stack together, [E * N, K].

        Raises:
            ValueError: if its parts do not fit together.
        """
        form = self.format
        last = self.weight_packed.dim() - 2
        return PackedTensor.from_stored(
            {
                part.stored: getattr(self, part.stored).data.flatten(0, last)
                for part in STORED_FIELDS
            },
            self.weight_packed.shape[-1] * 2,
            form.formatbook,
            form.block_size,
            form.rotation,
        )

    def check(self, name: str) -> None:
        """Raise ValueError at the first reserved value, or if the parts do not fit together."""
        self.packed.validate(name, prefix="weight_")

    def decode(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weight [N, K], rotated back, a new tensor in `dtype` or the model's.

        Of a stack, [E, N, K].
        """
        values = decoded(self.packed, dtype or self._decoded_dtype)
        return values.view(*self.weight_packed.shape[:-1], values.shape[1])

    @property
    def weight(self) -> torch.Tensor:
        """The matrix [N, K], read-only; see :class:`~dialect_kernels.packed_weight.PackedWeight`"""
        codes = self.weight_packed
        shape = (*codes.shape[:-1], codes.shape[-1] * 2)
        return PackedWeight(self.decode, shape, self._decoded_dtype, codes.device, _TO_WRITE)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What ``.to``, ``.half`` and their like do to tensors; the packed ones are integers."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.weight_packed.device
        self._decoded_dtype = fn(torch.empty(0, dtype=self._decoded_dtype, device=device)).dtype
        return self


def decoded(packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """A packed weight [N, K] as a new tensor in `dtype`, rotated back."""
    return rotate_activation(dequantize(packed, torch.float32), packed.rotation).to(dtype)


class DialectLinear(PackedModule, nn.Linear):  # type: ignore[override] # weight is a property
    """A linear layer with a packed weight, computed by the ops of vLLM's layers.

    It is an ``nn.Linear``, because PEFT looks for that class. Its gradient with respect to the
    input passes straight through the rounding of the activations (ours, as others do it): it is
    that of a product with the decoded weight, ``grad @ weight``. The packed weight itself cannot be
    trained; the bias can.

    Attributes:
        bias: parameter [N] or None.
        accumulation: ``"default"`` or ``"exact"``, see :func:`dialect_kernels.dialect_linear`.
    """

    def __init__(
        self,
        packed: PackedTensor,
        bias: nn.Parameter | None,
        form: LayerFormat,
        accumulation: str,
        dtype: torch.dtype,
    ) -> None:
        """A layer around a packed weight [N, K]; `dtype` is what ``weight`` is decoded to."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.accumulation = accumulation
        self.hold(packed.stored, form, dtype)
        self.register_parameter("bias", bias)

    @classmethod
    def empty(cls, layer: nn.Linear, form: LayerFormat, accumulation: str) -> DialectLinear:
        """A layer of the same shape on the meta device, without contents; it shares the bias."""
        shape = (layer.out_features, layer.in_features)
        packed = PackedTensor.empty(
            shape, book_by_name(form.book), form.block_size, "meta", form.rotation
        )
        return cls(packed, layer.bias, form, accumulation, layer.weight.dtype)

    def decoded(self) -> nn.Linear:
        """A plain linear layer with the decoded weight; it shares the bias."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        plain.weight = nn.Parameter(self.decode(), requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input @ weight.T + bias`` with rounded activations, [..., K] -> [..., N].

        Raises:
            ValueError: if the width or the dtype of `input` does not fit.
        """
        if input.dtype not in _DTYPES or input.shape[-1] != self.in_features:
            raise ValueError(
                f"input: {input.dtype} {list(input.shape)}; it must be float32, bfloat16 or "
                f"float16 [..., {self.in_features}]"
            )
        return straight_through(input, self)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What :meth:`forward` computes, without its checks and its gradient."""
        form = self.format
        return linear(
            x,
            self.weight_packed,
            self.weight_meta,
            self.weight_row_exponent,
            self.bias,
            self.in_features,
            form.book,
            form.block_size,
            form.activation_format,
            self.accumulation,
            form.rotation,
        )

    def extra_repr(self) -> str:
        """Sizes and format."""
        form = ", ".join(f"{key}={value}" for key, value in self.format._asdict().items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {form}"
        )
