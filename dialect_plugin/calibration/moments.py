"""Second moments of the inputs of linear layers, collected while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dialect_kernels.rotation import rotate_activation
from dialect_kernels.second_moments import SecondMoments, UpperFactor

from ..checkpoint.reader import CheckpointError
from ..scheme import LayerFormat

__all__ = ["SharedInput", "Watch"]


@dataclass
class SharedInput:
    """Layers of one format with one input, such as q, k and v.

    Attributes:
        layers: their names.
        form: how all of them are quantized.
        moments: of their inputs, rotated as `form` says unless `plain`.
        plain: whether the inputs are added up as they are.
    """

    layers: list[str]
    form: LayerFormat
    moments: SecondMoments = field(repr=False)
    plain: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens the layers have seen."""
        return self.moments.tokens

    @property
    def enough(self) -> bool:
        """Whether they are enough to calibrate the layers."""
        return self.moments.enough

    def add(self, x: torch.Tensor) -> None:
        """Add the tokens of an input [..., K]."""
        tokens = x.reshape(-1, x.shape[-1]).float()
        self.moments.add(rotate_activation(tokens, "none" if self.plain else self.form.rotation))

    def rotate(self, scale: torch.Tensor) -> None:
        """Make plain moments those of inputs times `scale`, float32 [K], rotated."""
        self.check_finite()
        self.moments.transform(scale, self.form.rotation)
        self.plain = False

    def mean(self) -> torch.Tensor:
        """The mean of ``x x.T``, float32 [K, K].

        Raises:
            CheckpointError: naming a layer, if an input held NaN or Inf.
        """
        self.check_finite()
        return self.moments.mean()

    def factor(self, damping: float) -> tuple[UpperFactor, float] | None:
        """The factor of the moments, which are used up by it.

        Args:
            damping: the least damping; where it is too little, ten times as much is tried.

        Returns:
            The factor and the damping that was used; None if no damping up to 1 is enough.
        """
        return self.moments.damped_factor(damping)

    def check_finite(self) -> None:
        """Raise CheckpointError, naming a layer, if an input held NaN or Inf."""
        if not self.moments.isfinite():
            raise CheckpointError(
                f"{self.layers[0]}: its input holds NaN or Inf on the calibration text; calibrate "
                "on other text, or convert without --calibrate"
            )


class Watch:
    """Collects the inputs of layers; a context manager.

    In the first pass it finds out which layers have one input: they are called with the same
    tensor. Later passes add one input for all of them.

    Args:
        modules: layer -> module.
        forms: layer -> how it is quantized.
        plain: whether inputs are not rotated.

    Attributes:
        inputs: what was collected, after the first pass.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Linear],
        forms: Mapping[str, LayerFormat],
        plain: bool = False,
    ) -> None:
        self.inputs: list[SharedInput] = []
        self._modules, self._forms, self._plain = modules, forms, plain

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Collect from the block's first run."""
        seen: list[tuple[torch.Tensor, int, SharedInput]] = []

        def note(layer: str, x: torch.Tensor) -> None:
            form = self._forms[layer]
            for known, version, shared in seen:
                if known is x and version == x._version and shared.form == form:
                    if layer not in shared.layers:
                        shared.layers.append(layer)
                    return
            if any(layer in shared.layers for shared in self.inputs):
                return  # called twice in one pass; the later passes count both
            shared = SharedInput([layer], form, SecondMoments(x.shape[-1], x.device), self._plain)
            shared.add(x)
            self.inputs.append(shared)
            seen.append((x, x._version, shared))

        with self._hooked(self._modules, note):
            yield

    @contextmanager
    def later_passes(self) -> Iterator[None]:
        """Collect from the block's other runs."""
        of = {shared.layers[0]: shared for shared in self.inputs}
        leaders = {layer: self._modules[layer] for layer in of}
        with self._hooked(leaders, lambda layer, x: of[layer].add(x)):
            yield

    @contextmanager
    def _hooked(
        self,
        modules: Mapping[str, torch.nn.Linear],
        note: Callable[[str, torch.Tensor], None],
    ) -> Iterator[None]:
        def hook(layer: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
            return lambda module, arguments: note(layer, arguments[0])

        handles = [
            module.register_forward_pre_hook(hook(layer)) for layer, module in modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
