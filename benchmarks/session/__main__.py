"""All that needs a GPU, in minutes: benchmarks/gpu_session.sh sets the environment and calls this.

benchmarks/gpu_session.sh --minutes 12 --kernels kernels.tar.gz --wheels WHEELS OUT
benchmarks/gpu_session.sh --minutes 12 --done FOLDER OUT      # goes on after an earlier session
benchmarks/gpu_session.sh --rehearse OUT                      # without a GPU: counts, estimates
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..lib.gpu_timing import need_gpu
from ..lib.harness import ROOT, commit
from ..lib.kernel_cache import CacheError, key_here, settle_names, sources, unpack, write_list
from . import records
from .runner import Session
from .steps import OPTIONAL, STEPS

__all__ = ["carried_bytes", "options"]

_SPARE_CORES = 3
"""Left to the session by the compilation in the background."""


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_session.sh", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that comes back")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all of it")
    parser.add_argument("--carry-mib", type=float, default=64.0, help="most that may travel there")
    parser.add_argument("--kernels", type=Path, help="from python -m benchmarks.session.precompile")
    parser.add_argument("--wheels", type=Path, help="folder of packages that are missing there")
    parser.add_argument("--done", type=Path, help="OUT of an earlier session, to go on after it")
    names = [step.name for step in (*STEPS, *OPTIONAL)]
    parser.add_argument("--steps", nargs="+", choices=names, help="only these, in this order")
    parser.add_argument("--scratch", type=Path, help="where to work; by default a new folder")
    parser.add_argument("--rehearse", action="store_true", help="count and estimate, without a GPU")
    return parser


def carried_bytes(*extra: Path | None) -> int | None:
    """Bytes of the working tree and of what travels beside it; None without git's list of files."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True)
    if done.returncode != 0:
        return None
    names = {name for name in done.stdout.decode().split("\0") if name}
    files = [ROOT / name for name in names]
    for path in extra:
        if path is not None:
            files += path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> int:
    """Run the session; the exit status is 1 if a step failed or found no time."""
    given = options().parse_args()
    began_s = time.monotonic() - max(0.0, time.time() - float(os.environ.get("BEGAN") or "inf"))
    scratch = given.scratch or Path(tempfile.mkdtemp(prefix="gpu-session-"))
    every = {step.name: step for step in (*STEPS, *OPTIONAL)}
    steps = [every[name] for name in given.steps] if given.steps else STEPS
    seconds = 60 * given.minutes
    session = Session(steps, scratch, given.out, commit(), seconds, began_s, given.rehearse)
    session.results.mkdir(parents=True, exist_ok=True)
    fits = _say_what_travels(session, given.carry_mib, given.kernels, given.wheels)
    settle_names()
    done = records.take_over(given.done, session.results) if given.done else set()
    if not given.rehearse:
        _need_gpu()
    compiling = _use_kernels(session, given.kernels) if given.kernels else None
    unfinished = session.run(done)
    if compiling is not None:
        compiling.kill()
    if given.rehearse:
        fits = _sum_up(session) and fits
    session.say("unfinished: " + (", ".join(unfinished) or "nothing"))
    records.pack(session.results, session.out, session.rehearsal)
    return bool(unfinished) or not fits


def _need_gpu() -> None:
    """In a process of its own: one that is to be forked must not have used CUDA."""
    process = multiprocessing.get_context("fork").Process(target=need_gpu)
    process.start()
    process.join()
    if process.exitcode != 0:
        sys.exit(1)


def _say_what_travels(
    session: Session, most_mib: float, kernels: Path | None, wheels: Path | None
) -> bool:
    carried = carried_bytes(kernels, wheels)
    if carried is None:
        return True
    session.say(f"carried: {carried / 2**20:.1f} of {most_mib:.0f} MiB, commit {session.commit}")
    return carried <= most_mib * 2**20


def _use_kernels(session: Session, archive: Path) -> subprocess.Popen[bytes] | None:
    """Fill Triton's cache; compile what it lacks beside the steps, on the cores they leave."""
    folder = session.scratch / "triton"
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    try:
        facts, kernels = unpack(archive, folder)
    except CacheError as error:
        session.say(f"no kernels: {error}")
        return None
    if facts.key != key_here():
        session.say(f"kernels are of another Triton than this one ({facts.triton}): not used")
    elif facts.sources != sources():
        session.say("kernels are of other sources than these: those that changed are compiled")
    else:
        session.say(f"kernels: {facts.kernels} are compiled")
    if session.rehearsal:
        return None
    list_ = session.scratch / "kernels.json"
    write_list(list_, kernels)
    workers = max(1, len(os.sched_getaffinity(0)) - _SPARE_CORES)
    command = [
        *("nice", "-n", "10", sys.executable, "-m", "benchmarks.lib.kernel_cache"),
        *("compile", str(list_), "--workers", str(workers)),
    ]
    with (session.results / "kernels.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def _sum_up(session: Session) -> bool:
    """Print the estimates of a rehearsal together; whether they fit."""
    estimates = session.estimates()
    total = sum(estimates.values())
    session.say("estimates on the card, in seconds; not measured:")
    start = 0.0
    for step in session.steps:
        if step.name in estimates:
            session.say(f"  {start:5.0f}  {step.name}: {estimates[step.name]:.0f}")
            start += estimates[step.name]
    session.say(f"  {total:5.0f}  of {session.seconds:.0f}")
    return total <= session.seconds


if __name__ == "__main__":
    sys.exit(main())
