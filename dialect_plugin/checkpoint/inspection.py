"""Inspecting a packed checkpoint: every tensor is read and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dialect_kernels.packed import bits_per_weight

from ..cache_means import attention_of
from ..experts import expert_of
from ..scheme import METHODS, LayerFormat
from .progress import Progress
from .reader import PACKED_SUFFIXES, Checkpoint, CheckpointError, PackedCheckpoint, open_packed
from .tables import layer_table, mixed_keys, only_or_blank, shape_cell

__all__ = ["Inspection", "LayerInspection", "inspect_checkpoint", "render"]


@dataclass(frozen=True)
class LayerInspection:
    """One packed layer.

    Attributes:
        name: the layer.
        rows, columns: shape of its weight.
        format: how it is quantized.
        nbytes: bytes it is stored in.
        largest_delta: largest distance of a block below its row's exponent, in binades.
        dialects: blocks per dialect id.
    """

    name: str
    rows: int
    columns: int
    format: LayerFormat
    nbytes: int
    largest_delta: int
    dialects: tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """A packed checkpoint whose every tensor has been read and is valid."""

    packed: PackedCheckpoint
    layers: tuple[LayerInspection, ...]
    means: int
    """Attention modules whose keys and values have means."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all packed layers."""
        return bits_per_weight(
            sum(layer.nbytes for layer in self.layers),
            sum(layer.rows * layer.columns for layer in self.layers),
        )


def inspect_checkpoint(path: str | Path, progress: Progress) -> Inspection:
    """Read and check every packed tensor.

    Raises:
        CheckpointError, SchemeError, ValueError: one sentence on the first fault.
    """
    packed = open_packed(path)
    tensors = packed.checkpoint.tensors
    progress.begin(
        "checking",
        len(packed.layers),
        sum(info.nbytes for name, info in tensors.items() if name.endswith(PACKED_SUFFIXES)),
    )
    layers = []
    for name in packed.layers:
        weight = packed.read(name)
        counts = torch.bincount(weight.ids().flatten().int(), minlength=len(weight.book))
        layers.append(
            LayerInspection(
                name=name,
                rows=weight.shape[0],
                columns=weight.shape[1],
                format=packed.scheme.layer(name),
                nbytes=weight.nbytes,
                largest_delta=int(weight.deltas().max()) if weight.meta.numel() else 0,
                dialects=tuple(counts.tolist()),
            )
        )
        progress.advance(weight.nbytes)
    return Inspection(packed, tuple(layers), _checked_means(packed.checkpoint))


def _checked_means(checkpoint: Checkpoint) -> int:
    """Of how many attention modules the means of keys and values are stored, all of them valid."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in checkpoint.tensors.items():
        if (held := attention_of(name)) is None:
            continue
        with checkpoint.open_shard(info.shard) as file:
            mean = file.get_tensor(name)
        if mean.dtype != torch.bfloat16 or mean.dim() != 2 or not bool(mean.isfinite().all()):
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {mean.dtype} {list(mean.shape)}; it must be finite "
                "bfloat16 numbers [heads of keys and values, head size]: convert the model again"
            )
        found.setdefault(held[0], {})[held[1]] = info.shape
    for module, shapes in found.items():
        if len(shapes) != 2 or len(set(shapes.values())) != 1:
            raise CheckpointError(
                f"{checkpoint.path}: {module} has not one mean for keys and one for values of the "
                "same shape; convert the model again"
            )
    return len(found)


def render(found: Inspection) -> str:
    """What was found, and the bytes and dialects of all layers, projections, depths and layers."""
    scheme = found.packed.scheme
    rotation = "" if scheme.rotation == "none" else f", rotation {scheme.rotation}"
    vocabulary = scheme.vocabulary(tied=found.packed.checkpoint.tied_embeddings)
    beside = f"\npacked beside the decoder layers: {vocabulary}" if vocabulary else ""
    if scheme.kv_cache != "none":
        means = f"means of {found.means} attention modules" if found.means else "no means"
        beside += f"\nKV cache in 4 bits, {means}"
        if scheme.attention != "none":
            beside += "; queries and probabilities of attention, too"
    summary = (
        f"valid: format version {scheme.format_version}, book {scheme.book}, activations "
        f"{scheme.activation_format} ({METHODS[scheme.activation_format].bits}){rotation}\n"
        f"{len(found.layers)} packed layers, {found.bits_per_weight:.3f} bits per weight; "
        f"{len(scheme.ignore)} names or patterns in 16 bit{beside}"
    )
    mixed = mixed_keys(layer.format for layer in found.layers)
    heads = ["shape", "block", *(head for _, head in mixed), "bytes"]
    heads += ["max\ndelta", "commonest\ndialects"]

    def cells(layers: Sequence[LayerInspection]) -> list[str]:
        keys = ("block_size", *(key for key, _ in mixed))
        return [
            shape_cell(layers),
            *(only_or_blank(str(getattr(layer.format, key)) for layer in layers) for key in keys),
            f"{sum(layer.nbytes for layer in layers):,}",
            str(max((layer.largest_delta for layer in layers), default=0)),
            _commonest(layers),
        ]

    listed = [layer for layer in found.layers if expert_of(layer.name) is None]
    return f"{summary}\n\n{layer_table(heads, found.layers, cells, listed)}"


def _commonest(layers: Sequence[LayerInspection]) -> str:
    """The three commonest dialects of layers that have one book, else nothing."""
    if len({layer.format.book for layer in layers}) != 1:
        return ""
    counts = [sum(column) for column in zip(*(layer.dialects for layer in layers), strict=True)]
    total = max(1, sum(counts))
    common = Counter(dict(enumerate(counts))).most_common(3)
    return " ".join(f"{identity}:{100 * count / total:.0f}%" for identity, count in common)
