"""The options of an evaluation, checked without importing torch or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from dialect_kernels.formatbook import (
    BLOCK_SIZES,
    ROTATION_GROUP,
    BlockSize,
    BookName,
    Rotation,
)

from ..calibration.options import DEFAULT_TEXT, CalibrationOptions

__all__ = ["Activations", "EvaluationOptions", "FormatName", "Scope"]

Activations: TypeAlias = Literal["own", "w4a4", "w4a8", "w4a16"]
"""Activations of a row: those of the format itself, or 4-bit, FP8 or 16-bit ones."""
Scope: TypeAlias = Literal["linear", "all"]
"""Whether the linear layers alone are emulated, or the products of attention too."""

_Family: TypeAlias = Literal["fp8", "mxfp4", "nvfp4"] | BookName
_PEERS: Final[Mapping[str, tuple[_Family, int]]] = {
    "fp8": ("fp8", 0),
    "mxfp4-32": ("mxfp4", 32),
    "mxfp4-16": ("mxfp4", 16),
    "nvfp4-16": ("nvfp4", 16),
}
_OURS: Final[Mapping[str, tuple[_Family, int]]] = {
    f"{book}-{size}": (book, size) for book in get_args(BookName) for size in BLOCK_SIZES
}
_KNOWN: Final = {**_PEERS, **_OURS}
_ROTATED, _CALIBRATED = "+rotation", "+gptq"


@dataclass(frozen=True)
class FormatName:
    """A format that is emulated in the layers of the packed checkpoint.

    Attributes:
        format: ``"fp8"``, ``"mxfp4"``, ``"nvfp4"``, or a formatbook of ours.
        block_size: elements with one scale; 0 for FP8, whose scales are of rows and tokens.
        rotation: of weights and activations.
        gptq: whether the weights are rounded on calibration text.
    """

    format: _Family
    block_size: int
    rotation: Rotation = "none"
    gptq: bool = False

    @classmethod
    def parse(cls, name: str) -> FormatName:
        """Read a name such as ``nvfp4-16+rotation+gptq``.

        Raises:
            ValueError: naming what is allowed.
        """
        base, *additions = name.strip().split("+")
        rotated, calibrated = (addition[1:] in additions for addition in (_ROTATED, _CALIBRATED))
        if base not in _KNOWN or len(additions) != rotated + calibrated:
            raise ValueError(
                f"{name.strip()!r} is not a format; it must be one of {', '.join(_KNOWN)}, with "
                f"{_ROTATED} and {_CALIBRATED} where they are wanted"
            )
        if calibrated and base not in _PEERS:
            raise ValueError(
                f"{name.strip()!r} would be calibrated here; convert the model with --calibrate "
                "and evaluate that"
            )
        if calibrated and base == "fp8":
            raise ValueError(
                f"{name.strip()!r} rounds to 8 bits, which needs no gptq; leave it out"
            )
        return cls(*_KNOWN[base], "hadamard_32" if rotated else "none", calibrated)

    @property
    def ours(self) -> bool:
        """Whether it is a formatbook of this project."""
        return self.format in get_args(BookName)

    def rotation_for(self, columns: int) -> Rotation:
        """The rotation of a layer with so many inputs."""
        return "none" if columns % ROTATION_GROUP else self.rotation

    def __str__(self) -> str:
        base = next(
            name for name, known in _KNOWN.items() if known == (self.format, self.block_size)
        )
        rotated = _ROTATED if self.rotation != "none" else ""
        return f"{base}{rotated}{_CALIBRATED if self.gptq else ''}"


class EvaluationOptions(BaseModel):
    """Options of an evaluation.

    Attributes:
        text: a text file, a JSONL file of texts or chat messages, or a data set.
        windows: most windows of the text to run, evenly spread.
        sequence_length: tokens in a window, of calibration text too.
        activations: of the packed checkpoint and of every format.
        formats: emulated in the same layers.
        calibrate: text on which formats with ``+gptq`` are calibrated.
        samples: most windows of calibration text.
        scope: what is rounded.
        query_key_block_size: elements per block of Q and K, in formats of this project; None for
            that of the format. Only in the scope ``"all"``.
        ratio_to: the row that the others' divergence is divided by, in the same activations.
        worst: how many positions of the largest divergence to keep.
        device: where the model runs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    windows: int = Field(default=16, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    scope: Scope = "linear"
    query_key_block_size: BlockSize | None = None
    activations: tuple[Activations, ...] = ("own",)
    formats: tuple[FormatName, ...] = ()
    calibrate: str | None = Field(default=None, validate_default=True)
    samples: int = Field(default=CalibrationOptions().samples, ge=1)
    ratio_to: str | None = None
    worst: int = Field(default=10, ge=0)
    device: str = "cpu"

    @field_validator("text")
    @classmethod
    def _not_the_calibration_text(cls, text: str) -> str:
        if text == DEFAULT_TEXT:
            raise ValueError("models are calibrated on that text; give a file of other text")
        return text

    @field_validator("query_key_block_size")
    @classmethod
    def _rounds_attention(cls, size: int | None, info: ValidationInfo) -> int | None:
        if size is not None and info.data.get("scope") == "linear":
            raise ValueError("Q and K are rounded with --scope all only; leave it out")
        return size

    @field_validator("activations", mode="before")
    @classmethod
    def _listed_activations(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, str):
            given = [name.strip() for name in given.split(",")]
        known = get_args(Activations)
        if not set(given) <= set(known) or not given:
            raise ValueError(f"it must be some of {', '.join(known)}, separated by commas")
        if info.data.get("scope") == "all" and not set(given) <= {"own", "w4a4"}:
            raise ValueError("--scope all rounds attention to 4 bits: give own or w4a4")
        return tuple(dict.fromkeys(given))

    @field_validator("formats", mode="before")
    @classmethod
    def _listed_formats(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, str):
            given = [FormatName.parse(name) for name in given.split(",") if name.strip()]
        if info.data.get("scope") == "all" and any(name.format == "fp8" for name in given):
            raise ValueError("--scope all rounds attention to 4 bits: leave fp8 out")
        return tuple(dict.fromkeys(given))

    @field_validator("calibrate")
    @classmethod
    def _calibrates_something(cls, calibrate: str | None, info: ValidationInfo) -> str | None:
        calibrated = [str(name) for name in info.data.get("formats", ()) if name.gptq]
        if calibrated and calibrate is None:
            raise ValueError(f"{calibrated[0]} needs text: give a file or {DEFAULT_TEXT}")
        if calibrate is not None and calibrate == info.data.get("text"):
            raise ValueError("the formats are evaluated on that text; calibrate on other text")
        if calibrate is not None and "formats" in info.data and not calibrated:
            raise ValueError(f"it has no effect without a format with {_CALIBRATED}: leave it out")
        return calibrate

    @property
    def calibration(self) -> CalibrationOptions:
        """The options of the calibration of formats with ``+gptq``."""
        return CalibrationOptions(
            calibrate=self.calibrate or DEFAULT_TEXT,
            samples=self.samples,
            sequence_length=self.sequence_length,
            device=self.device,
        )
