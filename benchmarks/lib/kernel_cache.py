"""Triton kernels that are compiled on one machine and used on another.

Triton finds a compiled kernel by a hash of its own files (its compiler's library, which differs
between the wheels of different Pythons, among them), of the kernel's source and constants, of the
options, the device and ptxas's version. Neither Python's version nor any path is in it. So a cache
that was filled here is of use there if the hash is made of the files of *that* Triton:
``TARGET``, the unpacked wheel for the other Python. The compiler itself is the one installed here,
which has to be of the same version.

    python -m benchmarks.lib.kernel_cache compile LIST [--target TARGET] [--workers N]

compiles the kernels of a list into Triton's cache ($TRITON_CACHE_DIR), several at once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "CacheError",
    "Facts",
    "Kernel",
    "compile_kernels",
    "key_here",
    "key_of",
    "pack",
    "read_list",
    "settle_names",
    "sources",
    "unpack",
    "write_list",
]

_FACTS = "facts.json"
_LIST = "kernels.json"
_GROUP = "__grp__"
"""Triton's files that name the files of a kernel begin with it; they hold whole paths."""
_KERNELS = Path(__file__).resolve().parents[2] / "triton_kernels" / "dialect_kernels" / "gpu"


class CacheError(Exception):
    """Why a packed cache cannot be made or used, in one sentence."""


class Kernel(NamedTuple):
    """What Triton compiles a kernel from.

    Attributes:
        module, name: where the function is.
        data: for its method ``preload``.
    """

    module: str
    name: str
    data: str


@dataclass(frozen=True)
class Facts:
    """What a packed cache says of itself.

    Attributes:
        key: hash of the Triton it is for, from :func:`key_of`.
        triton: that Triton's version.
        sources: hash of the kernels' sources.
        kernels: how many there are.
    """

    key: str
    triton: str
    sources: str
    kernels: int


def key_here() -> str:
    """The hash that stands for the Triton of this process in the names of its kernels."""
    from triton.runtime.cache import triton_key

    return hashlib.sha256(triton_key().encode()).hexdigest()


def key_of(target: Path) -> str:
    """:func:`key_here` of another Triton of the same version, an unpacked wheel.

    Raises:
        CacheError: if there is none in `target`, or its version is another one.
    """
    return hashlib.sha256(_triton_key_of(target).encode()).hexdigest()


