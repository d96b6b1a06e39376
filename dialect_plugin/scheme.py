"""The quantization scheme: what ``quantization_config`` in a config.json may say, typed and closed.

One class serves the converter, the command line and the vLLM plugin. A *packed* checkpoint carries
a scheme with ``serialized: true`` whose `ignore` and `overrides` are resolved to exact names; an
*online* scheme (``serialized: false``) is applied to a 16-bit checkpoint while it is loaded.

Layer names are the checkpoint's own (unfused) module names. Patterns:
:mod:`dialect_kernels.layer_names`. What a layer has is found by :meth:`Scheme.layer` alone, and
adapted to its number of columns by :func:`fitted` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dialect_kernels.formatbook import (
    BLOCK_SIZES,
    ROTATION_GROUP,
    ActivationFormat,
    BlockSize,
    BookName,
    Formatbook,
    Rotation,
    book_by_name,
)
from dialect_kernels.layer_names import check_expressions, is_expression, matches, near_misses

from .experts import DOWN, expert_of, names_of

__all__ = [
    "FORMAT_VERSION",
    "METHODS",
    "QUANT_METHOD",
    "ActivationFormat",
    "AttentionFormat",
    "BlockSize",
    "BookName",
    "KvCacheFormat",
    "LayerFormat",
    "LayerOverride",
    "Method",
    "Rotation",
    "Scheme",
    "SchemeError",
    "SentenceError",
    "check_patterns",
    "disagreement",
    "experts_disagreement",
    "first_fault",
    "fitted",
    "fitting_block_size",
]

QUANT_METHOD: Final = "blockdialect"
FORMAT_VERSION: Final = 2
"""The latest version that this release reads; it writes the first one that has all keys it needs.

Version 2 adds `rotation`, `embeddings`, `kv_cache` and `attention`, and in `overrides` whatever is
not a block size.
"""


KvCacheFormat = Literal["none", "dialect"]
"""Format of the KV cache: 16 bit, or 4 bit in the 32-dialect book."""

AttentionFormat = Literal["none", "dialect"]
"""Format of queries and probabilities in attention: 16 bit, or 4 bit in the 32-dialect book."""

_UNNAMED_BOOK: Final[BookName] = "dialect_fp4"
"""Book of a packed checkpoint that does not name one, whatever a new one gets by default."""

_KEYS_OF_VERSION_2: Final = ("rotation", "embeddings", "kv_cache", "attention")
"""Fields of a scheme that are written only where they are not the default."""


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


class LayerFormat(NamedTuple):
    """How one layer is quantized."""

    book: BookName
    """Formatbook of weight and activations."""
    block_size: int
    """Elements per block, along the reduction dimension."""
    activation_format: ActivationFormat
    """Format of the activations."""
    rotation: Rotation
    """Rotation of weight and activations."""

    @property
    def formatbook(self) -> Formatbook:
        """The formatbook called :attr:`book`."""
        return book_by_name(self.book)


class LayerOverride(BaseModel):
    """What differs from the scheme for the layers a pattern matches; None for what does not.

    Attributes: those of :class:`LayerFormat`, at least one of which is given.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    block_size: BlockSize | None = None
    book: BookName | None = None
    activation_format: ActivationFormat | None = None
    rotation: Rotation | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _given_or_left_out(cls, value: object) -> object:
        if value is None:
            raise ValueError("leave the key out to have the scheme's own")
        return value

    @model_validator(mode="after")
    def _overrides_something(self) -> LayerOverride:
        if not self.given():
            raise ValueError(f"it must set one of {', '.join(LayerOverride.model_fields)}")
        return self

    def given(self) -> dict[str, Any]:
        """The keys that are given, with their values."""
        return self.model_dump(exclude_none=True)


