"""Converting tiny checkpoints in tests: options, refusals and the bytes that are written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.options import ConvertOptions
from dialect_plugin.checkpoint.reader import CheckpointError
from dialect_plugin.scheme import Scheme


def options_of(
    targets: list[str] | None = None, strict: bool = False, experts: bool = True, **scheme: Any
) -> ConvertOptions:
    """Options of a conversion from one flat list of keywords."""
    return ConvertOptions(
        scheme=Scheme.parse(scheme), targets=targets or [], strict=strict, experts=experts
    )


def refused(
    source: Path,
    destination: Path,
    match: str,
    error: type[Exception] = CheckpointError,
    **options: Any,
) -> None:
    """Assert that the conversion fails with one sentence and leaves no trace."""
    with pytest.raises(error, match=match) as caught:
        convert(source, destination, options_of(**options))
    assert "\n" not in str(caught.value)
    assert not destination.exists()


def edit_config(path: Path, **changes: object) -> None:
    """Change entries of the config.json in the directory `path`."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file in the directory `path`."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}
