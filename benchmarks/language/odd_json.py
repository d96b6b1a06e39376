"""JSON that no program writes and a reader must survive."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

__all__ = ["TEXTS", "change", "change_text", "dump", "value"]

TEXTS = (
    *("", "0", "..", "/etc/passwd", "~", "\\", "model", "weight", "a\0b", "a\nb", "\x1b[2J", "{}"),
    *("\ud800", "é" * 200, "x" * 5000, "__metadata__", "__class__", "re:(", "re:.*", "\u202e"),
)
"""Strings; among them one that UTF-8 cannot hold, and one that is too long for a file name."""

_HUGE = "@huge@"
_DEEP_LISTS = "@lists@"
_DEEP_OBJECTS = "@objects@"
_DEPTHS = (150, 400, 900, 940, 960, 980, 1000, 5000, 100_000)
"""Those around Python's limit of recursion, below which its parser still reads."""
_NUMBERS = (0, -1, 1, 2, 2**31, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308)
_CONSTANTS = (None, True, False, float("nan"), float("inf"), float("-inf"))


def value(draw: random.Random) -> Any:
    """A value of a type, size or depth that nobody expects."""
    return draw.choice(
        [
            *_CONSTANTS,
            *_NUMBERS,
            *TEXTS,
            *([], {}, [None], [[1]], {"": {}}, ["a", "a"], {"a": None}, [{}], [True]),
            *(_HUGE, _DEEP_LISTS, _DEEP_OBJECTS),
        ]
    )


def change(data: Any, draw: random.Random) -> None:
    """Replace, remove, move or add values at random places of a JSON object or list."""
    for _ in range(draw.choice([1, 1, 2])):
        holder, key = draw.choice(list(_places(data)))
        how = draw.randrange(5)
        if how == 0:
            del holder[key]
        elif how == 1:
            other, name = draw.choice(list(_places(data)))
            holder[key] = json.loads(json.dumps(other[name]))
        elif how == 2 and isinstance(holder, dict):
            holder[draw.choice(TEXTS)] = value(draw)
        else:
            holder[key] = value(draw)


def dump(data: Any, draw: random.Random) -> bytes:
    """`data` as JSON, with what Python's writer cannot write put in: huge numbers, depth."""
    text = json.dumps(data)
    depth = draw.choice(_DEPTHS)
    text = text.replace(f'"{_HUGE}"', "9" * draw.choice([400, 5000]))
    text = text.replace(f'"{_DEEP_LISTS}"', "[" * depth + "]" * depth)
    return text.replace(f'"{_DEEP_OBJECTS}"', '{"a":' * depth + "0" + "}" * depth).encode()


def change_text(data: bytearray, _: int, draw: random.Random) -> None:
    """Change a JSON file as text: its encoding, its ends, a key that is given twice."""
    text = bytes(data)
    first_key = text[text.find(b'"') : text.find(b":") + 1]
    changed = [
        b"\xef\xbb\xbf" + text,
        text.decode("utf-8", "replace").encode("utf-16"),
        text.replace(b"a", b"\xff", 1),
        text.replace(b"a", b"\xed\xa0\x80", 1),
        text.replace(b"}", b",}", 1),
        text + draw.choice([b"}", b"{}", b"\0", b"//"]),
        text.replace(b"{", b"{" + first_key + dump(value(draw), draw) + b",", 1),
        text[: text.rfind(b"}")] + b"," + first_key + dump(value(draw), draw) + b"}",
        dump(value(draw), draw),
        text[: draw.randrange(len(text) + 1)],
        b"",
        b"\0" * 100,
        b" " * 1_000_000 + text,
        text.replace(b"{", b"{'a': 1,", 1),
    ]
    data[:] = draw.choice(changed)


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (object or list, key or position) inside `data`."""
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield data, key
        yield from _places(data[key])
