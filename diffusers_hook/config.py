"""The options of ``enable_semantic_dialect``, typed and closed.

The same object is the ``quantization_config`` of a saved model: it can be passed to diffusers'
``from_pretrained`` and comes back from a saved ``config.json``.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dialect_kernels.formatbook import ActivationFormat, BlockSize, BookName, Rotation
from dialect_kernels.layer_names import check_expressions, matches

__all__ = ["QUANT_METHOD", "ConfigError", "SemanticDialectConfig"]

_FORMAT_VERSION = 2
"""The latest version that this release reads; version 2 adds `rotation` and protected steps."""
_OF_VERSION_2 = {"rotation", "protected_steps", "protected_fraction", "protected_format"}
"""Options that version 1 lacks: a file that lacks them has no rotation and protects no step."""
_SALIENT_FRACTION = 0.10

_POSITION = re.compile(r"(first|last):([1-9][0-9]*)")
"""How `ignore` names blocks by their place."""

_RENAMED = {"activation": "activation_format", "skip": "ignore"}
"""Names of options in older files, and what they are called now."""


class _QuantMethod(enum.StrEnum):
    """The method's name as diffusers wants it: an enum with a string value."""

    SEMANTIC_DIALECT = "semantic_dialect"


QUANT_METHOD = _QuantMethod.SEMANTIC_DIALECT


class ConfigError(ValueError):
    """An option that cannot be used; one sentence with option, value and remedy."""


