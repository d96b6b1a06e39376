"""This plugin's options of an engine: ``--additional-config '{"blockdialect": {...}}'``."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final, NamedTuple, get_args

from ..scheme import AttentionFormat, KvCacheFormat, SchemeError

__all__ = ["EngineOptions", "engine_options"]

_OPTIONS: Final = "blockdialect"
"""The key of ``--additional-config`` that holds them."""


class EngineOptions(NamedTuple):
    """What an engine was started with."""

    kv_cache: KvCacheFormat | None = None
    """Format of the KV cache; None leaves it to the model."""
    attention: AttentionFormat | None = None
    """Format of queries and probabilities over such a cache; None leaves it to the model."""
    keep_decoded: bool = False
    """Whether linear layers on a GPU keep their weights decoded, too."""


def engine_options(config: Any) -> EngineOptions:
    """The options of an engine.

    Args:
        config: vLLM's config.

    Raises:
        SchemeError: if an option is not known or has a value that is not allowed.
    """
    additional = getattr(config, "additional_config", None)
    options = additional if isinstance(additional, Mapping) else {}
    for name in options:
        if name != _OPTIONS and get_close_matches(name, [_OPTIONS], cutoff=0.8):
            raise SchemeError(
                f"additional_config: the key {name!r} is not known; did you mean {_OPTIONS!r}?"
            )
    given = options.get(_OPTIONS, {})
    if not isinstance(given, Mapping):
        raise SchemeError(
            f"additional_config: {_OPTIONS} is {given!r}; it must be an object such as "
            '{"kv_cache": "dialect"}'
        )
    allowed: dict[str, tuple[Any, ...]] = {
        "kv_cache": get_args(KvCacheFormat),
        "attention": get_args(AttentionFormat),
        "keep_decoded": (False, True),
    }
    for name, value in given.items():
        if name not in allowed:
            raise SchemeError(
                f"additional_config: {_OPTIONS} has the key {name!r}; allowed are "
                f"{', '.join(allowed)}"
            )
        if type(value) is not type(allowed[name][0]) or value not in allowed[name]:
            raise SchemeError(
                f"additional_config: {name} of {_OPTIONS} is {value!r}; allowed are "
                f"{' and '.join(map(repr, allowed[name]))}"
            )
    return EngineOptions(**given)
