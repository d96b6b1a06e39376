"""Launching compiled kernels again without asking Triton each time which one is meant.

Triton looks at every argument of every launch, because a kernel may be compiled for its value. Ours
are compiled for little: which arguments are there, their dtypes and whether they begin at a
multiple of 16 bytes, and the constants. A kernel that was launched with the same facts before is
launched directly; how many tokens there are does not count. A launch that is made again with the
same numbers can be bound: then only its tensors are put in their places. (Ours.)
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton

__all__ = [
    "MISALIGNED",
    "BoundLaunch",
    "Launched",
    "Record",
    "bind",
    "current_stream",
    "launch",
    "recorded",
    "recording",
    "watched",
    "zeroed",
]

_WIDE = 31
"""Bits from which on Triton passes an integer as one of 64 bits."""

MISALIGNED = 15
"""Bits of an address that are zero where Triton counts on vectors of 16 bytes."""

_compiled: dict[tuple[object, ...], tuple[Any, tuple[str, ...]]] = {}
_thread = threading.local()


class Launched(NamedTuple):
    """A launch that was made."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    """All of them, those that are compiled in too."""


class Record(NamedTuple):
    """What a thread has done."""

    launches: list[Launched]
    """In their order."""
    zeros: list[torch.Tensor]
    """Memory that had to hold zeros before."""


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Mapping[str, float],
    **options: int,
) -> None:
    """Launch a kernel on the current GPU and stream.

    Args:
        kernel: a function that ``triton.jit`` made, with ``do_not_specialize`` for its integers.
        grid: programs, in one to three dimensions.
        arguments: the first ones, by position: tensors of one device, integers and None, a tensor
            first.
        constants: the ``tl.constexpr`` arguments, which are the last.
        options: Triton's, such as ``num_warps``.
    """
    facts: list[object] = [kernel.fn, arguments[0].device]
    addresses = 0
    for given in arguments:
        if given is None:
            facts.append(None)
        elif type(given) is int:
            facts.append(given >> _WIDE)
        else:
            facts.append(given.dtype)
            addresses |= given.data_ptr()
    if addresses & MISALIGNED:
        facts += [t.data_ptr() & MISALIGNED == 0 for t in arguments if isinstance(t, torch.Tensor)]
    key = (*facts, *constants.values(), *options.values())
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*arguments, **constants, **options)
        if compiled is None:  # as in Triton's interpreter
            return
        names = tuple(kernel.arg_names[len(arguments) :])
        _compiled[key] = compiled, names
        arguments = (*arguments, *[constants[name] for name in names])
    else:
        compiled, names = known
        arguments = (*arguments, *[constants[name] for name in names])
        compiled[(*grid, 1, 1)[:3]](*arguments)
    record = _record()
    if record is not None:
        record.launches.append(Launched(compiled, (*grid, 1, 1)[:3], arguments))


def zeroed(x: torch.Tensor) -> torch.Tensor:
    """`x`, filled with the zeros that a launch to come counts on."""
    record = _record()
    if record is not None:
        record.zeros.append(x)
    return x.zero_()


@contextmanager
def recorded() -> Iterator[Record]:
    """What this thread does in the `with` block; blocks are not nested."""
    _thread.record = Record([], [])
    try:
        yield _thread.record
    finally:
        _thread.record = None


def recording() -> bool:
    """Whether this thread is in a block of :func:`recorded`."""
    return _record() is not None


def _record() -> Record | None:
    return getattr(_thread, "record", None)


def watched() -> bool:
    """Whether a profiler wants to know of every launch."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def current_stream(device: torch.device) -> int:
    """The stream on which the current thread launches on a device."""
    stream: int = triton.runtime.driver.active.get_current_stream(device.index or 0)
    return stream


class BoundLaunch:
    """A launch of which only the tensors are still open."""

    def __init__(self, launched: Launched, places: list[tuple[int, int]]) -> None:
        """Bind a launch.

        Args:
            launched: the launch.
            places: (which argument, which of the tensors to come).
        """
        compiled = launched.compiled
        self._run = compiled.run
        # the Nones: no launch metadata, and no hooks to call
        self._before = launched.grid
        self._kernel = (compiled.function, compiled.packed_metadata, None, None, None)
        self._arguments = list(launched.arguments)
        self._places = places
        for at, _ in places:
            self._arguments[at] = None

    def __call__(self, stream: int, tensors: Sequence[torch.Tensor | None]) -> None:
        """Launch it with these tensors, on the current GPU."""
        arguments = self._arguments.copy()
        for at, tensor in self._places:
            arguments[at] = tensors[tensor]
        self._run(*self._before, stream, *self._kernel, *arguments)


def bind(launched: Launched, places: Mapping[int, int]) -> BoundLaunch | None:
    """A launch, bound; None where Triton launches compiled kernels in another way than known.

    Triton's own launch of the same kernel is compared: with grid, stream, what the driver calls the
    kernel, metadata and hooks, and the arguments, in this order (Triton 3.6 and 3.7).

    Args:
        launched: the launch.
        places: address of a tensor -> which of the tensors to come takes its place.
    """
    given: list[tuple[Any, ...]] = []
    compiled, arguments = launched.compiled, launched.arguments
    try:
        noting = copy.copy(compiled)
        noting._run = lambda *arguments: given.append(arguments)
        noting[launched.grid](*arguments, stream=0)
        kernel = compiled.function, compiled.packed_metadata
    except (AttributeError, TypeError):
        return None
    known = len(given) == 1 and len(given[0]) == 9 + len(arguments)
    if not known or given[0][:6] != (*launched.grid, 0, *kernel):
        return None
    if any(a is not b for a, b in zip(given[0][9:], arguments, strict=True)):
        return None
    of_tensors = [
        (at, places[argument.data_ptr()])
        for at, argument in enumerate(arguments)
        if isinstance(argument, torch.Tensor) and argument.data_ptr() in places
    ]
    return BoundLaunch(launched, of_tensors)
