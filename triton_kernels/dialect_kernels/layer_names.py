"""How options name layers, in both wings: an exact name, or a regular expression behind ``re:``.

An expression must match from the beginning of the name; it need not reach its end (vLLM's
spelling).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = ["check_expressions", "is_expression", "matches", "near_misses"]

_EXPRESSION = "re:"


def is_expression(pattern: str) -> bool:
    """Whether `pattern` is a ``re:`` pattern, not a name."""
    return pattern.startswith(_EXPRESSION)


def matches(pattern: str, name: str) -> bool:
    """Whether an exact name or ``re:`` pattern matches a layer name."""
    if is_expression(pattern):
        return re.match(pattern.removeprefix(_EXPRESSION), name) is not None
    return pattern == name


def check_expressions(patterns: Iterable[str]) -> None:
    """Raise ValueError at the first ``re:`` pattern that is not a regular expression."""
    for pattern in patterns:
        if not is_expression(pattern):
            continue
        try:
            re.compile(pattern.removeprefix(_EXPRESSION))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None


def near_misses(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to three names like `pattern`, as a whole or in the last word."""
    wanted = pattern.removeprefix(_EXPRESSION)
    near = get_close_matches(wanted, names, n=3, cutoff=0.6)
    words = re.findall(r"\w+", wanted)
    if not near and words:
        leaves = {name.rpartition(".")[2]: name for name in reversed(names)}
        near = [leaves[leaf] for leaf in get_close_matches(words[-1], leaves, n=3, cutoff=0.6)]
    return near
