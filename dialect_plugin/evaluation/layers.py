"""Linear layers and embeddings in a number format, and the weights that rows of a table share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F

from dialect_kernels import PackedTensor, baselines, reference
from dialect_kernels.formatbook import ActivationFormat, BookName, Rotation, book_by_name
from dialect_kernels.packed import bits_per_weight
from dialect_kernels.rotation import rotate_activation

from ..checkpoint.reader import CheckpointError
from ..experts import DOWN
from ..scheme import LayerFormat
from .attention import Rounding
from .options import FormatName

if TYPE_CHECKING:  # importing transformers takes seconds
    from ..transformers.experts import ExpertsPlace

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
    def experts(
        self, name: str, place: ExpertsPlace, activations: ActivationFormat | None
    ) -> torch.nn.Module:
        """The routed experts of a decoder layer on these weights.

        Args:
            name: what the checkpoint calls them.
            place: the module that has them in 16 bit.
            activations: as for :meth:`layer`.
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

        weight, form = self._packed[name], self._form(name, activations)
        # the same bits on every device, so that figures can be measured again
        return DialectLinear(weight, original.bias, form, "exact", original.weight.dtype)

    def experts(
        self, name: str, place: ExpertsPlace, activations: ActivationFormat | None
    ) -> torch.nn.Module:
        """The experts of a packed model in transformers."""
        from ..transformers.experts import DialectExperts, stacked  # takes seconds

        held = {}
        for stack, parts in place.layout.stacks.items():
            layers = [[f"{name}.{e}.{part}" for e in range(place.count)] for part in parts]
            form = self._form(layers[0][0], activations)
            packed = [[self._packed[layer] for layer in part] for part in layers]
            held[stack] = (stacked(place.layout, packed), form)
        dtype = place.module.get_parameter(DOWN).dtype
        return DialectExperts(place, held, "exact", dtype)

    def _form(self, name: str, activations: ActivationFormat | None) -> LayerFormat:
        """How a layer is quantized, with those activations."""
        weight = self._packed[name]
        return LayerFormat(
            cast(BookName, weight.book.name),
            weight.block_size,
            activations or self._own[name],
            weight.rotation,
        )

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
            _Operand(
                _rounding_of_activations(self._name, activations or "dialect"),
                self._rotations[name],
            ),
        )

    def experts(
        self, name: str, place: ExpertsPlace, activations: ActivationFormat | None
    ) -> torch.nn.Module:
        """Products of rounded operands in float32, each rounded once."""
        held = {
            stack: [[f"{name}.{e}.{part}" for e in range(place.count)] for part in parts]
            for stack, parts in place.layout.stacks.items()
        }
        products = {
            stack: _RoundedStack(
                [[self._values[layer] for layer in part] for part in layers],
                place,
                getattr(place.module, f"{stack}_bias", None),
                _Operand(
                    _rounding_of_activations(self._name, activations or "dialect"),
                    self._rotations[layers[0][0]],
                ),
            )
            for stack, layers in held.items()
        }
        return _RoundedExperts(place, *products.values())

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


class _Operand(NamedTuple):
    """What is done to the tokens of a product."""

    rounding: Rounding | None
    """None leaves them in their dtype."""
    rotation: Rotation
    """Before they are rounded."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The values of tokens [T, K] that are multiplied, float32."""
        tokens = rotate_activation(x, self.rotation)
        return tokens.to(x.dtype).float() if self.rounding is None else self.rounding(tokens)


class _RoundedLinear(torch.nn.Module):
    """A linear layer on rounded operands: products and bias in float32, one rounding at the end.

    Args:
        weight: the weight's rounded values, float32 [N, K].
        bias: [N] or None.
        operand: what is done to the tokens.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, operand: _Operand) -> None:
        super().__init__()
        self._weight = weight
        self._bias = None if bias is None else bias.detach().float()
        self._operand = operand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        y = F.linear(self._operand.of(x.reshape(-1, x.shape[-1])), self._weight, self._bias)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


class _RoundedStack:
    """As :class:`_RoundedLinear`, for tokens and the experts that they chose.

    Args:
        parts: for each part of an expert, the rounded values [I, K] of all experts.
        place: the module that has the experts in 16 bit.
        bias: [E, N] or None.
        operand: what is done to the tokens; those of all experts are rounded together.
    """

    def __init__(
        self,
        parts: list[list[torch.Tensor]],
        place: ExpertsPlace,
        bias: torch.Tensor | None,
        operand: _Operand,
    ) -> None:
        self._experts = list(zip(*parts, strict=True))
        self._rows = sum(part[0].shape[0] for part in parts)
        self._place, self._operand = place, operand
        self._bias = None if bias is None else bias.detach().float()

    def __call__(
        self, x: torch.Tensor, rows: torch.Tensor | None, offsets: torch.Tensor
    ) -> torch.Tensor:
        """The products, with the arguments and the result of ``grouped_linear``."""
        tokens = self._operand.of(x)
        y = tokens.new_zeros(len(tokens if rows is None else rows), self._rows)
        for expert, (first, end) in enumerate(pairwise(offsets.tolist())):
            if first == end:
                continue
            own = tokens[first:end] if rows is None else tokens[rows[first:end]]
            y[first:end] = self._place.layout.join([own @ w.T for w in self._experts[expert]])
            if self._bias is not None:
                y[first:end] += self._bias[expert]
        return y.to(x.dtype)


class _RoundedExperts(torch.nn.Module):
    """The experts of a decoder layer on rounded operands."""

    def __init__(self, place: ExpertsPlace, before: _RoundedStack, after: _RoundedStack) -> None:
        super().__init__()
        self._place, self._before, self._after = place, before, after

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As :meth:`..transformers.experts.DialectExperts.forward`."""
        return self._place.run(hidden_states, top_k_index, top_k_weights, self._before, self._after)
