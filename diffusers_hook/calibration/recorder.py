"""Second moments of the inputs of linear layers, collected while a pipeline generates videos.

Guidance branches, steps and prompts are added up as they come. Layers that are called with one
tensor in the first call that they see, such as q, k and v, share its moments.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dialect_kernels.second_moments import SecondMoments

__all__ = ["Inputs", "collected"]

_ROWS = 8192
"""Tokens that are converted to float32 at a time."""


@dataclass
class Inputs:
    """The inputs of layers that read the same.

    Attributes:
        layers: their names.
        moments: the second moments; None until they are collected.
        done: whether they have been.
    """

    layers: list[str]
    moments: SecondMoments | None = None
    done: bool = False

    def add(self, x: torch.Tensor) -> None:
        """Add the tokens of an input [..., K]."""
        assert self.moments is not None
        for rows in torch.split(x.reshape(-1, x.shape[-1]), _ROWS):
            self.moments.add(rows.to(torch.float32))


def collected(
    layers: Mapping[str, nn.Linear],
    models: Iterable[nn.Module],
    run: Callable[[], object],
    memory: int,
) -> Iterator[Inputs]:
    """The inputs of layers, those that nothing was given to excepted.

    Args:
        layers: by name.
        models: what they are parts of.
        run: runs the models; it is called until all inputs are collected.
        memory: bytes of moments that are held at a time; one input is in any case.

    Yields:
        What was collected; its moments may be used up, and are let go of.

    Raises:
        ValueError: naming a layer, if its input holds NaN or Inf.
    """
    known: list[Inputs] = []
    watch = _Watch(known, memory)
    while True:
        with _hooked(layers, models, watch):
            run()
        full = [inputs for inputs in known if inputs.moments is not None]
        if not full:  # the others were not called again
            return
        while full:
            inputs = full.pop(0)
            assert inputs.moments is not None
            if not inputs.moments.isfinite():
                raise ValueError(
                    f"{inputs.layers[0]}: its input holds NaN or Inf while calibrating; use other "
                    "prompts, or leave calibrate out"
                )
            yield inputs
            inputs.moments, inputs.done = None, True
        watch.free = memory
        if all(inputs.done for inputs in known):
            return


class _Watch:
    """Sorts the calls of layers by their inputs, and adds them up as far as memory goes."""

    def __init__(self, known: list[Inputs], memory: int) -> None:
        self.free, self._memory = memory, memory
        self._known = known
        self._of: dict[str, Inputs] = {}
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], int, Inputs]] = {}

    def begin(self, *call: object) -> None:
        """A call of a model begins: its tensors are others."""
        self._seen.clear()

    def call(self, name: str, x: torch.Tensor, given: torch.Tensor) -> None:
        """A layer is called with `given`, whose numbers are `x`."""
        inputs = self._of.get(name)
        if inputs is None:
            inputs = self._of[name] = self._new(name, given)
        if inputs.layers[0] == name and not inputs.done and self._holds(inputs, x):
            inputs.add(x)

    def _new(self, name: str, given: torch.Tensor) -> Inputs:
        """The inputs of a layer that is called for the first time."""
        if given.is_inference():  # nothing tells whether it was written to
            self._known.append(Inputs([name]))
            return self._known[-1]
        if (seen := self._seen.get(id(given))) is not None:
            before, version, inputs = seen
            if before() is given and version == given._version:
                inputs.layers.append(name)
                return inputs
        inputs = Inputs([name])
        self._known.append(inputs)
        self._seen[id(given)] = (weakref.ref(given), given._version, inputs)
        return inputs

    def _holds(self, inputs: Inputs, x: torch.Tensor) -> bool:
        """Whether there is memory for the moments of inputs."""
        if inputs.moments is None:
            needed = SecondMoments.nbytes_of(x.shape[-1])
            if needed > self.free and self.free < self._memory:
                return False
            self.free -= needed
            inputs.moments = SecondMoments(x.shape[-1], x.device)
        return True


@contextmanager
def _hooked(
    layers: Mapping[str, nn.Linear], models: Iterable[nn.Module], watch: _Watch
) -> Iterator[None]:
    def called(
        name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        given = args[0] if args else kwargs["input"]
        watch.call(name, given.detach(), given)

    handles = [model.register_forward_pre_hook(watch.begin) for model in models]
    handles += [
        layer.register_forward_pre_hook(partial(called, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
