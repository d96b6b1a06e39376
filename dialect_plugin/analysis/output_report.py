"""Where a model hurts: the formats' errors of each layer's output on text, before a conversion.

The estimated loss of a layer, in nats per token, says what its error does to the model's
predictions (:mod:`.output_error`); such losses add up. The SQNR of its output compares formats in
one layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.loss import sqnr
from ..checkpoint.tables import aligned, folded, layer_table
from ..experts import prefixes
from ..scheme import METHODS, ActivationFormat, BookName, Rotation, fitting_block_size
from .output_error import FINEST_FIRST, ExpertOutput, LayerOutput
from .report import dialect_name, sample_note

__all__ = [
    "SHOWN",
    "OutputReport",
    "expert_cells",
    "expert_notes",
    "nats_of",
    "render",
    "sqnr_of_output",
    "unseen_experts",
]

SHOWN = dialect_name(32)
"""The format whose losses stand for a layer."""


@dataclass(frozen=True)
class OutputReport:
    """A checkpoint's layers in all formats, on text.

    Attributes:
        source: name of the checkpoint.
        text: name of the text.
        formats: names of the formats, in the order to show them.
        layers: one entry per layer that a conversion would quantize.
        book: formatbook of BlockDialect.
        rotation: of weights and activations where it divides the columns, in all formats.
        unseen: experts' modules that could not be measured.
    """

    source: str
    text: str
    formats: tuple[str, ...]
    layers: tuple[LayerOutput, ...]
    book: BookName
    rotation: Rotation
    unseen: tuple[str, ...] = ()

    def bits(self, name: str) -> float:
        """Bits per weight of a format over all layers that have it."""
        having = [layer for layer in self.layers if name in layer.losses]
        bits = sum(layer.weights * layer.losses[name].bits_per_weight for layer in having)
        return bits / max(1, sum(layer.weights for layer in having))

    def share(self, layers: Sequence[LayerOutput]) -> float:
        """Their share of the loss of all layers in W4A4, in blocks of 32 or of what fits."""
        some, whole = (sum(map(_usual_nats, those)) for those in (layers, self.layers))
        return some / whole if whole else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON data; an SQNR without noise, which is infinite, is None."""
        return {
            "source": self.source,
            "text": self.text,
            "book": self.book,
            "rotation": self.rotation,
            "formats": list(self.formats),
            "layers": [_layer_to_json(layer) for layer in self.layers],
            "experts_not_measured": list(self.unseen),
            "totals": {
                name: {
                    "bits_per_weight": self.bits(name),
                    "nats": {METHODS[a].bits: nats_of(self.layers, name, a) for a in METHODS},
                }
                for name in self.formats
            },
        }


def _usual(layer: LayerOutput) -> str:
    """The format of the blocks that a conversion takes."""
    return dialect_name(fitting_block_size(layer.columns, 32) or 32)


def _usual_nats(layer: LayerOutput) -> float:
    """The loss of a layer in W4A4, in the blocks that a conversion takes."""
    return nats_of([layer], _usual(layer), "dialect") or 0.0


def _worst(layer: LayerOutput) -> ExpertOutput:
    """The expert that loses most in W4A4, in the blocks that a conversion takes."""
    return max(layer.experts, key=lambda expert: expert.nats[_usual(layer)]["dialect"])


def unseen_experts(layers: Iterable[str], measured: Sequence[LayerOutput]) -> tuple[str, ...]:
    """Experts' modules of `layers` that transformers runs in a way that shows no inputs."""
    names = {layer.name.rpartition(".")[0] for layer in measured if layer.experts}
    return tuple(prefix for prefix in prefixes(layers) if prefix not in names)


def expert_notes(layers: Sequence[LayerOutput], unseen: Sequence[str]) -> str:
    """What a table does not tell of experts, in whole lines; empty if there is nothing to say."""
    parts = [expert for layer in layers for expert in layer.experts]
    rare = sum(expert.rare for expert in parts)
    idle = sum(not expert.tokens for expert in parts)
    lines = []
    if rare or idle:
        lines.append(
            f"of {len(parts)} matrices of experts, {rare} saw too few tokens to be calibrated "
            "(rare) and were rounded to\n"
            f"nearest, and {idle} saw no measured token and count no error: more text reaches more "
            "experts (--samples)\n"
        )
    if unseen:
        lines.append(
            f"{folded(unseen)}: not measured, because transformers does not show what each expert "
            "sees;\nthey keep the scheme's format\n"
        )
    return "".join(lines)


