"""The documents of a calibration text: of a file, of the text that is installed, of a data set.

A plain text file is one document. A JSONL file holds one document a line: ``{"text": "..."}``, or
``{"messages": [{"role": "user", "content": "..."}, ...]}``. A data set, of the hub or in a
directory, holds one a row, in one of its columns; ``datasets`` reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from ..checkpoint.reader import CheckpointError
from .options import DEFAULT_TEXT

__all__ = ["Document", "is_long", "read_documents"]

Document: TypeAlias = str | list[dict[str, str]]
"""A text, or a conversation as a list of messages."""

_DEFAULT_FILE = "default.jsonl"
_FORMS = '{"text": "..."} or {"messages": [{"role": "...", "content": "..."}]}'
_COLUMNS = ("text", "messages")
"""Columns of a data set that hold documents, the first that is there."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
_KINDS = "a text file, a JSONL file, a data set (owner/name:split:column) or"


class _DataSet(NamedTuple):
    """``owner/name/configuration:split:column``, or a directory in front."""

    name: str
    split: str | None
    column: str | None

    @classmethod
    def of(cls, name: str) -> _DataSet | None:
        """None if this is not the name of a data set."""
        front, split, column = (*name.split(":"), "", "")[:3]
        if name.count(":") > 2 or not (Path(front).is_dir() or _HUB_NAME.fullmatch(front)):
            return None
        return cls(front, split or None, column or None)


def is_long(name: str) -> bool:
    """Whether it is a data set, of which no more is read than is needed."""
    return name != DEFAULT_TEXT and not Path(name).is_file()


def read_documents(name: str, option: str) -> Iterator[Document]:
    """The documents of a calibration text.

    Args:
        name: as :attr:`~.options.CalibrationOptions.calibrate`.
        option: what named the text; error messages begin with it.

    Raises:
        CheckpointError: if it cannot be read.
    """
    path = Path(name)
    if name == DEFAULT_TEXT:
        packaged = files(__package__).joinpath(_DEFAULT_FILE)
        yield from _lines(_DEFAULT_FILE, option, packaged.read_text(encoding="utf-8"))
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{option}: {name} is not UTF-8 text ({error.reason} at byte {error.start}); give "
                "a text file or a JSONL file"
            ) from None
        if path.suffix == ".jsonl":
            yield from _lines(name, option, text)
        else:
            yield text
    elif (data_set := _DataSet.of(name)) is not None:
        yield from _rows(data_set, option)
    else:
        raise CheckpointError(f"{option}: {name} is not a file; give {_KINDS} {DEFAULT_TEXT!r}")


def _lines(name: str, option: str, contents: str) -> Iterator[Document]:
    for number, line in enumerate(contents.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        fields = entry if isinstance(entry, dict) else {}
        text, messages = fields.get("text"), fields.get("messages")
        if isinstance(text, str) and text:
            yield text
        elif _is_conversation(messages):
            yield messages
        else:
            raise CheckpointError(f"{option}: {name}: line {number} must be {_FORMS}")


def _is_conversation(value: Any) -> TypeGuard[list[dict[str, str]]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )


def _rows(data_set: _DataSet, option: str) -> Iterator[Document]:
    """The rows of a data set, in their order; empty ones are left out."""
    rows = _opened(data_set, option)
    columns = rows.column_names or list(next(iter(rows), {}))
    column = data_set.column or next((name for name in _COLUMNS if name in columns), None)
    if column not in columns:
        wanted = data_set.column or " or ".join(_COLUMNS)
        raise CheckpointError(
            f"{option}: {data_set.name} has no column {wanted}; it has {', '.join(columns)}: name "
            f"one as {data_set.name}:{data_set.split or 'train'}:COLUMN"
        )
    for number, row in enumerate(rows):
        found = row[column]
        if _is_conversation(found) or (isinstance(found, str) and found):
            yield found
        elif found:
            raise CheckpointError(
                f"{option}: {data_set.name}: column {column} of row {number} is neither text nor a "
                "conversation of messages with role and content; name another column"
            )


def _opened(data_set: _DataSet, option: str) -> Any:
    """One split of a data set, as ``datasets`` reads it."""
    name, wanted = data_set.name, data_set.split
    if find_spec("datasets") is None:
        raise CheckpointError(
            f"{option}: {name} is not a file, and data sets are read by the package datasets; "
            "install it with pip install 'blockdialect[datasets]'"
        )
    import datasets

    directory = Path(name)
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        if not directory.is_dir():
            owner, short, configuration = (*name.split("/"), None)[:3]
            found = datasets.load_dataset(f"{owner}/{short}", configuration, streaming=True)
        elif any((directory / file).is_file() for file in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, streaming=True)
    except Exception as error:  # it raises whatever its parts do
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise CheckpointError(
            f"{option}: {name} is not a file, and not a data set that can be read "
            f"({type(error).__name__}: {reason}); give {_KINDS} {DEFAULT_TEXT!r}"
        ) from None
    finally:
        if shown:
            datasets.utils.logging.enable_progress_bar()
    if not isinstance(found, dict):  # one split alone, saved on disk
        found = {str(found.split or "train"): found}
    split = wanted or ("train" if "train" in found else next(iter(found)))
    if split not in found:
        raise CheckpointError(
            f"{option}: {name} has no split {split}; it has {', '.join(map(str, found))}"
        )
    return found[split]
