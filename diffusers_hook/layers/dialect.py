"""The linear layers of a quantized transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dialect_kernels import PackedTensor, quantize
from dialect_kernels.formatbook import Formatbook, book_by_name
from dialect_kernels.reference import check_finite, quantize_fp8

from ..layouts.layouts import Stream
from ..tokens import ops
from ..tokens.block_state import NO_BLOCK
from .packed_weight import PackedWeight

__all__ = ["DialectLinear", "Fp8Linear", "QuantizedLinear"]

_NO_BLOCK = torch.tensor([NO_BLOCK, 0], device="cpu")  # whatever the default device is
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 2**24
"""Weights that are taken out of FP8 at a time."""
_LARGEST_SCALE = torch.finfo(torch.float32).max / 448


class QuantizedLinear(nn.Linear):
    """What the linear layers of a quantized transformer have in common.

    They are `nn.Linear`, because PEFT and diffusers look for that class; `weight` is decoded only
    when something computes with it, and the forward pass never does.

    Attributes:
        bias: parameter [N] or None.
        original_dtype: what `weight` is decoded to; ``.to(dtype)`` changes it.
        original_name: name, from the model's root, of the layer that this one stands for.
    """

    original_dtype: torch.dtype
    original_name: str = ""

    def decode(self) -> torch.Tensor:
        """The decoded weight [N, K], a new tensor."""
        raise NotImplementedError

    def check(self, name: str) -> None:
        """Raise ValueError, naming the tensor, if what was loaded is not valid."""
        if self.bias is not None:
            _check_finite(self.bias.detach(), f"{name}.bias")

    @property
    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the packed weight, by name."""
        return {name: p for name, p in self.named_parameters() if name != "bias"}

    @property
    def device(self) -> torch.device:
        """Where the packed weight is."""
        return next(iter(self.packed_tensors.values())).device

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight [N, K], read-only; see :class:`PackedWeight`."""
        shape = (self.out_features, self.in_features)
        return PackedWeight(self.decode, shape, self.original_dtype, self.device)

    def decoded(self) -> nn.Linear:
        """A plain linear layer with the decoded weight."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        plain.weight = nn.Parameter(self.decode(), requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)

    def _register(self, name: str, tensor: torch.Tensor) -> None:
        """Store a tensor of the packed weight.

        As a parameter: accelerate's sequential offload leaves the buffers of most models, and
        layers that have buffers only, where they are.
        """
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What ``.to``, ``.half`` and their like do to tensors; the packed ones are integers."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype = fn(torch.empty(0, dtype=self.original_dtype, device=self.device)).dtype
        if dtype in _DTYPES:  # not the storage format of layerwise casting
            self.original_dtype = dtype
        return self


class DialectLinear(QuantizedLinear):
    """A linear layer whose weight is a packed dialect tensor.

    Attributes:
        weight_packed: uint8 [N, K/2], the codes.
        weight_meta: uint8 [N, K/B].
        weight_row_exponent: int8 [N].
        stream: whose tokens its input's rows are.
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
        self._register("weight_packed", packed.codes)
        self._register("weight_meta", packed.meta)
        self._register("weight_row_exponent", packed.row_exponent)
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

    def check(self, name: str) -> None:
        """Raise ValueError, naming tensor and position, if what was loaded is not valid."""
        super().check(name)
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

    def decode(self) -> torch.Tensor:
        """The decoded weight [N, K], a new tensor."""
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


class Fp8Linear(QuantizedLinear):
    """A linear layer whose weight is E4M3 with a float32 scale per row (ours).

    For adaLN modulation: a few rows of input, many weights. Both are stored as integers with the
    same bits, because loading a model in bfloat16 casts everything that is floating-point.

    Attributes:
        weight_fp8: uint8 [N, K], the bits of the E4M3 values.
        weight_scale: int32 [N], the bits of the float32 scales.
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
        self._register("weight_fp8", weight.view(torch.uint8))
        self._register("weight_scale", scale.view(torch.int32))
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
        _check_finite(self._e4m3.float(), f"{name}.weight_fp8")
        scale = self._scale
        outside = ~((scale > 0) & (scale <= _LARGEST_SCALE))
        if outside.any():
            at = int(outside.nonzero()[0])
            raise ValueError(
                f"{name}.weight_scale: {float(scale[at])} at [{at}]; allowed are numbers above 0 "
                f"and up to {_LARGEST_SCALE:.3g}: the file is damaged, quantize the 16-bit model "
                "again"
            )

    def decode(self) -> torch.Tensor:
        """The decoded weight [N, K], a new tensor."""
        return (self._e4m3.to(torch.float32) * self._scale[:, None]).to(self.original_dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(input @ e4m3.T) * scale + bias``, [..., K] -> [..., N] in the input's dtype.

        E4M3 numbers are exact in every dtype of inputs. All else is done in float32 and rounded
        once; the weight is never whole in anything but FP8.
        """
        x = input.reshape(-1, self.in_features)
        y = x.new_empty(len(x), self.out_features)
        e4m3, scale = self._e4m3, self._scale
        step = max(1, _CHUNK // self.in_features)
        for first in range(0, self.out_features, step):
            rows = slice(first, first + step)
            part = _product(x, e4m3[rows]) * scale[rows]
            if self.bias is not None:
                part = part + self.bias[rows].to(torch.float32)
            y[:, rows] = part
        return y.view(*input.shape[:-1], self.out_features)

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


def _check_finite(stored: torch.Tensor, name: str) -> None:
    bad = ~stored.isfinite()
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: {float(stored[at])} at {list(at)}; the file is damaged, quantize the 16-bit "
            "model again"
        )