def _layer_to_json(layer: LayerOutput) -> dict[str, Any]:
    return {
        "name": layer.name,
        "rows": layer.rows,
        "columns": layer.columns,
        "measured_rows": layer.measured_rows,
        "signal": layer.signal,
        "losses": {
            name: {
                "bits_per_weight": loss.bits_per_weight,
                "noise": _by_method(loss.noise),
                "sqnr_db": _by_method(
                    {a: _finite(sqnr_of_output([layer], name, a)) for a in METHODS}
                ),
                "nats": _by_method(loss.nats),
            }
            for name, loss in layer.losses.items()
        },
    } | ({"experts": _experts_to_json(layer)} if layer.experts else {})


def _experts_to_json(layer: LayerOutput) -> dict[str, Any]:
    """The experts of a layer, in their order; losses are those in W4A4."""
    usual = _usual(layer)
    return {
        "worst": _worst(layer).number,
        "rare": [expert.number for expert in layer.experts if expert.rare],
        "tokens": [expert.tokens for expert in layer.experts],
        "nats": {usual: [expert.nats[usual]["dialect"] for expert in layer.experts]},
    }


def _by_method(values: Mapping[ActivationFormat, Any]) -> dict[str, Any]:
    return {METHODS[activations].bits: value for activations, value in values.items()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def sqnr_of_output(
    layers: Sequence[LayerOutput], name: str, activations: ActivationFormat
) -> float | None:
    """SQNR in dB of the outputs of those layers that have a format; None if none has."""
    having = [layer for layer in layers if name in layer.losses]
    noise = sum(layer.losses[name].noise[activations] for layer in having)
    return sqnr(sum(layer.signal for layer in having), noise) if having else None


def nats_of(
    layers: Sequence[LayerOutput], name: str, activations: ActivationFormat
) -> float | None:
    """Estimated loss in nats per token of those layers that have a format; None if none has."""
    losses = [layer.losses[name].nats[activations] for layer in layers if name in layer.losses]
    return sum(losses) if losses else None


def render(report: OutputReport) -> str:
    """The estimated loss over all layers, per projection, per decoder layer and per layer."""
    columns: list[tuple[str, ActivationFormat]] = [(SHOWN, a) for a in FINEST_FIRST]
    columns += [(name, "dialect") for name in report.formats if name != SHOWN]

    def cells(layers: Sequence[LayerOutput]) -> list[str]:
        losses = [nats_of(layers, *column) for column in columns]
        ratio = sqnr_of_output(layers, SHOWN, "dialect")
        return [
            f"{100 * report.share(layers):.1f}",
            *("–" if nats is None else f"{1000 * nats:.3f}" for nats in losses),
            "–" if ratio is None else f"{ratio:.1f}",
        ]

    heads = [
        name.replace("BlockDialect", "Dialect").replace("-", "\n") + f"\n{METHODS[a].bits}"
        for name, a in columns
    ]
    bits = [f"{report.bits(name):.3f}" for name, _ in columns]
    table = layer_table(
        ["% of\nall", *heads, "output\nSQNR\ndB"],
        report.layers,
        cells,
        first=[("bits per weight", "", *bits, "")],
    )
    of_experts = [layer for layer in report.layers if layer.experts]
    if of_experts:
        of_one = ("experts", "worst", "% of its\nlayer", "rare", "without\ntokens")
        rows = [(layer.name, *expert_cells(layer)) for layer in of_experts]
        table += "\n\n" + aligned(("matrices of experts", *of_one), rows)
    rotated = "" if report.rotation == "none" else f", rotated by {report.rotation}"
    return (
        "estimated loss in thousandths of a nat per token: the KL divergence of the model's\n"
        "predictions if a layer alone is rounded; share and output SQNR are those of blocks of 32\n"
        f"in W4A4; on {report.text}, book {report.book}{rotated}\n"
        f"{sample_note(report.layers)}\n{expert_notes(report.layers, report.unseen)}\n{table}"
    )


def expert_cells(layer: LayerOutput) -> tuple[str, ...]:
    """How many experts, the one that loses most, its share in percent, rare ones and idle ones."""
    worst, whole = _worst(layer), _usual_nats(layer)
    share = worst.nats[_usual(layer)]["dialect"] / whole if whole else 0.0
    rare = sum(expert.rare for expert in layer.experts)
    idle = sum(not expert.tokens for expert in layer.experts)
    return (
        *(str(len(layer.experts)), str(worst.number) if whole else "–", f"{100 * share:.1f}"),
        *(str(rare), str(idle)),
    )
