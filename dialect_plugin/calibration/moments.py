"""Second moments of the inputs of linear layers, collected while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dialect_kernels.rotation import rotate_activation

from ..checkpoint.reader import CheckpointError
from ..scheme import LayerFormat

__all__ = ["SharedInput", "Watch"]


@dataclass
class SharedInput:
    """Layers of one format with one input, such as q, k and v.

    Attributes:
        layers: their names.
        form: how all of them are quantized.
        moments: float32 [K, K], sum of ``x x.T`` over the tokens, rotated as `form` says.
        tokens: how many these are.
    """

    layers: list[str]
    form: LayerFormat
    moments: torch.Tensor = field(repr=False)
    tokens: int = 0

    def add(self, x: torch.Tensor) -> None:
        """Add the tokens of an input [..., K]."""
        tokens = rotate_activation(x.reshape(-1, x.shape[-1]).float(), self.form.rotation)
        self.moments.addmm_(tokens.T, tokens)
        self.tokens += len(tokens)

    def mean(self) -> torch.Tensor:
        """The mean of ``x x.T``, float32 [K, K], in the memory of :attr:`moments`.

        Raises:
            CheckpointError: naming a layer, if an input held NaN or Inf.
        """
        if not bool(self.moments.isfinite().all()):
            raise CheckpointError(
                f"{self.layers[0]}: its input holds NaN or Inf on the calibration text; calibrate "
                "on other text, or convert without --calibrate"
            )
        return self.moments.div_(max(1, self.tokens))


class Watch:
    """Collects the inputs of layers; a context manager.

    In the first pass it finds out which layers have one input: they are called with the same
    tensor. Later passes add one input for all of them.

    Args:
        modules: layer -> module.
        forms: layer -> how it is quantized.

    Attributes:
        inputs: what was collected, after the first pass.
    """

    def __init__(
        self, modules: Mapping[str, torch.nn.Linear], forms: Mapping[str, LayerFormat]
    ) -> None:
        self.inputs: list[SharedInput] = []
        self._modules, self._forms = modules, forms

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
            columns = x.shape[-1]
            shared = SharedInput([layer], form, torch.zeros(columns, columns, device=x.device))
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
