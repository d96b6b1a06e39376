"""The progress of an evaluation, and the bar that shows it."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["Bar", "Progress", "Silent"]


class Progress(Protocol):
    """Receives the progress of steps."""

    def begin(self, what: str, steps: int) -> None:
        """Something of so many steps begins."""

    def advance(self) -> None:
        """One step is done."""


class Silent:
    """Shows nothing."""

    def begin(self, what: str, steps: int) -> None:
        """Ignore the beginning."""

    def advance(self) -> None:
        """Ignore a step."""


class Bar:
    """A bar on stderr for everything that began; a context manager."""

    def __init__(self) -> None:
        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def begin(self, what: str, steps: int) -> None:
        """Start a bar of its own."""
        self._progress.start()  # not earlier: an empty display would put a line before an error
        self._task = self._progress.add_task(what, total=steps)

    def advance(self) -> None:
        """Move the bar on by one step."""
        if self._task is not None:
            self._progress.advance(self._task)
