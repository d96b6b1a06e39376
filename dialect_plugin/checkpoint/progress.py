"""What a pass over a checkpoint reports while it runs, and the bar that shows it."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["Progress", "ProgressBar", "Silent"]


class Progress(Protocol):
    """Receives the progress of a pass over a checkpoint's tensors."""

    def begin(self, what: str, tensors: int, nbytes: int) -> None:
        """A pass over `tensors` tensors of `nbytes` bytes together begins."""

    def advance(self, nbytes: int) -> None:
        """One tensor of `nbytes` bytes is done."""


class Silent:
    """Shows nothing."""

    def begin(self, what: str, tensors: int, nbytes: int) -> None:
        """Ignore the beginning of a pass."""

    def advance(self, nbytes: int) -> None:
        """Ignore a tensor."""


class ProgressBar:
    """A bar on stderr with tensors, bytes and the remaining time; a context manager."""

    def __init__(self) -> None:
        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[tensors]} tensors"),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None
        self._done = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def begin(self, what: str, tensors: int, nbytes: int) -> None:
        """Start a bar of its own for a new pass."""
        self._progress.start()  # not earlier: an empty display would put a line before an error
        self._done = 0
        self._task = self._progress.add_task(what, total=nbytes, done=0, tensors=tensors)

    def advance(self, nbytes: int) -> None:
        """Move the bar on by one tensor."""
        if self._task is not None:
            self._done += 1
            self._progress.update(self._task, advance=nbytes, done=self._done)
