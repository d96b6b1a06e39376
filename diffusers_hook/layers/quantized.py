"""What the linear layers of a quantized transformer have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dialect_kernels.packed_weight import PackedWeight
from dialect_kernels.straight_through import straight_through

__all__ = ["DTYPES", "QuantizedLinear", "check_stored"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What quantized layers compute in."""
_TO_REPLACE = "call disable_semantic_dialect() first, or quantize other components"
_TO_WRITE = "call disable_semantic_dialect() first, e.g. to fuse or unfuse a LoRA"


class QuantizedLinear(nn.Linear):
    """A linear layer with a packed weight.

    It is an `nn.Linear`, because PEFT and diffusers look for that class; `weight` is decoded only
    when something computes with it, and the forward pass never does. Its gradient:
    :mod:`dialect_kernels.straight_through`.

    Attributes:
        bias: parameter [N] or None.
        original_dtype: what `weight` is decoded to; ``.to(dtype)`` changes it.
        original_name: name, from the model's root, of the layer that this one stands for.
    """

    original_dtype: torch.dtype
    original_name: str = ""
    _is_hf_initialized = True  # or transformers would write random numbers

    def decode(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weight [N, K], a new tensor in `dtype` or the original's."""
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T + bias``, [..., K] -> [..., N] in x's dtype, without a gradient."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input @ weight.T + bias``, [..., K] -> [..., N] in the input's dtype."""
        return straight_through(input, self)

    def check(self, name: str) -> None:
        """Raise ValueError, naming the tensor, if what was loaded is not valid."""
        if self.bias is not None:
            check_stored(self.bias.detach(), f"{name}.bias")

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
        return PackedWeight(self.decode, shape, self.original_dtype, self.device, _TO_WRITE)

    def decoded(self) -> nn.Linear:
        """A plain linear layer with the decoded weight."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        plain.weight = nn.Parameter(self.decode(), requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a bias or a packed tensor.

        Raises:
            RuntimeError: for `weight`, which other tools assign to replace it.
        """
        if name == "weight":
            raise RuntimeError(f"the weight of a quantized layer cannot be replaced; {_TO_REPLACE}")
        super().register_parameter(name, param)

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
        if dtype in DTYPES:  # not the storage format of layerwise casting
            self.original_dtype = dtype
        return self


def check_stored(stored: torch.Tensor, name: str) -> None:
    """Raise ValueError, naming tensor and position, if a loaded tensor holds NaN or Inf."""
    bad = ~stored.isfinite()
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: {float(stored[at])} at {list(at)}; the file is damaged, quantize the 16-bit "
            "model again"
        )
