"""Compile beforehand every kernel that a session needs, for another machine's Triton.

    python -m benchmarks.session.precompile kernels.tar.gz --target TARGET

rehearses the session to see its kernels, compiles them for compute capability 9.0 and packs them.
TARGET is the other machine's Triton, its wheel unpacked; it must be of the version that is
installed here. Without it the kernels are for the Triton that is installed here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton

from ..lib.harness import ROOT
from ..lib.kernel_cache import (
    Facts,
    Kernel,
    key_here,
    key_of,
    pack,
    read_list,
    settle_names,
    sources,
    write_list,
)
from .runner import Session
from .steps import STEPS

_MOST_MIB = 20


def main() -> int:
    """Rehearse, compile, pack; the exit status is 1 if a step cannot be rehearsed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.session.precompile")
    parser.add_argument("file", type=Path)
    parser.add_argument("--target", type=Path, help="unpacked wheel of the other Triton")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS])
    given = parser.parse_args()
    before = sources()
    settle_names()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        chosen = [step for step in STEPS if not given.steps or step.name in given.steps]
        now = time.monotonic()
        session = Session(chosen, scratch, scratch / "out", "rehearsal", 0.0, now, rehearsal=True)
        unfinished = session.run(set())
        kernels = _together(scratch / "rehearsed")
        print(f"{len(kernels)} kernels to compile", flush=True)
        _compile(scratch, kernels, given.target)
        if sources() != before:
            raise SystemExit("the kernels' sources have changed meanwhile; precompile them again")
        key = key_of(given.target) if given.target else key_here()
        facts = Facts(key, triton.__version__, before, len(kernels))
        size = pack(scratch / "cache", kernels, facts, given.file, _MOST_MIB << 20)
    print(f"{given.file.name}: {len(kernels)} kernels, {size / 2**20:.1f} MiB")
    return bool(unfinished)


def _together(folder: Path) -> list[Kernel]:
    """The kernels of all steps, in the order of the session."""
    files = [folder / f"{step.name}.kernels" for step in STEPS]
    found = [kernel for file in files if file.exists() for kernel in read_list(file)]
    return list(dict.fromkeys(found))


def _compile(scratch: Path, kernels: list[Kernel], target: Path | None) -> None:
    list_ = scratch / "kernels.json"
    write_list(list_, kernels)
    command = [sys.executable, "-m", "benchmarks.lib.kernel_cache", "compile", str(list_)]
    command += ["--target", str(target.resolve())] if target else []
    cache = {"TRITON_CACHE_DIR": str(scratch / "cache"), "TRITON_STORE_BINARY_ONLY": "1"}
    subprocess.run(command, cwd=ROOT, env=os.environ | cache)


if __name__ == "__main__":
    sys.exit(main())
