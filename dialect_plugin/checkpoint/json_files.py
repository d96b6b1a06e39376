"""JSON files that somebody else made, without torch: wrong options are refused before it loads."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ..scheme import SentenceError

__all__ = ["CheckpointError", "load_json", "read_json", "unique_keys"]

_DEEPEST = 100
"""Levels of a JSON file: far more than any has, and far from Python's limit of recursion."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class CheckpointError(SentenceError):
    """A checkpoint that cannot be used; one sentence with file, fault and remedy."""


def read_json(path: Path, unique: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        unique: refuse a key that is given twice; else the last one counts, as in every engine.

    Raises:
        CheckpointError: if the file is missing or not a JSON object.
    """
    data = load_json(path, unique)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}; it must be a JSON object")
    return data


def load_json(path: Path, unique: bool = False) -> Any:
    """Read a JSON file that somebody else made; what it holds can be written as JSON again.

    Args:
        path: the file.
        unique: refuse a key that is given twice; else the last one counts, as in every engine.

    Raises:
        CheckpointError: if the file is missing, not a regular file, or not JSON in UTF-8; or if it
            is nested too deeply, or holds text that UTF-8 cannot.
    """
    if path.exists() and not path.is_file():  # a pipe or a device would be read for ever
        raise CheckpointError(f"{path}: is not a regular file; put the file itself there")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=unique_keys if unique else None)
        _check_depth(data)
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; a checkpoint directory needs it") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); put a readable file there"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from None
    return data


def _check_depth(data: Any) -> None:
    """Raise ValueError if lists and objects lie more than `_DEEPEST` levels inside each other."""
    level = [data]
    for _ in range(_DEEPEST + 1):
        holders = [entry for entry in level if isinstance(entry, dict | list)]
        level = [
            inner
            for holder in holders
            for inner in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEEPEST} levels deep")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, for ``json.loads``; ValueError if a key is given twice."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"the key {key!r} is given {count} times")
    return dict(pairs)
