"""Compile the CPU kernel into a shared library. Needs a C++17 compiler and the standard library.

This module imports nothing but the standard library, so that a package build can load it by path::

    python build.py OUT_DIR
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["CompilerError", "build", "library_name"]

_FOLDER = Path(__file__).with_name("kernel")
_UNIT = _FOLDER / "dialect_cpu.cpp"
"""The one translation unit; it includes every header of the folder."""

_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-pthread")
"""No -march: the library runs on any processor and chooses its instructions at run time. No
contraction into fused operations: the format specifies every rounding."""


class CompilerError(RuntimeError):
    """There is no C++ compiler, or it failed."""


def library_name() -> str:
    """File name of the library: it changes with any kernel file, the flags and the platform."""
    key = hashlib.sha256()
    for path in _kernel_files():
        key.update(hashlib.sha256(path.name.encode()).digest())
        key.update(hashlib.sha256(path.read_bytes()).digest())
    key.update(" ".join((*_FLAGS, platform.system(), platform.machine())).encode())
    return f"dialect_cpu-{key.hexdigest()[:16]}.so"


def _kernel_files() -> list[Path]:
    """The C++ files, in the same order everywhere."""
    return sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cpp", ".h"))


def build(out_dir: Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile into `out_dir` and return the library's path.

    The library appears under its name only when it is complete, so any number of processes may
    build into the same folder.

    Raises:
        CompilerError: if no compiler is found ($CXX, c++, g++, clang++) or it reports an error.
        OSError: if `out_dir` cannot be written.
    """
    compiler = _compiler()
    out_dir.mkdir(parents=True, exist_ok=True)
    target = out_dir / library_name()
    handle, name = tempfile.mkstemp(dir=out_dir, prefix=target.name + ".")
    os.close(handle)
    unfinished = Path(name)
    try:
        command = [*compiler, *_FLAGS, *extra_flags, "-o", str(unfinished), str(_UNIT)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise CompilerError(f"{compiler[0]} cannot be run: {error}") from error
        if done.returncode:
            raise CompilerError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
        unfinished.chmod(0o755)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _compiler() -> list[str]:
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return chosen
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CompilerError("no C++ compiler: none of c++, g++ and clang++ is installed, $CXX is empty")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
