"""What the demonstrations share on the terminal: how paths are shown, and how to be interrupted."""

from __future__ import annotations

import signal
from pathlib import Path

__all__ = ["interrupt_on_signals", "shown"]


def shown(path: Path) -> str:
    """A path as a user would type it: relative where it lies below the current directory."""
    absolute = path.resolve()
    below = absolute.is_relative_to(Path.cwd())
    return str(absolute.relative_to(Path.cwd()) if below else absolute)


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that `with` blocks stop their servers."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
