"""The frame of a benchmark: gate, timing, and the one JSON file that a run leaves behind.

A benchmark is a module ``benchmarks/ROOM/bench_NAME.py`` with

* ``gate() -> list[str]``: faults in the results of the code that is about to be measured; nothing
  is measured unless the list is empty (:mod:`benchmarks.lib.gate` has the part that all share);
* ``measure() -> dict``: the figures, as JSON data;
* ``tables(figures) -> dict[str, Table]`` and optionally ``plots(figures) -> dict[str, Figure]``:
  how :mod:`benchmarks.lib.render` shows the figures;
* optionally ``PACKAGES``: names of the packages whose versions stand in the captions of its tables;
  without it PyTorch's alone.

The module ends with ``main(gate, measure)`` and is started as
``python -m benchmarks.ROOM.bench_NAME``. Every benchmark has the option ``--out DIR``. A benchmark
with further options passes `main` a function that adds them; `measure` receives their values.
A benchmark of independent parts that take long ends with `main_in_parts`: each part has a file of
its own, ``NAME-PART.json``, that is written as soon as the part is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "RESULTS",
    "ROOT",
    "Machine",
    "Report",
    "Result",
    "Table",
    "Timing",
    "in_new_process",
    "main",
    "main_in_parts",
    "module_of",
    "ratio",
    "read_result",
    "time_calls",
]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Table: TypeAlias = Sequence[Sequence[str]]
"""Rows of cells, the first row is the head."""


class Report(Protocol):
    """Receives a measurement as soon as there is one, for sessions that may be cut short."""

    def __call__(self, **found: Any) -> object: ...


_MEASURED_CODE = (
    "benchmarks/**/*.py",
    "demo",
    "dialect_plugin",
    "diffusers_hook",
    "triton_kernels",
)
_VERSIONS = (
    "blockdialect",
    "torch",
    "triton",
    "transformers",
    "vllm",
    "diffusers",
    "safetensors",
)


class Machine(BaseModel):
    """Properties that figures depend on; nothing that names or locates the machine.

    Attributes:
        cpu: model name.
        cores: cores that this process may use.
        instructions: the vector instructions that torch uses, e.g. ``"AVX2"``.
        memory_gib: main memory.
        gpu: model name, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: str
    cores: int
    instructions: str
    memory_gib: float
    gpu: str | None

    @classmethod
    def here(cls) -> Machine:
        """The machine this runs on."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(
            cpu=_cpu_model(),
            cores=len(os.sched_getaffinity(0)),
            instructions=torch.backends.cpu.get_cpu_capability(),
            memory_gib=round(memory / 2**30, 1),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        )

    def __str__(self) -> str:
        """Processor, cores and GPU: as much as a caption has room for."""
        cpu = " ".join(self.cpu.replace("(R)", "").replace("(TM)", "").split())
        return ", ".join([cpu, f"{self.cores} cores", *([self.gpu] if self.gpu else [])])


class Result(BaseModel):
    """One run of one benchmark, as it is committed in ``benchmarks/results/NAME.json``.

    Attributes:
        name: NAME of ``bench_NAME.py``, or NAME-PART for a part that is measured by itself.
        command: the command that repeats the run.
        commit: of the measured code; ends in ``-dirty`` if that code was changed since.
        date: UTC, ISO 8601.
        machine: where it ran.
        versions: of Python and of the packages that can matter, as far as they are installed.
        figures: the measurements; their fields' names tell units and spreads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9_]+(-[a-z0-9_]+)?$")
    command: str
    commit: str
    date: str
    machine: Machine
    versions: dict[str, str]
    figures: dict[str, Any]

    def caption(self, packages: Sequence[str]) -> str:
        """One short line: command; machine; versions of `packages`; commit, day."""
        versions = ", ".join(f"{name} {self.versions[name]}" for name in packages)
        day = self.date.partition("T")[0]
        return f"`{self.command}`; {self.machine}; {versions}; commit {self.commit}, {day}"


class Timing(BaseModel):
    """Wall-clock times of repeated calls.

    Attributes:
        median_s, fastest_s, slowest_s: in seconds.
        rounds_s: all of them, in their order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    median_s: float
    fastest_s: float
    slowest_s: float
    rounds_s: list[float]

    @classmethod
    def of(cls, rounds_s: Sequence[float]) -> Timing:
        """The summary of `rounds_s`."""
        return cls(
            median_s=statistics.median(rounds_s),
            fastest_s=min(rounds_s),
            slowest_s=max(rounds_s),
            rounds_s=list(rounds_s),
        )


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    warmup: int = 1,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time several calls in turn, so that a change of the machine's pace meets all of them.

    Args:
        calls: name -> call; the calls of one round follow each other.
        rounds: timed rounds.
        warmup: rounds before these, not timed.
        synchronize: waits until a device has finished, e.g. ``torch.cuda.synchronize``.
    """
    wait = synchronize or (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-warmup, rounds):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(rounds_s) for name, rounds_s in seconds.items()}


