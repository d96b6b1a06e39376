"""The README.md of a packed checkpoint, from ``templates/model_card.md``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from dialect_kernels import __version__
from dialect_kernels.formatbook import ROTATION_GROUP
from dialect_kernels.packed import bits_per_weight

from ..scheme import METHODS
from .layer_choice import LayerChoice
from .loss import sqnr
from .reader import Checkpoint
from .tables import mixed_keys, without_number

if TYPE_CHECKING:
    from .calibrated import CalibrationRecord
    from .journal import LayerRecord

__all__ = ["model_card"]


def model_card(
    checkpoint: Checkpoint,
    layers: Sequence[LayerRecord],
    choice: LayerChoice,
    calibration: CalibrationRecord | None = None,
) -> str:
    """Markdown text: what was done, bits per weight, SQNR of every layer, how to serve.

    Args:
        checkpoint: the source.
        layers: what quantizing did, layer by layer.
        choice: which layers were quantized, adapted or left in 16 bit.
        calibration: what the layers were calibrated on.
    """
    environment = Environment(
        loader=PackageLoader("dialect_plugin"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown: names of layers are shown as they are
    )
    environment.filters["without_number"] = without_number
    weights = sum(layer.rows * layer.columns for layer in layers)
    rows = _without_numbers(layers)
    return environment.get_template("model_card.md").render(
        architecture=checkpoint.architecture,
        scheme=choice.scheme,
        vocabulary=choice.scheme.vocabulary(tied=checkpoint.tied_embeddings),
        choice=choice,
        calibration=calibration,
        layers=layers,
        rows=rows,
        mixed=mixed_keys(choice.formats.values()),
        below=[row.layer for row in rows if row.layer.rows_below_window],
        weights=weights,
        bits=bits_per_weight(sum(layer.packed_bytes for layer in layers), weights),
        sqnr_db=sqnr(sum(x.signal for x in layers), sum(x.noise for x in layers)),
        methods=METHODS,
        rotation_group=ROTATION_GROUP,
        version=__version__,
    )


class _Row(NamedTuple):
    """A row of the card's table: a layer, or one matrix of all experts of a decoder layer."""

    layer: LayerRecord
    matrices: int
    """How many matrices it stands for."""
    name: str
    """One of the layers, which has the format of all."""


def _without_numbers(layers: Sequence[LayerRecord]) -> list[_Row]:
    rows: dict[str, _Row] = {}
    for layer in layers:
        name = without_number(layer.name)
        if name not in rows:
            rows[name] = _Row(replace(layer, name=name), 1, layer.name)
            continue
        found, matrices, first = rows[name]
        total = replace(
            found,
            packed_bytes=found.packed_bytes + layer.packed_bytes,
            signal=found.signal + layer.signal,
            noise=found.noise + layer.noise,
            rows_below_window=found.rows_below_window + layer.rows_below_window,
        )
        rows[name] = _Row(total, matrices + 1, first)
    return list(rows.values())
