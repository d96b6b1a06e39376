"""Processes that judge mutations, each case with a limit of time and of memory."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import TypeAlias

import torch

from .mutation_verdicts import Verdict

__all__ = ["Judge", "judge_all"]

Judge: TypeAlias = Callable[[Path, int, Path], Verdict]
"""Like `mutation_verdicts.judge`: victims, number and an empty directory -> verdict."""

_MEMORY_BYTES = 2 << 30
"""Beyond what the process takes once everything is imported."""
_START_SECONDS = 300


def judge_all(
    judge: Judge,
    victims: Path,
    numbers: Sequence[int],
    scratch: Path,
    *,
    seconds: float,
    processes: int,
) -> Iterator[Verdict]:
    """Judge mutations in other processes, in any order.

    Args:
        judge: a function of a module.
        victims: the sound checkpoints, its first argument.
        numbers: of the mutations.
        scratch: an empty directory for the damaged copies.
        seconds: a case that takes longer is a hang; its process is killed.
        processes: how many work at once.
    """
    finished: SimpleQueue[Verdict | None] = SimpleQueue()

    def work(share: Sequence[int], own: Path) -> None:
        worker = _Worker(judge, victims, own, seconds)
        try:
            for number in share:
                finished.put(worker.judge(number))
        finally:
            worker.end()
            finished.put(None)

    with ThreadPoolExecutor(processes) as pool:
        shares = [numbers[first::processes] for first in range(processes)]
        work_done = [pool.submit(work, s, scratch / str(i)) for i, s in enumerate(shares)]
        ended = 0
        while ended < processes:
            verdict = finished.get()
            ended += verdict is None
            if verdict is not None:
                yield verdict
    for done in work_done:
        done.result()


class _Worker:
    """A process that judges one case after the other; a new one after a hang or a death."""

    def __init__(self, judge: Judge, victims: Path, scratch: Path, seconds: float) -> None:
        self._arguments = (judge, victims, scratch)
        self._scratch = scratch
        self._seconds = seconds
        self._start()

    def judge(self, number: int) -> Verdict:
        self._connection.send(number)
        try:
            if self._connection.poll(self._seconds):
                verdict: Verdict = self._connection.recv()
                return verdict
            outcome, detail = "hang", f"not done after {self._seconds:g} s"
        except EOFError:
            self._process.join()
            outcome, detail = "crash", f"the process ended with {self._process.exitcode}"
        self.end()
        self._start()
        return Verdict(number, "", (), outcome, detail, self._seconds)

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _start(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_answer, args=(theirs, *self._arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        if not self._connection.poll(_START_SECONDS):
            raise TimeoutError(f"a process was not ready after {_START_SECONDS} s")
        self._connection.recv()


def _answer(connection: Connection, judge: Judge, victims: Path, scratch: Path) -> None:
    """Judge the numbers that arrive, until nobody asks any more."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send("ready")
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        connection.send(judge(victims, number, scratch))
