"""Run all tests in four stages and sum them up in the last line. Run by `make test`.

Triton reads `TRITON_INTERPRET` once, when it is imported, so tests in its interpreter have
processes of their own; so do those that compile with an older Triton, the one beside the oldest
torch that is supported: they come first, because meanwhile the CPU kernel is built, which they do
not need. Each stage runs even if an earlier one failed.

A stage has two processes, as most tests compute on one core. Each takes half of the list, and what
the other has not begun when its own is done: neighbours, which share their fixtures, stay together.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
OLD_TRITON = "3.6.0"
OLD_TRITON_FOLDER = ROOT / ".cache" / f"triton-{OLD_TRITON}"
STAGES = (
    (
        f"kernels compiled by Triton {OLD_TRITON}",
        {"PYTHONPATH": str(OLD_TRITON_FOLDER)},
        ("tests/kernels/gpu/compiled",),
    ),
    ("everything quick", {}, ("-m", "not slow")),
    (
        "kernels in Triton's interpreter",
        {"TRITON_INTERPRET": "1"},
        ("tests/kernels/gpu/interpreted",),
    ),
    ("vLLM's engine and server, crashes, wheels, compiled kernels", {}, ("-m", "slow")),
)
BUILD_KERNEL = "from dialect_kernels import cpu; cpu.available()"
INTERPRETED = "--ignore=tests/kernels/gpu/interpreted"
PROCESSES = ("--numprocesses=2", "--dist=worksteal")


def main() -> int:
    """Run the stages; the exit status is 0 if each of them passed at least one test."""
    began = time.monotonic()
    kernel = subprocess.Popen([sys.executable, "-c", BUILD_KERNEL], cwd=ROOT)
    if not (OLD_TRITON_FOLDER / "triton").exists():
        wanted = ("--no-deps", "--target", str(OLD_TRITON_FOLDER), f"triton=={OLD_TRITON}")
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
    total: Counter[str] = Counter()
    failed = []
    for number, (name, environment, arguments) in enumerate(STAGES, start=1):
        print(f"\ntests, stage {number} of {len(STAGES)}: {name}", flush=True)
        counts, status = run_stage(environment, arguments)
        total += counts
        if status != 0 or counts["passed"] == 0:
            failed.append(str(number))
        kernel.wait()  # or each process of the next stage would build its own
    if failed:
        print(f"\nfailed: stage {', '.join(failed)} of {len(STAGES)}")
    print(f"\n{last_line(total, time.monotonic() - began)}")
    return 1 if failed else 0


def last_line(total: Counter[str], seconds: float) -> str:
    """The sum of all stages in the form of pytest's own last line, which programs read."""
    shown = ", ".join(
        f"{total[kind]} {kind}"
        for kind in ("failed", "passed", "skipped")
        if total[kind] or kind == "passed"
    )
    minutes = timedelta(seconds=int(seconds))
    return f" {shown} in {seconds:.2f}s ({minutes}) ".center(80, "=")


def run_stage(environment: dict[str, str], arguments: tuple[str, ...]) -> tuple[Counter[str], int]:
    """Tests by outcome, and pytest's exit status."""
    ignored = () if environment else (INTERPRETED,)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        options = (*PROCESSES, f"--junit-xml={report}", *ignored, *arguments)
        command = [sys.executable, "-m", "pytest", *options]
        status = subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode
        return outcomes(report), status


def outcomes(report: Path) -> Counter[str]:
    """Tests in a JUnit report by outcome: failed (errors too), passed, skipped."""
    counts: Counter[str] = Counter()
    if report.exists():
        for suite in ElementTree.parse(report).iter("testsuite"):
            bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped = int(suite.get("skipped", 0))
            counts["failed"] += bad
            counts["skipped"] += skipped
            counts["passed"] += int(suite.get("tests", 0)) - bad - skipped
    return counts


if __name__ == "__main__":
    sys.exit(main())
