"""Find, load and declare the compiled library of the CPU kernel.

The library is built when the package is installed. In a source tree, or where that was not possible
then, it is built on first use into the user's cache folder. Without a compiler :func:`available` is
false and one log line says why; ``BLOCKDIALECT_CPU_KERNEL=0`` has the same effect.
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .build import build, library_name

__all__ = [
    "INSTRUCTIONS",
    "available",
    "call",
    "describe",
    "features",
    "instructions_or_best",
    "threads_or_torch",
    "why_not",
]

INSTRUCTIONS = ("scalar", "avx2", "avx512", "avx512_vnni", "amx_int8")
"""Instruction sets the kernel can run with; the position is the set's number in C++."""

_log = logging.getLogger(__name__)

_SWITCH = "BLOCKDIALECT_CPU_KERNEL"
_DOES_NOT_FIT = 2


def available() -> bool:
    """Whether the kernel can be used; builds and loads it on the first call."""
    return _library().handle is not None


def why_not() -> str | None:
    """Why the kernel cannot be used, or None."""
    return _library().problem


def features() -> str:
    """The instruction set the kernel uses on this processor, one of :data:`INSTRUCTIONS`."""
    return INSTRUCTIONS[_handle().dialect_features()]


def describe() -> str:
    """Instruction set, number and owner of the threads, and CPUs of a call from this thread."""
    threads = torch.get_num_threads()
    whose = "PyTorch's OpenMP" if _handle().dialect_uses_openmp(threads) else "its own"
    cpus = _handle().dialect_cpus(threads)
    return f"{features()}, {threads} threads ({whose}) on {cpus} CPUs"


def call(function: str, *arguments: object) -> None:
    """Call an entry point of the library; pointers must stay valid until it returns.

    Raises:
        RuntimeError: if there is no library.
        MemoryError: if the kernel got no memory.
        ValueError: if it finds contents of an argument that do not fit.
    """
    status = getattr(_handle(), function)(*arguments)
    if status == _DOES_NOT_FIT:
        raise ValueError(f"{function}: rows or offsets lie outside their ranges")
    if status:
        raise MemoryError(f"{function}: no memory for the rounded activations")


def threads_or_torch(threads: int | None) -> int:
    """`threads`, or as many as torch uses."""
    return torch.get_num_threads() if threads is None else threads


def instructions_or_best(name: str | None) -> int:
    """The number of an instruction set, or of the best that this processor has.

    Raises:
        ValueError: if the processor does not have it.
    """
    best: int = _handle().dialect_features()
    if name is None:
        return best
    if name not in INSTRUCTIONS[: best + 1]:
        allowed = ", ".join(map(repr, INSTRUCTIONS[: best + 1]))
        raise ValueError(f"instructions: {name!r}; this processor has {allowed}")
    return INSTRUCTIONS.index(name)


@dataclass(frozen=True)
class _Library:
    handle: ctypes.CDLL | None
    problem: str | None


def _handle() -> ctypes.CDLL:
    library = _library()
    if library.handle is None:
        raise RuntimeError(f"the CPU kernel cannot be used: {library.problem}")
    return library.handle


@cache
def _library() -> _Library:
    if os.environ.get(_SWITCH) == "0":
        return _Library(None, f"{_SWITCH}=0")
    try:
        handle = ctypes.CDLL(str(_find()))
        _declare(handle)
        handle.dialect_use_openmp(_gomp_parallel())
    except (OSError, RuntimeError) as error:
        _log.warning("the CPU kernel is not available, torch does its work: %s", error)
        return _Library(None, str(error))
    return _Library(handle, None)


def _find() -> Path:
    """The library beside this file, or in the cache folder, where it is built if need be."""
    name = library_name()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockdialect"
    for known in (Path(__file__).with_name(name), folder / name):
        if known.is_file():
            return known
    _log.info("building the CPU kernel in %s", folder)
    return build(folder)


def _gomp_parallel() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP runtime that PyTorch uses, if it uses one.

    It is what PyTorch itself was linked with, or what ``LD_PRELOAD`` puts in its place; LLVM's and
    Intel's runtimes have this function too.
    """
    own = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for library, mode in ((None, ctypes.DEFAULT_MODE), (str(own), getattr(os, "RTLD_NOLOAD", 0))):
        try:
            found = ctypes.CDLL(library, mode=mode).GOMP_parallel
        except (AttributeError, OSError, TypeError):
            continue
        return ctypes.cast(found, ctypes.c_void_p).value
    return None


def _declare(handle: ctypes.CDLL) -> None:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    handle.dialect_use_openmp.argtypes = (pointer,)
    handle.dialect_use_openmp.restype = None
    signatures = {
        "dialect_features": (),
        "dialect_uses_openmp": (i32,),
        "dialect_cpus": (i32,),
        "dialect_quantize": (
            *(pointer, i32, i64, i64, pointer, i32, i32, i32, i32),
            *(pointer, pointer, pointer, pointer, i32, i32),
        ),
        "dialect_linear": (
            *(pointer, i32, i64, pointer, pointer, i32, i32, pointer, pointer, i32, i32),
        ),
        "dialect_grouped": (
            *(pointer, i32, i64, pointer, i64, pointer, i64, pointer, pointer),
            *(i32, i32, pointer, i32, pointer, i32, i32),
        ),
        "dialect_dequantize": (pointer, pointer, pointer, i32),
        "dialect_embedding": (pointer, i64, pointer, pointer, i32, pointer, i32),
        "dialect_loss": (pointer, i32, pointer, pointer, pointer, i32, i32),
        "dialect_decomposed": (
            *(pointer, i32, i64, pointer, pointer, i64),
            *(pointer, pointer, pointer, i32, i32),
        ),
        "dialect_feed_back": (
            *(pointer, pointer, pointer, pointer, pointer, pointer, pointer, pointer),
            *(i64, i32, i32, i32),
        ),
        "dialect_costs": (*(pointer, i32, i64, i64, pointer, i32, i32, pointer, i32, i32),),
        "dialect_cache_words": (pointer, pointer),
        "dialect_cache_store": (pointer, pointer, pointer, i32, i32),
        "dialect_cache_attend": (pointer, pointer, pointer, pointer, i32, i32),
    }
    for name, arguments in signatures.items():
        function = getattr(handle, name)
        function.argtypes = arguments
        function.restype = i32
