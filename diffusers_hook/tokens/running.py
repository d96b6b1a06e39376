"""The pipeline that generates in this thread, where it is one that was enabled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["running", "running_pipeline"]

_of_thread = threading.local()


@contextmanager
def running(pipeline: object) -> Iterator[None]:
    """Inside the `with` block, the pipeline is this thread's :func:`running_pipeline`."""
    before = running_pipeline()
    _of_thread.pipeline = pipeline
    try:
        yield
    finally:
        _of_thread.pipeline = before


def running_pipeline() -> Any:
    """The innermost enabled pipeline whose call is in progress in this thread, or None."""
    return getattr(_of_thread, "pipeline", None)