class Scheme(BaseModel):
    """A BlockDialect quantization scheme.

    Attributes:
        quant_method: always ``"blockdialect"``.
        format_version: version of the stored format, 1 or 2; default: the first that has all keys
            that the scheme needs.
        serialized: True if the weights are stored packed, False to quantize them while loading.
        book: formatbook of weights and activations. The 32 dialects lose less on every model
            measured than BlockDialect's 16, in as many bits.
        block_size: elements per block, along the reduction dimension.
        activation_format: ``"dialect"`` (W4A4), ``"fp8"`` (W4A8) or ``"none"`` (W4A16).
        ignore: patterns of layers that stay in 16 bit.
        overrides: pattern -> what differs for these layers; an exact name goes before patterns,
            patterns count in their order, for each key by itself.
        lm_head: whether the output projection is quantized too.
        rotation: ``"none"`` or ``"hadamard_32"``, of weights and activations.
        embeddings: whether the embeddings of tokens are quantized too. Where the output projection
            is tied to them, the one matrix serves both.
        kv_cache: ``"none"`` or ``"dialect"``, what an engine keeps keys and values in.
        attention: ``"none"`` or ``"dialect"``, what an engine rounds queries and probabilities to;
            the latter needs `kv_cache` ``"dialect"``, so that both products of attention have two
            operands in the format.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    quant_method: Literal["blockdialect"] = QUANT_METHOD
    format_version: int = 1
    serialized: bool = True
    book: BookName = "semantic_32"
    block_size: BlockSize = 32
    activation_format: ActivationFormat = "dialect"
    ignore: list[str] = Field(default_factory=list)
    overrides: dict[str, LayerOverride] = Field(default_factory=dict)
    lm_head: bool = False
    rotation: Rotation = "none"
    embeddings: bool = False
    kv_cache: KvCacheFormat = "none"
    attention: AttentionFormat = "none"

    @model_validator(mode="before")
    @classmethod
    def _version_by_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and "format_version" not in data and _needs_version_2(data):
            return data | {"format_version": 2}
        return data

    @model_validator(mode="after")
    def _version_has_the_keys(self) -> Scheme:
        if self.format_version < 2 and _needs_version_2(dict(self)):
            raise ValueError(
                f"format_version is {self.format_version}; rotation, embeddings, kv_cache, "
                "attention, and overrides of more than the block size need version 2: convert the "
                "model again"
            )
        return self

    @model_validator(mode="after")
    def _attention_has_a_cache(self) -> Scheme:
        if self.attention != "none" and self.kv_cache == "none":
            raise ValueError(
                "attention is 'dialect', which needs keys and values in 4 bits: set kv_cache to "
                "'dialect', too"
            )
        return self

    @field_validator("format_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version > FORMAT_VERSION:
            raise ValueError(
                f"this release reads versions up to {FORMAT_VERSION}; upgrade blockdialect to read "
                "it"
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
        if "quant_method" in data and data.get("serialized", True):
            data = {"book": _UNNAMED_BOOK, **data}
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise SchemeError(_one_sentence(error, where)) from None

    def is_ignored(self, name: str) -> bool:
        """Whether the layer `name` stays in 16 bit."""
        names = names_of(name)
        return any(
            any(matches(pattern, n) for n in names) if is_expression(pattern) else pattern in names
            for pattern in self.ignore
        )

    def layer(self, *names: str) -> LayerFormat:
        """How a layer is quantized, before it is :func:`fitted` to the layer's columns.

        Args:
            names: the layer's name, and other spellings of it.
        """
        names = tuple(name for given in names for name in names_of(given))
        overrides = [self.overrides[name] for name in names if name in self.overrides]
        overrides += [
            override
            for pattern, override in self.overrides.items()
            if is_expression(pattern) and any(matches(pattern, name) for name in names)
        ]
        found = LayerFormat(*(getattr(self, key) for key in LayerFormat._fields))
        for override in reversed(overrides):
            found = found._replace(**override.given())
        return found

    def embedding(self, *names: str, tied: bool) -> LayerFormat:
        """How a matrix of embeddings is quantized, before it is :func:`fitted`; never rotated.

        Args:
            names: as for :meth:`layer`.
            tied: whether the output projection is the same matrix; its activations are then in
                16 bit unless an override says otherwise.
        """
        changes: dict[str, Any] = {"activation_format": "none"} if tied else {}
        return self.model_copy(update=changes).layer(*names)._replace(rotation="none")

    def vocabulary(self, *, tied: bool) -> str:
        """In words, what is quantized of the matrices with a row for each token.

        Args:
            tied: whether the output projection is the matrix of the embeddings.
        """
        embeddings = "embeddings" + (", which are the output projection too" if tied else "")
        parts = [embeddings] if self.embeddings else []
        parts += ["output projection"] if self.lm_head else []
        return " and ".join(parts)

    def with_activation_format(self, activation_format: ActivationFormat) -> Scheme:
        """The same scheme with this format of the activations in every layer."""
        overrides = {
            pattern: override.model_copy(update={"activation_format": None})
            for pattern, override in self.overrides.items()
        }
        return self.model_copy(
            update={"activation_format": activation_format, "overrides": overrides}
        )

    def differing(self, layer: LayerFormat) -> dict[str, Any]:
        """The keys of an override for a layer that is quantized in this way; empty if none."""
        return {
            key: getattr(layer, key)
            for key in LayerOverride.model_fields
            if getattr(layer, key) != getattr(self, key)
        }

    def to_config(self) -> dict[str, Any]:
        """The dict to write as ``quantization_config``; keys of version 2 only where needed."""
        config = self.model_dump(mode="json")
        config["overrides"] = {name: entry.given() for name, entry in self.overrides.items()}
        config["format_version"] = 2 if _needs_version_2(config) else 1
        for key in _KEYS_OF_VERSION_2:
            if getattr(self, key) == Scheme.model_fields[key].default:
                del config[key]
        return config


def _needs_version_2(scheme: Mapping[str, Any]) -> bool:
    """Whether these fields of a scheme, which may be wrong ones, hold keys that version 1 lacks."""
    overrides = scheme.get("overrides")
    entries = list(overrides.values()) if isinstance(overrides, Mapping) else []
    entries = [e.given() if isinstance(e, LayerOverride) else e for e in entries]
    keys = {key for entry in entries if isinstance(entry, Mapping) for key in entry}
    return not keys <= {"block_size"} or any(
        scheme.get(key, default) != default
        for key, default in ((k, Scheme.model_fields[k].default) for k in _KEYS_OF_VERSION_2)
    )


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


def fitted(layer: LayerFormat, columns: int) -> LayerFormat | None:
    """`layer` with a block size and a rotation that divide `columns`; None if no block size does.

    The block size as :func:`fitting_block_size`; a layer that the rotation's group does not divide
    is not rotated.
    """
    block_size = fitting_block_size(columns, layer.block_size)
    if block_size is None:
        return None
    rotation: Rotation = "none" if columns % ROTATION_GROUP else layer.rotation
    return layer._replace(block_size=block_size, rotation=rotation)


def disagreement(parts: Mapping[str, LayerFormat | None]) -> tuple[str, str] | None:
    """How the parts of a matrix that engines run as one differ, or None if they do not.

    Args:
        parts: name -> how the part is quantized; None if it stays in 16 bit.

    Returns:
        (the parts with what differs, what all of them need to have in common).
    """
    packed = [part for part in parts.values() if part is not None]
    if len(set(parts.values())) <= 1:
        return None
    keys = [key for key in LayerOverride.model_fields if len({getattr(p, key) for p in packed}) > 1]
    keys = keys or ["block_size"]
    words = {key: key.replace("_", " ") for key in keys}
    listed = (
        f"{name} "
        + ("16 bit" if part is None else ", ".join(f"{words[k]} {getattr(part, k)}" for k in keys))
        for name, part in parts.items()
    )
    return ", ".join(listed), " and ".join(words.values())


def experts_disagreement(parts: Mapping[str, LayerFormat | None]) -> tuple[str, str] | None:
    """As :func:`disagreement`, for the matrices of all experts of a decoder layer.

    Engines run the gates and ups of all experts as one stack of matrices and the downs as another,
    so that each stack has one format, or both are in 16 bit.
    """
    first: dict[bool, str] = {}
    for name, form in parts.items():
        expert = expert_of(name)
        stack = expert is not None and expert.part == DOWN
        like = first.setdefault(stack, name)
        if form != parts[like]:
            return disagreement({like: parts[like], name: form})
    gate, down = first.get(False), first.get(True)
    if gate is not None and down is not None and (parts[gate] is None) != (parts[down] is None):
        return disagreement({gate: parts[gate], down: parts[down]})
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
    field, value, reason = first_fault(error)
    if not value:
        return ": ".join(part for part in (where, field, reason) if part)
    return f"{where}: {field} is {value}; {reason}"
