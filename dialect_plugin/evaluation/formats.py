"""The formats of an evaluation: what their rows are called, and how their weights are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, cast

import torch

from dialect_kernels import quantize
from dialect_kernels.formatbook import ActivationFormat, BookName, Rotation, book_by_name
from dialect_kernels.rotation import rotate_weight

from ..checkpoint.calibrated import rescaled_tensors
from ..checkpoint.reader import CheckpointError, PackedCheckpoint
from ..scheme import METHODS, LayerFormat, fitted
from .attention import AttentionRounding
from .calibrated_peers import CalibratedPeers
from .layers import BaselineWeights, Layer, PackedWeights, Weights, rounding_of
from .options import Activations, FormatName, Scope

__all__ = ["Format", "format_of", "packed_format"]

_BY_BITS: Final[Mapping[Activations, ActivationFormat]] = {
    "w4a4": "dialect", "w4a8": "fp8", "w4a16": "none"
}  # fmt: skip
_MIXED = "mixed"


class Format(ABC):
    """A format of which an evaluation shows a row for each kind of activations.

    Attributes:
        name: in tables.
        ours: whether it is a format of this project.
    """

    name: str
    ours: bool

    @abstractmethod
    def rows(self, wanted: tuple[Activations, ...]) -> dict[str, ActivationFormat | None]:
        """Label of a row -> its activations, as :meth:`Weights.layer` takes them."""

    @abstractmethod
    def weights(self, layers: Mapping[str, Layer]) -> Weights:
        """The weights of the layers of a 16-bit model in this format."""

    def activations_of_tied(self, activations: ActivationFormat | None) -> ActivationFormat | None:
        """Those of an output projection that is tied to embeddings, in a row with `activations`."""
        return "none"

    @abstractmethod
    def attention(self, query_key_block_size: int | None) -> AttentionRounding:
        """How it rounds the operands of attention's products.

        Args:
            query_key_block_size: of Q and K, if it is a format of this project; None for its own.
        """


class _Packed(Format):
    """A packed checkpoint."""

    def __init__(self, name: str, packed: PackedCheckpoint) -> None:
        self.name, self.ours = name, True
        self._packed = packed
        self._own = {layer: packed.scheme.layer(layer).activation_format for layer in packed.layers}

    def rows(self, wanted: tuple[Activations, ...]) -> dict[str, ActivationFormat | None]:
        found: dict[str, ActivationFormat | None] = {}
        kinds = set(self._own.values())
        for choice in wanted:
            if choice != "own":
                found.setdefault(METHODS[_BY_BITS[choice]].bits, _BY_BITS[choice])
            elif len(kinds) == 1:
                [only] = kinds
                found.setdefault(METHODS[only].bits, only)
            else:
                found[_MIXED] = None
        return found

    def weights(self, layers: Mapping[str, Layer]) -> Weights:
        device = next(iter(layers.values())).weight.device
        packed = {layer: self._packed.read(layer).to(device) for layer in self._packed.layers}
        return PackedWeights(packed, self._own, rescaled_tensors(self._packed.checkpoint))

    def activations_of_tied(self, activations: ActivationFormat | None) -> ActivationFormat | None:
        return activations

    def attention(self, query_key_block_size: int | None) -> AttentionRounding:
        scheme = self._packed.scheme
        return _attention(FormatName(scheme.book, scheme.block_size), query_key_block_size)


class _Named(Format):
    """An emulated format."""

    def __init__(self, name: FormatName, calibrated: CalibratedPeers | None) -> None:
        self.name, self.ours = str(name), name.ours
        self._name, self._calibrated = name, calibrated

    def rows(self, wanted: tuple[Activations, ...]) -> dict[str, ActivationFormat | None]:
        if self._name.format == "fp8":
            return {"W8A8": "fp8"}
        kinds = dict.fromkeys("w4a4" if choice == "own" else choice for choice in wanted)
        return {METHODS[_BY_BITS[kind]].bits: _BY_BITS[kind] for kind in kinds}

    def weights(self, layers: Mapping[str, Layer]) -> Weights:
        if self.ours:
            return self._dialects(layers)
        rotations = {layer: self._rotation(original) for layer, original in layers.items()}
        done = {} if self._calibrated is None else self._calibrated.read(self._name)
        round_ = rounding_of(self._name)
        values = {}
        for layer, original in layers.items():
            weight = original.weight.detach()
            found = done.get(layer)
            if found is None:
                found = round_(rotate_weight(weight, rotations[layer]))
            values[layer] = found.to(weight.device)
        return BaselineWeights(values, rotations, self._name)

    def _rotation(self, original: Layer) -> Rotation:
        if isinstance(original, torch.nn.Embedding):
            return "none"
        return self._name.rotation_for(original.weight.shape[1])

    def _dialects(self, layers: Mapping[str, Layer]) -> Weights:
        book = book_by_name(self._name.format)
        packed = {}
        for layer, original in layers.items():
            columns = original.weight.shape[1]
            rotation = self._rotation(original)
            wanted = LayerFormat(
                cast(BookName, book.name), self._name.block_size, "dialect", rotation
            )
            form = fitted(wanted, columns)
            if form is None:
                raise CheckpointError(
                    f"{layer}: its {columns} columns are no multiple of a block size, "
                    f"so that {self.name} cannot be emulated; leave that format out"
                )
            packed[layer] = quantize(
                original.weight.detach(),
                book,
                form.block_size,
                name=f"{layer}.weight",
                rotation=form.rotation,
            )
        return PackedWeights(packed, dict.fromkeys(packed, "dialect"))

    def attention(self, query_key_block_size: int | None) -> AttentionRounding:
        return _attention(self._name, query_key_block_size)


def packed_format(name: str, packed: PackedCheckpoint, scope: Scope) -> Format:
    """The format of a packed checkpoint.

    Raises:
        CheckpointError: if attention should be rounded and the checkpoint's tokens are not rounded
            to 4 bits.
    """
    found = _Packed(name, packed)
    if scope == "all" and packed.scheme.activation_format != "dialect":
        raise CheckpointError(
            f"{packed.checkpoint.path}: its activations are "
            f"{packed.scheme.activation_format}, and --scope all rounds attention to 4 bits only; "
            "use --scope linear"
        )
    return found


def format_of(name: FormatName, calibrated: CalibratedPeers | None) -> Format:
    """An emulated format.

    Args:
        name: the format.
        calibrated: holds its weights if it is calibrated.
    """
    return _Named(name, calibrated if name.gptq else None)


def _attention(name: FormatName, query_key_block_size: int | None) -> AttentionRounding:
    query_key = name
    if name.ours and query_key_block_size is not None:
        query_key = replace(name, block_size=query_key_block_size)
    return AttentionRounding(rounding_of(query_key), rounding_of(name), name.block_size)
