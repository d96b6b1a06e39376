"""Peak memory: of a process and everything it started, from ``/proc`` (Linux), or of the GPU."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

__all__ = ["MemorySeries", "PeakMemory", "device_bytes", "process_tree", "watch"]


@dataclass
class PeakMemory:
    """Samples a process tree in a thread of its own, as a context manager.

    Pages that processes share are counted once: the proportional set size (PSS) divides a page by
    the number of its users. A peak that is shorter than the interval can be missed.

    Attributes:
        pid: root of the tree.
        interval_s: seconds between two samples.
        pss: largest sum of PSS, in bytes; contains mapped files as far as they are in memory.
        anonymous: largest sum of anonymous memory, in bytes; mapped files are not in it.
        samples: how many samples were taken.
    """

    pid: int
    interval_s: float = 0.05
    pss: int = 0
    anonymous: int = 0
    samples: int = 0

    @property
    def peak(self) -> int:
        """The figure that a result shows, in bytes: the largest PSS."""
        return self.pss

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.sample()
            if self._stop.wait(self.interval_s):
                return

    def sample(self) -> None:
        """Take one sample now."""
        pss, anonymous = _tree_memory(self.pid)
        self.pss, self.anonymous = max(self.pss, pss), max(self.anonymous, anonymous)
        self.samples += 1


@dataclass
class MemorySeries(PeakMemory):
    """The same, with all samples kept.

    Attributes:
        seconds: when each sample was taken, by the monotonic clock.
        sizes: anonymous memory in each sample, in bytes.
    """

    seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def sample(self) -> None:
        """Take one sample now."""
        pss, anonymous = _tree_memory(self.pid)
        self.seconds.append(time.monotonic())
        self.sizes.append(anonymous)
        self.pss, self.anonymous = max(self.pss, pss), max(self.anonymous, anonymous)
        self.samples += 1


@dataclass
class DeviceMemory(PeakMemory):
    """The same of the GPU, whatever processes use it.

    Attributes:
        before: bytes in use on it before the watched process started; not counted.
        used: the largest amount beyond that, in bytes.
    """

    before: int = 0
    used: int = 0

    @property
    def peak(self) -> int:
        """The figure that a result shows, in bytes: the largest amount beyond `before`."""
        return self.used

    def sample(self) -> None:
        """Take one sample now."""
        self.used = max(self.used, device_bytes() - self.before)
        self.samples += 1


def device_bytes() -> int:
    """Bytes in use on the GPU; 0 where there is none."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def watch(pid: int, before: int) -> PeakMemory:
    """A watch over the GPU's memory where there is a GPU, else over that of a process tree.

    Args:
        pid: root of the tree.
        before: `device_bytes` before it was started.
    """
    if torch.cuda.is_available():
        return DeviceMemory(pid, before=before)
    return PeakMemory(pid, interval_s=0.5)  # one sample of a large process takes 0.05 s


def _tree_memory(pid: int) -> tuple[int, int]:
    """PSS and anonymous memory of a process tree, in bytes."""
    fields = [_rollup(process) for process in process_tree(pid)]
    return sum(f.get("Pss", 0) for f in fields), sum(f.get("Anonymous", 0) for f in fields)


def process_tree(pid: int) -> list[int]:
    """A process and everything it started, as far as it is running."""
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _rollup(pid: int) -> dict[str, int]:
    """Fields of ``smaps_rollup`` in bytes; nothing for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split() for line in lines)
    return {parts[0].removesuffix(":"): 1024 * int(parts[1]) for parts in fields}
