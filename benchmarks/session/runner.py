"""Runs steps one after another, each in a process and a time of its own."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .records import Lines, Work, pack

__all__ = ["Session", "Step"]

_PACK_EVERY_S = 15.0
_RESERVE_S = 6.0
"""Kept back at the end, for the last parcel."""
_REHEARSED_S = 900.0
"""A rehearsed step may take so long: the machine that rehearses is another one."""
_LEAST_S = 5.0
"""With less left a step is not begun."""
_START_S = 4.0
"""A process on the GPU begins to measure after about this time."""

Run: TypeAlias = Callable[[Work], object]


@dataclass(frozen=True)
class Step:
    """One part of a session.

    Attributes:
        name: of its files.
        answers: what is known after it, in a few words.
        limit_s: it is ended after so many seconds.
        run: measures; called in a process that was forked for it.
        fixed_s: seconds that a rehearsal does not see: other processes, references on the CPU.
    """

    name: str
    answers: str
    limit_s: float
    run: Run
    fixed_s: float = 0.0


@dataclass
class Session:
    """Steps, until the time is over.

    Attributes:
        steps: in their order.
        scratch: where it works.
        out: what comes back; rewritten after every step.
        commit: of the code, for every line.
        seconds: for all of it.
        began_s: value of ``time.monotonic()`` at its start.
        rehearsal: there is no GPU.
    """

    steps: list[Step]
    scratch: Path
    out: Path
    commit: str
    seconds: float
    began_s: float
    rehearsal: bool = False

    @property
    def results(self) -> Path:
        """The folder that is packed."""
        return self.scratch / "results"

    def run(self, done: set[str]) -> list[str]:
        """Run the steps that are not `done`; the names of those that failed or found no time."""
        self.results.mkdir(parents=True, exist_ok=True)
        unfinished = []
        for step in self.steps:
            if step.name in done:
                self.say(f"{step.name}: done before")
            elif not self._run(step):
                unfinished.append(step.name)
            pack(self.results, self.out, self.rehearsal)
        return unfinished

    def say(self, text: str) -> None:
        """Print a line with the time since the start, and keep it."""
        line = f"{time.monotonic() - self.began_s:6.1f} s  {text}"
        print(line, flush=True)
        with (self.results / "session.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _run(self, step: Step) -> bool:
        left = self.seconds - (time.monotonic() - self.began_s) - _RESERVE_S
        limit = _REHEARSED_S if self.rehearsal else min(step.limit_s, left)
        if limit < _LEAST_S:
            self.say(f"{step.name}: no time left")
            return False
        began = time.monotonic()
        outcome = self._in_process(step, began + limit)
        took = time.monotonic() - began
        if outcome == "done":
            (self.results / f"{step.name}.done").touch()
        self.say(f"{step.name}: {outcome} after {took:.1f} s of {limit:.0f} ({step.answers})")
        if self.rehearsal:
            self._say_estimate(step)
        return outcome == "done"

    def _in_process(self, step: Step, until_s: float) -> str:
        """Run a step in a process group of its own; how it ended."""
        process = multiprocessing.get_context("fork").Process(
            target=self._child, args=(step, until_s)
        )
        process.start()
        while process.is_alive() and time.monotonic() < until_s:
            process.join(max(0.0, min(_PACK_EVERY_S, until_s - time.monotonic())))
            if process.is_alive():
                pack(self.results, self.out, self.rehearsal)
        if process.is_alive():
            outcome = "ended by its limit"
        else:
            outcome = "done" if process.exitcode == 0 else f"FAILED ({process.exitcode})"
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join(_RESERVE_S / 2)  # a process that waits for the GPU may not end
        return outcome

    def _child(self, step: Step, until_s: float) -> None:
        os.setpgid(0, 0)
        log = os.open(self.results / f"{step.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
        common: dict[str, object] = {"step": step.name, "commit": self.commit}
        if self.rehearsal:
            common["rehearsal"] = True
        lines = Lines(self.results / f"{step.name}.jsonl", common)
        work = Work(self.results, lines, self.rehearsal, until_s)
        status = 1
        try:
            self._measure(step, work)
            status = 0
        except SystemExit as error:
            print(error.code)
        except BaseException:  # the process ends here, whatever it was
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)

    def _measure(self, step: Step, work: Work) -> None:
        if not self.rehearsal:
            step.run(work)
            return
        from ..lib import fake_gpu
        from ..lib.kernel_cache import write_list

        gpu = fake_gpu.install()
        try:
            step.run(work)
        finally:
            folder = self.scratch / "rehearsed"
            folder.mkdir(exist_ok=True)
            write_list(folder / f"{step.name}.kernels", gpu.kernels)
            (folder / f"{step.name}.json").write_text(
                json.dumps({"clock_s": gpu.clock_s, "kernels": len(gpu.kernels)})
            )

    def estimates(self) -> dict[str, float]:
        """Seconds on the card of every step that was rehearsed."""
        found = {}
        for step in self.steps:
            file = self.scratch / "rehearsed" / f"{step.name}.json"
            if file.exists():
                found[step.name] = _START_S + step.fixed_s + json.loads(file.read_text())["clock_s"]
        return found

    def _say_estimate(self, step: Step) -> None:
        estimate = self.estimates().get(step.name)
        if estimate is not None:
            longer = "  LONGER THAN ITS LIMIT" if estimate > step.limit_s else ""
            self.say(f"  estimate on the card: {estimate:.0f} s of {step.limit_s:.0f}{longer}")
