"""The quantization scheme: what ``quantization_config`` in a config.json may say, typed and closed.

One class serves the converter, the command line and the vLLM plugin. A *packed* checkpoint carries
a scheme with ``serialized: true`` whose `ignore` and `overrides` are resolved to exact names; an
*online* scheme (``serialized: false``) is applied to a 16-bit checkpoint while it is loaded.

Layer names are the checkpoint's own (unfused) module names. Patterns:
:mod:`dialect_kernels.layer_names`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dialect_kernels.formatbook import (
    BLOCK_SIZES,
    ActivationFormat,
    BlockSize,
    BookName,
    Formatbook,
    book_by_name,
)
from dialect_kernels.layer_names import check_expressions, is_expression, matches, near_misses

__all__ = [
    "FORMAT_VERSION",
    "METHODS",
    "QUANT_METHOD",
    "ActivationFormat",
    "BlockSize",
    "BookName",
    "LayerOverride",
    "Method",
    "Scheme",
    "SchemeError",
    "SentenceError",
    "check_patterns",
    "first_fault",
    "fitting_block_size",
]

QUANT_METHOD: Final = "blockdialect"
FORMAT_VERSION: Final = 1


class Method(NamedTuple):
    """A way to serve packed weights, by the format of the activations."""

    bits: str
    """What tables call it, such as ``"W4A4"``: bits of weights and activations."""
    quantization: str
    """The name that ``vllm serve --quantization`` takes."""


METHODS: Final[Mapping[ActivationFormat, Method]] = {
    "dialect": Method("W4A4", QUANT_METHOD),
    "fp8": Method("W4A8", f"{QUANT_METHOD}_w4a8"),
    "none": Method("W4A16", f"{QUANT_METHOD}_w4a16"),
}
"""Activation format -> its names."""


class SentenceError(ValueError):
    """An error that is one line, whatever names and values of somebody's file stand in it.

    Characters that a terminal does not print are shown as their escapes.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(
            "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence),
        )


class SchemeError(SentenceError):
    """A scheme that cannot be used; one sentence with field, value and remedy."""


class LayerOverride(BaseModel):
    """What differs from the scheme for the layers a pattern matches."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    block_size: BlockSize


class Scheme(BaseModel):
    """A BlockDialect quantization scheme.

    Attributes:
        quant_method: always ``"blockdialect"``.
        format_version: version of the stored format, 1.
        serialized: True if the weights are stored packed, False to quantize them while loading.
        book: formatbook of weights and activations.
        block_size: elements per block, along the reduction dimension.
        activation_format: ``"dialect"`` (W4A4), ``"fp8"`` (W4A8) or ``"none"`` (W4A16).
        ignore: patterns of layers that stay in 16 bit.
        overrides: pattern -> what differs for these layers; an exact name goes before patterns,
            patterns count in their order.
        lm_head: whether the output projection is quantized too.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    quant_method: Literal["blockdialect"] = QUANT_METHOD
    format_version: int = FORMAT_VERSION
    serialized: bool = True
    book: BookName = "dialect_fp4"
    block_size: BlockSize = 32
    activation_format: ActivationFormat = "dialect"
    ignore: list[str] = Field(default_factory=list)
    overrides: dict[str, LayerOverride] = Field(default_factory=dict)
    lm_head: bool = False

    @field_validator("format_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version > FORMAT_VERSION:
            raise ValueError(
                f"this release reads version {FORMAT_VERSION}; upgrade blockdialect to read it"
            )
        if version < 1:
            raise ValueError("versions begin at 1; convert the model again")
        return version

    @field_validator("ignore")
    @classmethod
    def _ignore_compiles(cls, patterns: list[str]) -> list[str]:
        check_expressions(patterns)
        return patterns

    @field_validator("overrides")
    @classmethod
    def _overrides_compile(cls, overrides: dict[str, LayerOverride]) -> dict[str, LayerOverride]:
        check_expressions(overrides)
        return overrides

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str = "quantization_config") -> Scheme:
        """Build a scheme from a dict.

        Args:
            data: e.g. the ``quantization_config`` of a config.json.
            where: the name of `data` in error messages.

        Raises:
            SchemeError: one sentence for the first fault: unknown key, wrong type or value, or a
                format_version of a later release.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise SchemeError(_one_sentence(error, where)) from None

    @property
    def formatbook(self) -> Formatbook:
        """The formatbook called :attr:`book`."""
        return book_by_name(self.book)

    def is_ignored(self, name: str) -> bool:
        """Whether the layer `name` stays in 16 bit."""
        return any(matches(pattern, name) for pattern in self.ignore)

    def block_size_of(self, name: str) -> int:
        """The block size for the layer `name`, not yet adjusted to its number of columns."""
        if name in self.overrides:
            return self.overrides[name].block_size
        for pattern, override in self.overrides.items():
            if matches(pattern, name):
                return override.block_size
        return self.block_size

    def to_config(self) -> dict[str, Any]:
        """The dict to write as ``quantization_config``."""
        return self.model_dump(mode="json")


def check_patterns(field: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise SchemeError if a pattern matches none of `names`, listing near misses."""
    known = list(names)
    for pattern in patterns:
        if any(matches(pattern, name) for name in known):
            continue
        expression = _expression_for(pattern, known)
        if expression is not None:
            raise SchemeError(
                f"{field}: {pattern!r} matches no layer, because a name must be whole; did you "
                f"mean {expression!r}?"
            )
        near = near_misses(pattern, known)
        hint = f"; similar names are {', '.join(near)}" if near else ""
        raise SchemeError(
            f"{field}: {pattern!r} matches no layer{hint}; give an exact layer name or "
            "'re:' and a regular expression"
        )