class SemanticDialectConfig(BaseModel):
    """How a video transformer is quantized.

    Attributes:
        quant_method: always ``"semantic_dialect"``.
        format_version: version of the stored format: 1 with neither a rotation nor protected steps,
            else 2.
        book: formatbook of weights and activations: ``"semantic_32"`` (SemanticDialect) or
            ``"dialect_fp4"`` (BlockDialect).
        block_size: elements per block, along the reduction dimension.
        activation_format: ``"dialect"`` (W4A4), ``"fp8"`` (W4A8; ours) or ``"none"`` (W4A16;
            ours). Salient tokens, SeDA and protected steps need ``"dialect"``.
        rotation: ``"hadamard_32"`` or ``"none"``, of weights and activations (ours). A layer whose
            columns 32 does not divide is not rotated.
        ignore: patterns of linear layers that stay in 16 bit: exact names from the model's root,
            or ``re:`` and a regular expression that matches from the name's beginning, e.g.
            ``re:blocks\\.0\\.``; see :mod:`dialect_kernels.layer_names`. ``first:N`` and ``last:N``
            are all layers of the first and last N blocks of every list of blocks.
        modulation: how the adaLN modulation's linear layers are stored: ``"16bit"``, ``"fp8"``
            (row-wise E4M3 weights; ours) or None: ``"fp8"`` where they hold more than 5 % of the
            model's parameters, but for those that the model's class keeps in float32.
        salient_fraction: share of the video tokens that is decomposed into two dialect rows, 0..1
            (SemanticDialect; default ours). 0 switches decomposition off.
        salient_refresh: attention calls of a block and guidance branch between two choices of the
            salient tokens (ours).
        selection: which tokens by received attention: ``"top"``, or the controls ``"bottom"`` and
            ``"random"``.
        seda: whether tokens of one semantic group share a sub-formatbook (SemanticDialect);
            semantic_32 only. Experimental and off by default: on the shipped model it does not help
            (ours).
        seda_window: frames, rows and columns of tokens per window (ours).
        seda_threshold: correlation, relative to the window's largest, from which a token joins its
            anchor's group, 0..1 (ours).
        seda_refresh: attention calls of a block and guidance branch between two groupings (ours).
        seed: seed of ``selection="random"``.
        protected_steps: denoising steps in which all tokens are rounded more finely (ours):
            ``"none"``, numbers from 0 on, ``"auto"``: those in which the scheduler changes the
            noise level most, or None: as ``"auto"`` in generations whose scheduler tells its noise
            levels and whose steps are enough for one by `protected_fraction`, else ``"none"``. A
            saved file without this option, of a release that had no None, protects no step.
        protected_fraction: share of the steps that ``"auto"`` protects, rounded down, but at least
            one step; None protects none where one step were more than that share (ours).
        protected_format: in protected steps, all tokens are decomposed into two dialect rows
            (``"decomposed"``) or rounded to FP8 (``"fp8"``; W4A8).
        keep_original: where ``disable`` finds the 16-bit weights: ``"disk"`` (the files they were
            loaded from), ``"host"`` (a copy in host memory), ``"none"`` (nowhere), or None:
            ``"disk"`` where the files are known, else ``"host"``.
        strict: refuse a model in which salient tokens and groups cannot be found, or a layer that
            cannot be rotated, instead of quantizing it without them after a warning.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    quant_method: _QuantMethod = Field(default=QUANT_METHOD, strict=False)
    format_version: int = _FORMAT_VERSION
    book: BookName = "semantic_32"
    block_size: BlockSize = 32
    activation_format: ActivationFormat = "dialect"
    rotation: Rotation = "none"
    ignore: tuple[str, ...] = Field(default=(), strict=False)
    modulation: Literal["16bit", "fp8"] | None = None
    salient_fraction: float = Field(default=_SALIENT_FRACTION, ge=0.0, le=1.0)
    salient_refresh: int = Field(default=5, ge=1)
    selection: Literal["top", "bottom", "random"] = "top"
    seda: bool = False
    seda_window: tuple[int, int, int] = Field(default=(4, 4, 4), strict=False)
    seda_threshold: float = Field(default=0.5, ge=0.0, le=1.0)
    seda_refresh: int = Field(default=10, ge=1)
    seed: int = 0
    protected_steps: Literal["none", "auto"] | tuple[int, ...] | None = None
    protected_fraction: float = Field(default=0.0625, gt=0.0, le=1.0)
    protected_format: Literal["decomposed", "fp8"] = "decomposed"
    keep_original: Literal["disk", "host", "none"] | None = None
    strict: bool = False

    def __init__(self, **options: Any) -> None:
        """Build a configuration from keyword options.

        Raises:
            ConfigError: one sentence for the first fault.
        """
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise ConfigError(_one_sentence(error)) from None

    @field_validator("format_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version > _FORMAT_VERSION:
            raise ValueError(
                f"this release reads versions up to {_FORMAT_VERSION}; upgrade blockdialect to "
                "read it"
            )
        if version < 1:
            raise ValueError("versions begin at 1; save the model again")
        return version

    @field_validator("ignore", mode="before")
    @classmethod
    def _ignore_compiles(cls, patterns: object) -> object:
        if isinstance(patterns, str):
            raise ValueError("it must be a list of patterns, not one string")
        if isinstance(patterns, list | tuple):
            texts = [pattern for pattern in patterns if isinstance(pattern, str)]
            check_expressions(texts)
            for text in texts:
                if text.startswith(("first:", "last:")) and not _POSITION.fullmatch(text):
                    raise ValueError(
                        f"{text!r} must end in a number of blocks from 1 on, such as 'first:1'"
                    )
        return patterns

    @field_validator("seda_window", mode="before")
    @classmethod
    def _window_is_three_sizes(cls, window: object) -> object:
        sizes = list(window) if isinstance(window, list | tuple) else []
        if len(sizes) != 3 or not all(type(size) is int and size >= 1 for size in sizes):
            raise ValueError("it must be three whole numbers from 1 on: frames, rows and columns")
        return window

    @field_validator("protected_steps", mode="before")
    @classmethod
    def _steps_are_numbers(cls, steps: object) -> object:
        if steps in (None, "none", "auto"):
            return steps
        numbers = list(steps) if isinstance(steps, list | tuple) else []
        if not numbers or not all(type(step) is int and step >= 0 for step in numbers):
            raise ValueError(
                "it must be 'none', 'auto' or a list of the steps' numbers, which count from 0"
            )
        return tuple(sorted(set(numbers)))

    @model_validator(mode="before")
    @classmethod
    def _version_by_keys(cls, options: Any) -> Any:
        """Complete a saved file's options, or the version of those that are not from a file."""
        if not isinstance(options, dict):
            return options
        if "format_version" in options:
            return {"protected_steps": "none"} | options
        plain = options.get("rotation", "none") == options.get("protected_steps") == "none"
        return {"format_version": 1} | options if plain else options

    @model_validator(mode="after")
    def _version_has_the_keys(self) -> SemanticDialectConfig:
        for option in ("rotation", "protected_steps"):
            value = getattr(self, option)
            if value != "none" and self.format_version < 2:
                raise ValueError(
                    f"{option}: {value!r} needs format_version 2, not {self.format_version}; "
                    "save the model again"
                )
        return self

    @model_validator(mode="after")
    def _has_an_effect(self) -> SemanticDialectConfig:
        """Refuse options that would silently do nothing with other activations than dialects.

        Their defaults are accepted everywhere, and so are the options of a mechanism that is off:
        a saved or derived configuration may switch it off and on again.
        """
        for option, wanted in (
            ("seda", self.seda),
            ("salient_fraction", self.salient_fraction not in (0.0, _SALIENT_FRACTION)),
            ("protected_steps", self.protected_steps not in (None, "none")),
        ):
            if wanted and self.activation_format != "dialect":
                raise ValueError(
                    f"{option}: {getattr(self, option)!r} has no effect with "
                    f"activation_format={self.activation_format!r}; use "
                    f"activation_format='dialect' or leave {option} out"
                )
        if self.seda and self.book != "semantic_32":
            raise ValueError(
                f"seda: True has no effect with book={self.book!r}; use book='semantic_32' or "
                "leave seda out"
            )
        return self

    @property
    def decomposes(self) -> bool:
        """Whether salient tokens are decomposed."""
        return self.activation_format == "dialect" and self.salient_fraction > 0

    @property
    def groups(self) -> bool:
        """Whether tokens are grouped (SeDA)."""
        return self.seda

    @property
    def protects(self) -> bool:
        """Whether steps are protected, at least in generations that allow it."""
        return self.activation_format == "dialect" and self.protected_steps != "none"

    def is_ignored(self, name: str) -> bool:
        """Whether the layer `name`, from the model's root, stays in 16 bit."""
        return any(matches(pattern, name) for pattern in self.ignore)

    def with_named_blocks(self, lists: Iterable[Sequence[str]]) -> SemanticDialectConfig:
        """The same configuration, with names where `ignore` gives the places of blocks.

        Args:
            lists: of each list of blocks the names of its blocks from the model's root, in order.
        """
        patterns: list[str] = []
        lists = list(lists)
        for pattern in self.ignore:
            place = _POSITION.fullmatch(pattern)
            if place is None:
                patterns.append(pattern)
                continue
            count = int(place[2])
            for names in lists:
                chosen = names[:count] if place[1] == "first" else names[-count:]
                patterns += [f"re:{re.escape(name)}\\." for name in chosen]
        named = tuple(dict.fromkeys(patterns))
        return self if named == self.ignore else self.replaced(ignore=named)

    def replaced(self, **options: Any) -> SemanticDialectConfig:
        """The same configuration with other options.

        Raises:
            ConfigError: as the constructor.
        """
        kept = self.model_dump(exclude_unset=True, exclude={"format_version"})
        return SemanticDialectConfig(**{**kept, **options})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> SemanticDialectConfig:
        """Build a configuration from a saved dict; diffusers calls this.

        Args:
            config_dict: options by name; names and patterns of older files are understood.
            **kwargs: single options that take precedence.

        Raises:
            ConfigError: as the constructor, or for an option under its old and its new name.
        """
        return cls(**{**_with_present_names(config_dict), **kwargs})

    def to_dict(self) -> dict[str, Any]:
        """The configuration in JSON's types, of version 1 where that can say it."""
        if self.rotation == self.protected_steps == "none":
            return self.model_dump(mode="json", exclude=_OF_VERSION_2) | {"format_version": 1}
        return self.model_dump(mode="json")

    def to_diff_dict(self) -> dict[str, Any]:
        """Method, version and the options that are not at their defaults.

        Those of version 2 say which steps are protected, as a file that does not protects none.
        """
        always = ("quant_method", "format_version", "protected_steps")
        default = type(self)().model_dump(mode="json")
        return {k: v for k, v in self.to_dict().items() if k in always or v != default.get(k)}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The configuration as JSON text; diffusers logs and saves this."""
        chosen = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(chosen, indent=2, sort_keys=True) + "\n"


def _with_present_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with today's names of its options and today's patterns.

    Raises:
        ConfigError: for an option under its old and its new name.
    """
    options = dict(saved)
    for old, new in _RENAMED.items():
        if old not in options:
            continue
        if new in options:
            raise ConfigError(f"{old}: is the old name of {new}, which is given too; remove {old}")
        value = options.pop(old)
        options[new] = [_whole_name(p) for p in value] if old == "skip" else value
    return options


def _whole_name(expression: str) -> str:
    """The pattern of `ignore` for an expression that had to match a layer's whole name.

    Flags are allowed at the beginning of an expression only; a verbose one may end in a comment.
    """
    flags = re.match(r"(\(\?[aiLmsux]+\))*", expression)
    assert flags is not None
    end = "\n" if "x" in flags.group() else ""
    return f"re:{flags.group()}(?:{expression[flags.end() :]}{end})\\Z"


def _one_sentence(error: ValidationError) -> str:
    """The first fault as option, value, what is allowed."""
    fault = error.errors()[0]
    reason = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return reason  # two options that do not go together: it names both
    option = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = sorted(SemanticDialectConfig.model_fields)
        begun = [name for name in SemanticDialectConfig.model_fields if name.startswith(option)]
        near = [_RENAMED[option]] if option in _RENAMED else begun[:1]
        near = near or get_close_matches(option, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(known)}"
        return f"{option}: is not an option of SemanticDialectConfig; {hint}"
    return f"{option}: {fault['input']!r} cannot be used: {reason[:1].lower()}{reason[1:]}"