def ratio(peer: Timing, ours: Timing) -> Timing:
    """How many times faster than the peer: peer's time / ours, round by round.

    Both must come from one call of :func:`time_calls`. The fields of the result are ratios, not
    seconds; ``median_s`` above 1 means that ours is faster.
    """
    pairs = zip(peer.rounds_s, ours.rounds_s, strict=True)
    return Timing.of([theirs / own for theirs, own in pairs])


def measure_result(
    name: str, gate: Callable[[], list[str]], measure: Callable[[], dict[str, Any]]
) -> Result:
    """Run the gate, then the measurement.

    Raises:
        SystemExit: with the faults, if the gate finds any; nothing is measured then.
    """
    faults = gate()
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise SystemExit(f"{name}: not measured, because its gate found faults:\n{listed}")
    before = commit()
    figures = measure()
    return Result(
        name=name,
        command=" ".join(["python -m", _started(), *_shown(sys.argv[1:])]),
        commit=before,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        machine=Machine.here(),
        versions=_versions(),
        figures=figures,
    )


def main(
    gate: Callable[[], list[str]],
    measure: Callable[..., dict[str, Any]],
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Measure and write ``NAME.json``, NAME being that of the started module.

    Args:
        gate: returns faults, see the top of this module.
        measure: returns the figures; it receives the values of `options` as keyword arguments.
        options: adds options to the command.
    """
    name, given, out = _arguments(options)
    _write(measure_result(name, gate, lambda: measure(**given)), out)


def main_in_parts(
    gate: Callable[[], list[str]],
    measure: Callable[..., dict[str, Any]],
    options: Callable[[argparse.ArgumentParser], None],
    parts: Callable[[str], Mapping[str, str]],
) -> None:
    """Measure one part after the other and write ``NAME-PART.json`` for each.

    Args:
        gate: as in :func:`main`; it runs before each part.
        measure: returns the figures of a part; it receives the part, then the values of `options`
            as keyword arguments.
        options: adds options to the command, among them ``--models``, the names of the parts.
        parts: value of ``--models`` -> name of each part -> PART in its file's name.
    """
    name, given, out = _arguments(options)
    for part, suffix in parts(given.pop("models")).items():
        result = measure_result(f"{name}-{suffix}", gate, partial(measure, part, **given))
        _write(result, out)


def _arguments(
    options: Callable[[argparse.ArgumentParser], None] | None,
) -> tuple[str, dict[str, Any], Path]:
    """The name of the started benchmark, the values of its options, and the results' folder."""
    parser = argparse.ArgumentParser(prog=f"python -m {_started()}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    if options is not None:
        options(parser)
    given = vars(parser.parse_args())
    out: Path = given.pop("out")
    return Path(sys.argv[0]).stem.removeprefix("bench_"), given, out


def _write(result: Result, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{result.name}.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(target)
    print(
        f"wrote {target.name}; python -m benchmarks.lib.render shows the results in "
        "benchmarks/results"
    )


def in_new_process(function: Callable[[], Any], variables: Mapping[str, str]) -> Any:
    """Call a function of a module in a new Python process.

    Args:
        function: takes no arguments and returns JSON data.
        variables: environment variables beside those of this process.

    Raises:
        CalledProcessError: if it fails; its error output is that of this process.
    """
    module = _started() if function.__module__ == "__main__" else function.__module__
    name = function.__name__
    program = f"import json; from {module} import {name}; print(json.dumps({name}()))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | variables,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def module_of(name: str) -> str:
    """The module of a result's benchmark, for example ``"benchmarks.kernels.bench_cpu"``.

    Raises:
        ValueError: if there is no benchmark of this name.
    """
    name = name.partition("-")[0]
    found = sorted((ROOT / "benchmarks").glob(f"*/bench_{name}.py"))
    if len(found) != 1:
        raise ValueError(f"{name}: there is no benchmarks/*/bench_{name}.py")
    return f"benchmarks.{found[0].parent.name}.bench_{name}"


def read_result(path: Path) -> Result:
    """Read a committed result.

    Raises:
        ValueError: if the file holds no result, or the result of another benchmark.
    """
    result = Result.model_validate_json(path.read_text(encoding="utf-8"))
    if result.name != path.stem:
        raise ValueError(f"{path.name}: holds the result of {result.name!r}; rename the file")
    return result


def _started() -> str:
    """The module that was started, for example ``"benchmarks.kernels.bench_cpu"``."""
    file = Path(sys.argv[0])
    return f"benchmarks.{file.parent.name}.{file.stem}"


def _shown(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command without ``--out``, which is a place and not a choice."""
    shown, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith("--out"):
            shown.append(argument)
        skip = argument == "--out"
    return shown


def commit() -> str:
    """The short commit id, with ``-dirty`` if the code under measurement differs from it.

    In a copy of the tree without its history ``BENCHMARK_COMMIT`` states the id.
    """
    stated = os.environ.get("BENCHMARK_COMMIT")
    if stated:
        return stated
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", *_MEASURED_CODE)
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _VERSIONS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
