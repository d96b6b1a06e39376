"""The options of a conversion, checked without importing torch: a wrong one is refused at once."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dialect_kernels.layer_names import check_expressions

from ..scheme import Scheme

__all__ = ["ConvertOptions"]


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
