"""Running the same work on many pieces, on all cores, with results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["Workers"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Workers:
    """Threads that share work piece by piece, each piece on one core.

    torch's own threads meet at a barrier after every operation, which costs more than the
    operation where pieces are small or cores are busy; while this is open torch uses none.

    Args:
        count: threads; default: the cores this process may use.
    """

    def __init__(self, count: int | None = None) -> None:
        self._count = count or _usable_cores()
        self._pool = ThreadPoolExecutor(self._count)
        self._torch_threads = 1

    @property
    def count(self) -> int:
        """How many there are."""
        return self._count

    def __enter__(self) -> Workers:
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Let torch use as many threads of its own inside the ``with`` block."""
        torch.set_num_threads(self._count)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    def map(
        self, function: Callable[[_Item], _Result], items: Iterable[_Item]
    ) -> Iterator[_Result]:
        """``function(item)`` of every item in their order; only few items are held at a time."""
        under_way: deque[Future[_Result]] = deque()
        for item in items:
            under_way.append(self._pool.submit(function, item))
            if len(under_way) > self._count + 1:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _usable_cores() -> int:
    """Cores this process may use; all of the machine's where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
