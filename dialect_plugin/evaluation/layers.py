"""Linear layers and embeddings in a number format, and the weights that rows of a table share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F

from dialect_kernels import PackedTensor, baselines, reference
from dialect_kernels.formatbook import ActivationFormat, BookName, Rotation, book_by_name
from dialect_kernels.packed import bits_per_weight
from dialect_kernels.rotation import rotate_activation

from ..checkpoint.reader import CheckpointError
from ..scheme import LayerFormat
from .attention import Rounding
from .options import FormatName

__all__ = ["BaselineWeights", "Layer", "PackedWeights", "Weights", "rounding_of"]


Layer: TypeAlias = torch.nn.Linear | torch.nn.Embedding
"""A layer of the 16-bit model."""


class Weights(ABC):
    """The weights of a model's layers in one format.

    Attributes:
        bits: stored bits per weight.
        tensors: of the rest of the model, by their names in the checkpoint, where they are others.
    """

    bits: float
    tensors: Mapping[str, torch.Tensor] = MappingProxyType({})

    @abstractmethod
    def layer(
        self, name: str, original: torch.nn.Linear, activations: ActivationFormat | None
    ) -> torch.nn.Module:
        """A layer on these weights.

        Args:
            name: the layer.
            original: the layer in 16 bit, which gives the bias.
            activations: their format, ``"dialect"`` for the 4 bits of the weights' own format; None
                for what the layer is stored with.
        """

    @abstractmethod
    def embeddings(self, name: str, original: torch.nn.Embedding) -> torch.nn.Module:
        """Embeddings with these weights in the place of `original`."""


class PackedWeights(Weights):
    """Dialect weights.

    Args:
        packed: layer -> weight.
        own: layer -> the activations that it is stored with.
        tensors: what else is stored in other numbers than the 16-bit model's.
    """

    def __init__(
        self,
        packed: Mapping[str, PackedTensor],
        own: Mapping[str, ActivationFormat],
        tensors: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self._packed, self._own, self.tensors = packed, own, tensors
        weights = sum(weight.shape[0] * weight.shape[1] for weight in packed.values())
        self.bits = bits_per_weight(sum(weight.nbytes for weight in packed.values()), weights)

    def layer(
        self, name: str, original: torch.nn.Linear, activations: ActivationFormat | None
    ) -> torch.nn.Module:
        """The layer of a packed model in transformers."""
        from ..transformers.linear import DialectLinear  # takes seconds

        weight = self._packed[name]
        form = LayerFormat(
            cast(BookName, weight.book.name),
            weight.block_size,
            activations or self._own[name],
            weight.rotation,
        )
        # the same bits on every device, so that figures can be measured again
        return DialectLinear(weight, original.bias, form, "exact", original.weight.dtype)

    def embeddings(self, name: str, original: torch.nn.Embedding) -> torch.nn.Module:
        """The embeddings of a packed model in transformers."""
        from ..transformers.embedding import DialectEmbedding  # takes seconds

        if not DialectEmbedding.can_replace(original):
            raise _other_embeddings(name, original)
        weight = self._packed[name]
        book = cast(BookName, weight.book.name)
        form = LayerFormat(book, weight.block_size, self._own[name], "none")
        return DialectEmbedding(weight, original, form, original.weight.dtype)


class BaselineWeights(Weights):
    """Weights in a format to compare with, as the values that it rounds them to.

    Args:
        values: layer -> float32 [N, K], rotated where `rotations` says so.
        rotations: layer -> its rotation.
        name: of the format.
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor],
        rotations: Mapping[str, Rotation],
        name: FormatName,
    ) -> None:
        self._values, self._rotations, self._name = values, rotations, name
        weights = sum(weight.numel() for weight in values.values())
        stored = sum(weight.numel() * _bits(name, weight.shape[1]) for weight in values.values())
        self.bits = stored / max(1, weights)

    def layer(
        self, name: str, original: torch.nn.Linear, activations: ActivationFormat | None
    ) -> torch.nn.Module:
        """A product of rounded operands in float32."""
        return _RoundedLinear(
            self._values[name],
            original.bias,
            _rounding_of_activations(self._name, activations or "dialect"),
            self._rotations[name],
        )

    def embeddings(self, name: str, original: torch.nn.Embedding) -> torch.nn.Module:
        """The rounded rows in the model's dtype, scaled as `original` scales its own."""
        plain = copy.copy(original)
        values = self._values[name].to(original.weight.dtype)
        plain._parameters = {"weight": torch.nn.Parameter(values, requires_grad=False)}
        return plain


def _other_embeddings(name: str, original: torch.nn.Module) -> CheckpointError:
    return CheckpointError(
        f"{name}: transformers has {type(original).__name__} in its place, which packed embeddings "
        "do not replace; convert the model again with --no-embeddings"
    )


def _bits(name: FormatName, columns: int) -> float:
    """Stored bits per weight of a row: codes, and a scale of 8 bits for each block.

    FP8 has a float32 scale for each row. NVFP4's float32 scale of the whole tensor is left out.
    """
    return 8 + 32 / columns if name.format == "fp8" else 4 + 8 / name.block_size


def rounding_of(name: FormatName) -> Rounding:
    """How a format rounds activations, without its rotation."""
    if name.ours:
        book = book_by_name(name.format)
        return lambda x: reference.round_activation(x, book, name.block_size)
    if name.format == "fp8":
        return _round_to_fp8
    quantize_baseline = {"mxfp4": baselines.quantize_mxfp4, "nvfp4": baselines.quantize_nvfp4}
    return lambda x: quantize_baseline[name.format](x, name.block_size)


def _rounding_of_activations(name: FormatName, activations: ActivationFormat) -> Rounding | None:
    if activations == "none":
        return None
    return _round_to_fp8 if activations == "fp8" else rounding_of(name)


def _round_to_fp8(x: torch.Tensor) -> torch.Tensor:
    values, scale = baselines.quantize_fp8(x)
    return values.float().mul_(scale[:, None])


class _RoundedLinear(torch.nn.Module):
    """A linear layer on rounded operands: products and bias in float32, one rounding at the end.

    Args:
        weight: the weight's rounded values, float32 [N, K].
        bias: [N] or None.
        rounding: of the tokens; None leaves them in x's dtype.
        rotation: of the tokens, before they are rounded.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rounding: Rounding | None,
        rotation: Rotation,
    ) -> None:
        super().__init__()
        self._weight = weight
        self._bias = None if bias is None else bias.detach().float()
        self._rounding, self._rotation = rounding, rotation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        tokens = rotate_activation(x.reshape(-1, x.shape[-1]), self._rotation)
        rounded = tokens.to(x.dtype).float() if self._rounding is None else self._rounding(tokens)
        y = F.linear(rounded, self._weight, self._bias)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])
