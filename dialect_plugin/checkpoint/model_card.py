"""The README.md of a packed checkpoint, from ``templates/model_card.md``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from dialect_kernels import __version__
from dialect_kernels.formatbook import ROTATION_GROUP
from dialect_kernels.packed import bits_per_weight

from ..scheme import METHODS
from .layer_choice import LayerChoice
from .loss import sqnr
from .reader import Checkpoint
from .tables import mixed_keys

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
    weights = sum(layer.rows * layer.columns for layer in layers)
    return environment.get_template("model_card.md").render(
        architecture=checkpoint.architecture,
        scheme=choice.scheme,
        vocabulary=choice.scheme.vocabulary(tied=checkpoint.tied_embeddings),
        choice=choice,
        calibration=calibration,
        layers=layers,
        mixed=mixed_keys(choice.formats.values()),
        below=[layer for layer in layers if layer.rows_below_window],
        weights=weights,
        bits=bits_per_weight(sum(layer.packed_bytes for layer in layers), weights),
        sqnr_db=sqnr(sum(x.signal for x in layers), sum(x.noise for x in layers)),
        methods=METHODS,
        rotation_group=ROTATION_GROUP,
        version=__version__,
    )