@cache
def _triton_key_of(target: Path) -> str:
    import triton

    file = target / "triton" / "runtime" / "cache.py"
    spec = importlib.util.spec_from_file_location("_target_triton_cache", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise CacheError(f"{target}: holds no Triton; unpack its wheel there")
    text = (target / "triton" / "__init__.py").read_text(encoding="utf-8")
    if f"'{triton.__version__}'" not in text.replace('"', "'"):
        raise CacheError(
            f"{target}: is not Triton {triton.__version__}, which compiles here; "
            "unpack a wheel of this version"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.triton_key())


def settle_names() -> None:
    """Give every kernel the name that it has in a packed cache; call it before the first launch.

    Triton hashes a function when it is first compiled, and takes in the constants of functions it
    calls only if they were hashed before: the name in the cache depends on the order of launches.
    So all functions are hashed here, in one order.
    """
    from triton.runtime.jit import JITFunction

    for file in sorted(_KERNELS.glob("*.py")):
        module = importlib.import_module(f"dialect_kernels.gpu.{file.stem}")
        for _, function in sorted(vars(module).items()):
            if isinstance(function, JITFunction):
                function.cache_key  # noqa: B018 (a property that remembers)


def sources() -> str:
    """Hash of the kernels' sources: a list of kernels is of them."""
    together = hashlib.sha256()
    for file in sorted(_KERNELS.glob("*.py")):
        together.update(file.name.encode())
        together.update(file.read_bytes())
    return together.hexdigest()


def write_list(file: Path, kernels: Iterable[Sequence[str]]) -> None:
    """Write a list of kernels, each once."""
    once = dict.fromkeys(Kernel(*kernel) for kernel in kernels)
    file.write_text(json.dumps(list(once)), encoding="utf-8")


def read_list(file: Path) -> list[Kernel]:
    """A list that :func:`write_list` wrote."""
    return [Kernel(*kernel) for kernel in json.loads(file.read_text(encoding="utf-8"))]


def compile_kernels(
    kernels: Sequence[Kernel], workers: int, target: Path | None = None
) -> list[str]:
    """Compile for compute capability 9.0 into Triton's cache, and the launchers where CUDA is.

    Args:
        kernels: what to compile; those that the cache holds cost next to nothing.
        workers: processes, forked from this one, which must not have used CUDA.
        target: see :func:`key_of`; None compiles for this Triton.

    Returns:
        One line for each that does not compile.
    """
    import triton

    from .fake_gpu import driver

    if target is not None:
        name = _triton_key_of(target)
        triton.runtime.cache.triton_key = lambda: name
    triton.runtime.driver.set_active(driver())
    triton.knobs.runtime.jit_cache_hook = None
    settle_names()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return [line for line in pool.imap_unordered(_compile, kernels) if line]


def _compile(kernel: Kernel) -> str:
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    try:
        compiled = function.preload(kernel.data)
        _build_launcher(compiled)
    except Exception as error:  # the compiler's errors have no common class
        return f"{kernel.name}: {type(error).__name__}: {str(error).splitlines()[:1]}"
    return ""


def _build_launcher(compiled: Any) -> None:
    """Compile the C function that passes a kernel's arguments, where there is CUDA's driver."""
    from triton.backends.nvidia import driver

    try:
        driver.library_dirs()
    except Exception:  # an assertion or an OSError: there is no driver
        return
    driver.CudaLauncher(compiled.src, compiled.metadata)


def pack(folder: Path, kernels: Sequence[Kernel], facts: Facts, target: Path, most: int) -> int:
    """Write a cache as one archive, without the paths of this machine.

    Args:
        folder: Triton's cache.
        kernels: the list that it was compiled from.
        facts: go into the archive.
        target: the archive, a ``.tar.gz``.
        most: bytes it may have.

    Returns:
        Its bytes.

    Raises:
        CacheError: if it is larger.
    """
    with tarfile.open(target, "w:gz") as archive:
        _add(archive, _FACTS, json.dumps(asdict(facts)).encode())
        _add(archive, _LIST, json.dumps(list(kernels)).encode())
        for file in sorted(folder.glob("*/*")):
            if file.suffix in (".cubin", ".json") and not file.name.startswith("tmp"):
                content = file.read_bytes()
                if file.name.startswith(_GROUP):
                    content = _with_paths(content, None)
                _add(archive, f"cache/{file.parent.name}/{file.name}", content)
    size = target.stat().st_size
    if size > most:
        target.unlink()
        raise CacheError(f"kernel cache: {size} bytes; allowed are {most}; leave steps out")
    return size


def unpack(archive: Path, folder: Path) -> tuple[Facts, list[Kernel]]:
    """Fill Triton's cache `folder` from an archive of :func:`pack`.

    Raises:
        CacheError: if it is not one.
    """
    try:
        with tarfile.open(archive, "r:gz") as packed:
            content = {
                member.name: file.read()
                for member in packed
                if (file := packed.extractfile(member)) is not None
            }
        facts = Facts(**json.loads(content.pop(_FACTS)))
        kernels = [Kernel(*kernel) for kernel in json.loads(content.pop(_LIST))]
    except (OSError, tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{archive.name}: is no kernel cache ({error}); pack it anew") from error
    for name, data in content.items():
        part, entry, file_name = name.split("/")
        if part != "cache" or ".." in (entry, file_name):
            raise CacheError(f"{archive.name}: {name} does not belong into a cache; pack it anew")
        (folder / entry).mkdir(parents=True, exist_ok=True)
        if file_name.startswith(_GROUP):
            data = _with_paths(data, folder / entry)
        (folder / entry / file_name).write_bytes(data)
    return facts, kernels


def _with_paths(group: bytes, folder: Path | None) -> bytes:
    """A group of files with their paths in `folder`, or with their names alone.

    Without a folder, files that are not packed (text of the compiler's stages) leave the group.
    """
    names = json.loads(group)["child_paths"]
    if folder is None:
        kept = {name: name for name in names if Path(name).suffix in (".cubin", ".json")}
    else:
        kept = {name: str(folder / name) for name in names}
    return json.dumps({"child_paths": kept}).encode()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def main() -> int:
    """Compile the kernels of a list; the exit status is 1 if one of them does not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lib.kernel_cache")
    parser.add_argument("command", choices=["compile"])
    parser.add_argument("list", type=Path)
    parser.add_argument("--target", type=Path)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    kernels = read_list(given.list)
    failed = compile_kernels(kernels, given.workers, given.target)
    print(f"{len(kernels) - len(failed)} of {len(kernels)} kernels are compiled", *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
