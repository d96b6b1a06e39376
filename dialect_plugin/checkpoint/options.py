"""The options of a conversion, checked without importing torch: a wrong one is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dialect_kernels.layer_names import check_expressions

from ..scheme import LayerOverride, Scheme
from .json_files import read_json

__all__ = ["ConvertOptions", "read_overrides"]


class ConvertOptions(BaseModel):
    """Options of a conversion.

    Attributes:
        scheme: formats and block sizes; its patterns may match many layers. The checkpoint's own
            scheme has exact names instead, and is always serialized.
        targets: patterns of the layers to quantize, instead of the architecture's table.
        experts: whether the routed experts of a mixture are quantized like any other layer.
        strict: refuse a layer whose columns its block size does not divide, instead of taking
            another block size or leaving the layer in 16 bit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: Scheme = Field(default_factory=Scheme)
    targets: list[str] = Field(default_factory=list)
    experts: bool = True
    strict: bool = False

    @field_validator("targets")
    @classmethod
    def _targets_compile(cls, patterns: list[str]) -> list[str]:
        check_expressions(patterns)
        return patterns


def read_overrides(options: list[str], file: Path | None) -> dict[str, Any]:
    """The overrides of a scheme, of a file and of the command line, which goes before the file.

    Args:
        options: ``PATTERN=BLOCK_SIZE`` or ``PATTERN=KEY:VALUE``.
        file: JSON, as ``blockdialect plan`` writes it.

    Raises:
        ValueError: one sentence, at the first that is not valid.
    """
    merged: dict[str, Any] = {}
    for option in options:
        pattern, _, value = option.rpartition("=")
        key, colon, chosen = value.partition(":")
        if not colon:
            key, chosen = "block_size", value
        keys = merged.setdefault(pattern, {})
        keys[key] = int(chosen) if chosen.isdecimal() else chosen
        try:
            LayerOverride.model_validate(keys)
        except ValidationError:
            pattern = ""
        if not pattern:
            raise ValueError(
                f"--override: {option!r}; it must be PATTERN=BLOCK_SIZE with a block size of 16, "
                "32 or 64, such as 're:.*down_proj=16', or PATTERN=KEY:VALUE with book, "
                "activation_format or rotation, such as 're:.*down_proj=rotation:none'"
            )
    if file is not None:
        if not file.exists():
            raise ValueError(f"--overrides: {file} is not there; give a file such as `plan` writes")
        for pattern, override in Scheme.parse(
            {"overrides": read_json(file, unique=True)}, str(file)
        ).overrides.items():
            merged.setdefault(pattern, override)
    return merged