def _expression_for(pattern: str, names: Sequence[str]) -> str | None:
    """The ``re:`` pattern that was meant by a part of a name, a wildcard or an expression."""
    if is_expression(pattern):
        return None
    part = ".*".join(map(re.escape, pattern.strip("*.").split("*")))
    whole = re.compile(rf"(?:^|.*\.){part}(?:\.|$)")
    meant = {name for name in names if part and whole.match(name)}
    spellings = (
        f".*{part}",
        f".*{part}$",
        f".*\\.{part}$",
        f".*{part}\\.",
        f".*\\.{part}\\.",
        pattern,
    )
    for spelling in spellings:
        try:
            found = {name for name in names if re.match(spelling, name)}
        except re.error:
            continue
        if found and (found == meant or not meant):
            return f"re:{spelling}"
    return None


def fitting_block_size(columns: int, wanted: int) -> int | None:
    """`wanted` if it divides `columns`, else the largest of 64, 32, 16 that does, else None.

    None also for zero columns: such a weight has nothing to pack.
    """
    for block_size in (wanted, *sorted(BLOCK_SIZES, reverse=True)):
        if columns % block_size == 0 and columns:
            return block_size
    return None


def first_fault(error: ValidationError) -> tuple[str, str, str]:
    """The field of the first fault, its value, and what is wrong with it as half a sentence.

    The value is empty where it is a list or an object of which the third names the bad entry.
    """
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    if first["type"] == "model_type":
        reason = 'it must be an object such as {"block_size": 16}'
    named = first["type"] == "value_error" and isinstance(first["input"], (list, dict))
    return field, "" if named else repr(first["input"]), reason


def _one_sentence(error: ValidationError, where: str) -> str:
    errors = error.errors(include_url=False)
    for fault in errors:
        field = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            owner = LayerOverride if fault["loc"][0] == "overrides" else Scheme
            known = ", ".join(owner.model_fields)
            return f"{where}: the key {field!r} is not known; allowed are {known}"
    if errors[0]["type"] == "missing":
        field = ".".join(str(part) for part in errors[0]["loc"])
        return f"{where}: {field} is missing"
    field, value, reason = first_fault(error)
    return f"{where}: {field} is {value}; {reason}" if value else f"{where}: {field}: {reason}"
