"""Instruments around a video transformer: clocks of its parts, its peak memory, its refreshes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["clocked", "peak_memory", "refreshed_in_time", "rounding_apart", "wait"]

ROWS = 16
"""Outputs of the layers that are timed for their rounding: few, and what every kernel takes."""


@contextmanager
def refreshed_in_time(model: nn.Module, calls: int, refreshes: Mapping[str, int]) -> Iterator[None]:
    """Check that the calls of the `with` block choose and group as often as those of a generation.

    Args:
        model: with the hook enabled.
        calls: their number.
        refreshes: counter of the hook's summary -> how much it must rise for each block.

    Raises:
        SystemExit: if a counter rises otherwise.
    """
    import diffusers_hook
    from diffusers_hook.model.attach import attached

    hook = attached(model)
    assert hook is not None
    blocks = sum(block.kind.attention is not None for block in hook.state.blocks)
    before = diffusers_hook.summary(model).transformers[0]
    yield
    after = diffusers_hook.summary(model).transformers[0]
    for name, times in refreshes.items():
        counted = getattr(after, name) - getattr(before, name)
        if counted != times * blocks:
            raise SystemExit(
                f"{name}: {counted} in {calls} calls of {blocks} blocks, not {times} in each; "
                "these calls are not those of one generation"
            )


@contextmanager
def clocked(layers: Iterable[nn.Module], wait: Callable[[], object]) -> Iterator[list[float]]:
    """[seconds] spent in the layers during the `with` block, each waited for."""
    seconds, starts = [0.0], [0.0]

    def start(*_: object) -> None:
        wait()
        starts[0] = time.perf_counter()

    def end(*_: object) -> None:
        wait()
        seconds[0] += time.perf_counter() - starts[0]

    handles = []
    for layer in layers:
        handles += [layer.register_forward_pre_hook(start), layer.register_forward_hook(end)]
    yield seconds
    for handle in handles:
        handle.remove()


@contextmanager
def rounding_apart(layers: Iterable[Any], wait: Callable[[], object]) -> Iterator[list[float]]:
    """[seconds] that the layers' inputs take with `ROWS` outputs: rounded, hardly multiplied.

    Each is called again with the first rows of its weight, with the salient tokens and the groups
    of the call in progress; each rounds its input, which layers that read one input else share.
    """
    seconds = [0.0]

    def again(layer: nn.Module) -> Callable[..., None]:
        few = _first_rows(layer)

        def call(_: nn.Module, arguments: tuple[torch.Tensor, ...], __: object) -> None:
            wait()
            start = time.perf_counter()
            with torch.inference_mode():  # where nothing is shared, and nothing learned
                few(*arguments)
            wait()
            seconds[0] += time.perf_counter() - start

        return call

    handles = [layer.register_forward_hook(again(layer)) for layer in layers]
    yield seconds
    for handle in handles:
        handle.remove()


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """[bytes] of the peak during the `with` block."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
    else:
        # reads /proc with psutil, which a GPU does not need
        from ..lib.memory import PeakMemory

        with PeakMemory(os.getpid()) as process:
            yield peak
        peak[0] = process.pss


def wait(device: torch.device) -> Callable[[], object]:
    """What waits until the device has finished."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _first_rows(layer: Any) -> nn.Module:
    """A quantized layer with the first `ROWS` rows of another's weight, in the same block."""
    from diffusers_hook.layers.dialect import DialectLinear

    rows = layer.packed.slice_rows(0, ROWS)
    few = DialectLinear(rows, None, layer.stream, layer.activation_format, layer.original_dtype)
    few.slot = layer.slot
    return few
