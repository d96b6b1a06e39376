"""Launching compiled kernels again without asking Triton each time which one is meant.

Triton looks at every argument of every launch, because a kernel may be compiled for its value. Ours
are compiled for little: which arguments are there, their dtypes and whether they begin at a
multiple of 16 bytes, and the constants. A kernel that was launched with the same facts before is
launched directly; how many tokens there are does not count. (Ours.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["launch"]

_WIDE = 31
"""Bits from which on Triton passes an integer as one of 64 bits."""

_MISALIGNED = 15
"""Bits of an address that are zero where Triton counts on vectors of 16 bytes."""

_compiled: dict[tuple[object, ...], tuple[Any, tuple[str, ...]]] = {}


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
    if addresses & _MISALIGNED:
        facts += [t.data_ptr() & _MISALIGNED == 0 for t in arguments if isinstance(t, torch.Tensor)]
    key = (*facts, *constants.values(), *options.values())
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*arguments, **constants, **options)
        if compiled is not None:  # as in Triton's interpreter
            _compiled[key] = compiled, tuple(kernel.arg_names[len(arguments) :])
        return
    compiled, names = known
    compiled[(*grid, 1, 1)[:3]](*arguments, *[constants[name] for name in names])
