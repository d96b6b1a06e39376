"""How often and for how long the hook of one transformer has worked."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Meter"]


class Meter:
    """Counts and times for the summary and for benchmarks.

    Attributes:
        counts: how often things happened, by name.
        seconds: time spent in the hook's parts, by name; on a GPU the time to launch them, unless
            `wait` waits for it.
        wait: called whenever the clock of a part is read; ``torch.cuda.synchronize`` in benchmarks.
    """

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.wait: Callable[[], object] = lambda: None
        self._lock = threading.Lock()  # threads may share the transformer

    def add(self, what: str, number: int = 1) -> None:
        """Count something."""
        with self._lock:
            self.counts[what] += number

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the time of the `with` block to `seconds`."""
        self.wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.wait()
            spent = time.perf_counter() - start
            with self._lock:
                self.seconds[part] += spent
