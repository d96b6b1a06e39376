"""The options of a calibration, checked without importing torch or transformers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["DEFAULT_TEXT", "CalibrationOptions"]

DEFAULT_TEXT = "default"
"""The name of the calibration text that is installed with the package."""


class CalibrationOptions(BaseModel):
    """Options of a calibration.

    Attributes:
        calibrate: a text file, a JSONL file of texts or chat messages, ``"default"``, a data set:
            ``owner/name/configuration:split:column`` or a directory, the last three parts optional.
        samples: most windows of text to run.
        sequence_length: tokens in a window.
        damping: share of the mean diagonal of the second moments that is added to the diagonal.
        balance: whether powers of two move between a layer's input channels and what produces them.
        device: where blocks run and weights are rounded, e.g. ``"cpu"`` or ``"cuda"``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibrate: str = DEFAULT_TEXT
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    damping: float = Field(default=0.01, gt=0, le=1)
    balance: bool = False
    device: str = "cpu"
