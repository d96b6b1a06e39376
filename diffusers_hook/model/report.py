"""The summary of what the hook has done, as data and as a table."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dialect_kernels.packed import bits_per_weight

from ..layers.dialect import DialectLinear
from ..layers.fp8 import Fp8Linear
from ..layouts import Layout
from .attach import Attached, blocks_read
from .share import share_in_4_bit

__all__ = ["Summary", "TransformerSummary", "summarize"]

_PLACES = {"disk": "on disk", "host": "in host memory", "none": "nowhere"}


@dataclass(frozen=True)
class TransformerSummary:
    """One transformer, or encoder.

    Attributes:
        name: its name in the pipeline.
        model: its class.
        layers: linear layers in 4 bit.
        fp8_layers: modulation layers in FP8.
        bits: bits per weight of the 4-bit layers.
        share: share of the parameters before that are in 4 bit now.
        blocks_in_16_bit: blocks that have no layer in 4 bit.
        blocks: blocks whose attention tells salient tokens and groups, by the configuration.
        blocks_read: those whose attention still has the processor that tells them.
        bytes_before: bytes of all parameters before quantization.
        bytes_after: bytes of all parameters and buffers now.
        bytes_by_device: the same for each device, e.g. ``"cuda:0"``; ``"offloaded"`` are those on
            no device (accelerate's sequential offload).
        host_bytes: bytes of 16-bit weights kept in host memory for ``disable``.
        originals: where the 16-bit weights are: ``"disk"``, ``"host"``, ``"none"``.
        calls: calls of it so far.
        protects: whether steps are protected in generations that allow it.
        protected_steps: those of the generation that began last.
        protected_why: what chose them, or why there are none.
        protected_calls: calls in protected steps.
        chooses: whether salient tokens are chosen.
        decomposes: whether tokens are decomposed: salient ones, or by now those of protected steps.
        makes_groups: whether tokens are grouped (SeDA).
        salient_share: decomposed rows over all rows of the video, and of text in one attention with
            it, that went through 4-bit layers; those of cross-attention's text do not count.
        groups: SeDA groups per block and branch, the mean over those in force.
        grouped_share: share of the video tokens that are in a group.
        salient_refreshes: how often salient tokens were chosen.
        group_refreshes: how often groups were made.
        seconds: time in the hook's parts, by name; on a GPU the time to launch them.
    """

    name: str
    model: str
    layers: int
    fp8_layers: int
    bits: float
    share: float
    blocks_in_16_bit: int
    blocks: int
    blocks_read: int
    bytes_before: int
    bytes_after: int
    bytes_by_device: Mapping[str, int]
    host_bytes: int
    originals: str
    calls: int
    protects: bool
    protected_steps: tuple[int, ...]
    protected_why: str
    protected_calls: int
    chooses: bool
    decomposes: bool
    makes_groups: bool
    salient_share: float
    groups: float
    grouped_share: float
    salient_refreshes: int
    group_refreshes: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Summary:
    """Every transformer of a pipeline; `print` shows a table."""

    transformers: tuple[TransformerSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON's types."""
        return {found.name: asdict(found) for found in self.transformers}

    def __str__(self) -> str:
        """The table."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title="SemanticDialect", title_justify="left")
        table.add_column("")
        columns = [dict(_lines(found)) for found in self.transformers]
        for found in self.transformers:
            table.add_column(found.name, justify="right")
        for label in dict.fromkeys(label for column in columns for label in column):
            table.add_row(label, *(column.get(label, "") for column in columns))
        out = io.StringIO()
        Console(file=out, width=100).print(table)
        return out.getvalue().rstrip()

    __repr__ = __str__


def summarize(name: str, module: nn.Module, attached: Attached) -> TransformerSummary:
    """The figures of one transformer."""
    layers = [layer for layer in module.modules() if isinstance(layer, DialectLinear)]
    meter = attached.state.meter
    config = attached.config
    sizes = attached.state.group_sizes()
    originals = attached.originals
    protection = attached.state.protection
    bytes_by_device = _bytes_by_device(module)
    return TransformerSummary(
        name=name,
        model=type(module).__name__,
        layers=len(layers),
        fp8_layers=sum(isinstance(layer, Fp8Linear) for layer in module.modules()),
        bits=_bits(layers),
        share=share_in_4_bit(module),
        blocks_in_16_bit=_blocks_in_16_bit(module, attached.layout),
        blocks=attached.blocks_to_read,
        blocks_read=blocks_read(module),
        bytes_before=attached.bytes_before,
        bytes_after=sum(bytes_by_device.values()),
        bytes_by_device=bytes_by_device,
        host_bytes=0 if originals is None else originals.host_bytes,
        originals="none" if originals is None else originals.place,
        calls=meter.counts["calls"],
        protects=config.protects,
        protected_steps=() if protection is None else tuple(sorted(protection.steps)),
        protected_why="no generation yet" if protection is None else protection.reason,
        protected_calls=meter.counts["protected calls"],
        chooses=config.decomposes,
        decomposes=config.decomposes or meter.counts["decomposed rows"] > 0,
        makes_groups=config.groups,
        salient_share=meter.counts["decomposed rows"] / max(1, meter.counts["rows"]),
        groups=sum(groups for groups, _ in sizes) / max(1, len(sizes)),
        grouped_share=sum(share for _, share in sizes) / max(1, len(sizes)),
        salient_refreshes=meter.counts["salient refreshes"],
        group_refreshes=meter.counts["group refreshes"],
        seconds=dict(meter.seconds),
    )


def _blocks_in_16_bit(module: nn.Module, layout: Layout) -> int:
    return sum(
        not any(isinstance(part, DialectLinear) for part in block.module.modules())
        for block in layout.blocks(module)
    )


def _bits(layers: list[DialectLinear]) -> float:
    stored = sum(tensor.nbytes for layer in layers for tensor in layer.packed_tensors.values())
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return bits_per_weight(stored, weights)


def _bytes_by_device(module: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers on each device; memory that several share counts once."""
    found: Counter[str] = Counter()
    seen = set()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "meta":
            found["offloaded"] += tensor.nbytes
            continue
        place, storage = str(tensor.device), tensor.untyped_storage()
        if (place, storage.data_ptr()) not in seen:
            seen.add((place, storage.data_ptr()))
            found[place] += storage.nbytes()
    return dict(found)


def _lines(found: TransformerSummary) -> list[tuple[str, str]]:
    lines = [
        ("model", found.model),
        ("layers in 4 bit", f"{found.layers}"),
        ("parameters in 4 bit", f"{found.share:.1%}"),
        *([("blocks in 16 bit", f"{found.blocks_in_16_bit}")] if found.blocks_in_16_bit else []),
        *([("modulation layers in FP8", f"{found.fp8_layers}")] if found.fp8_layers else []),
        ("bits per weight", f"{found.bits:.3f}"),
        ("MiB before", f"{found.bytes_before / 2**20:.1f}"),
        ("MiB now", f"{found.bytes_after / 2**20:.1f}"),
        *(
            (f"MiB now, {place}", f"{held / 2**20:.1f}")
            for place, held in found.bytes_by_device.items()
        ),
        ("MiB now, host (16-bit copy)", f"{found.host_bytes / 2**20:.1f}"),
        ("16-bit weights are kept", _PLACES[found.originals]),
        ("calls", f"{found.calls}"),
    ]
    if found.blocks:
        lines.append(("blocks that are read", f"{found.blocks_read} of {found.blocks}"))
    if found.protects:
        lines.append(("protected steps", _protected(found)))
        lines.append(("calls in protected steps", f"{found.protected_calls}"))
    if found.decomposes:
        lines.append(("decomposed rows", f"{found.salient_share:.1%}"))
    if found.chooses:
        lines.append(("salient-token refreshes", f"{found.salient_refreshes}"))
    if found.makes_groups:
        lines += [
            ("groups per block", f"{found.groups:.1f}"),
            ("tokens in groups", f"{found.grouped_share:.1%}"),
            ("group refreshes", f"{found.group_refreshes}"),
        ]
    return lines + [(f"seconds, {part}", f"{spent:.3f}") for part, spent in found.seconds.items()]


def _protected(found: TransformerSummary) -> str:
    """The protected steps and why these, or why none."""
    steps = ", ".join(str(step) for step in found.protected_steps) or "none"
    return f"{steps} ({found.protected_why})"
