"""What a calibration runs: prompts, a function, or nothing where second moments are recorded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ConfigError

__all__ = ["Calibration", "calibration_of", "generations"]


@dataclass(frozen=True)
class Calibration:
    """How the inputs of linear layers are found, from which weights are calibrated (ours).

    Attributes:
        source: prompts, a function without arguments that runs the 16-bit model, or the folder
            that :func:`diffusers_hook.record` wrote.
        seeds: of the generations of each prompt.
        call: further arguments of the pipeline's call, e.g. ``{"num_inference_steps": 20}``.
        damping: share of the mean diagonal of the second moments that is added to the diagonal,
            above 0, at most 1; where it is too little, ten times as much is used.
        memory: bytes of second moments that are collected at a time. Where they are not enough for
            all layers, everything is run again for the others. One layer is collected in any case.
    """

    source: Sequence[str] | Callable[[], object] | str | Path
    seeds: Sequence[int] = (0,)
    call: Mapping[str, Any] = field(default_factory=dict)
    damping: float = 0.01
    memory: int = 4 << 30

    def __post_init__(self) -> None:
        """Raise ConfigError, naming it, if a value cannot be used."""
        source = self.source
        if not (isinstance(source, str | Path) or callable(source)):
            prompts = source if isinstance(source, Sequence) else ()
            if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
                raise ConfigError(
                    f"calibrate: {source!r} cannot be used: it must be a list of prompts, a "
                    "function that runs the model, or a folder of record()"
                )
        if not self.seeds or not all(type(seed) is int for seed in self.seeds):
            raise ConfigError(f"seeds: {self.seeds!r} cannot be used: it must be whole numbers")
        if not 0 < self.damping <= 1:
            raise ConfigError(f"damping: {self.damping}; it must be above 0 and at most 1")
        if self.memory < 1:
            raise ConfigError(f"memory: {self.memory}; it must be a number of bytes from 1 on")

    @property
    def folder(self) -> Path | None:
        """The folder of recorded second moments, or None."""
        return Path(self.source) if isinstance(self.source, str | Path) else None


def calibration_of(value: object) -> Calibration:
    """The calibration that a user gave.

    Raises:
        ConfigError: if it is none.
    """
    return value if isinstance(value, Calibration) else Calibration(value)  # type: ignore[arg-type]


def generations(target: Any, calibration: Calibration) -> Callable[[], object]:
    """A function that runs the generations of a calibration, without gradients.

    Raises:
        ConfigError: if the target cannot run them.
    """
    source = calibration.source
    if callable(source):
        return torch.no_grad()(source)
    if isinstance(source, str | Path):
        raise ConfigError(
            f"prompts: {str(source)!r} is a folder, and nothing that runs; give a list of prompts"
        )
    name = type(target).__name__
    taken = {} if isinstance(target, nn.Module) else inspect.signature(target.__call__).parameters
    if not {"prompt", "generator"} <= set(taken):
        raise ConfigError(
            f"calibrate: {name} takes no prompt and generator; give a function that runs it"
        )
    defaults = {"output_type": "latent"} if "output_type" in taken else {}
    call = {**defaults, **calibration.call}

    @torch.no_grad()
    def run() -> None:
        for prompt in source:
            for seed in calibration.seeds:
                generator = torch.Generator().manual_seed(seed)
                target(prompt=prompt, generator=generator, **call)

    return run
