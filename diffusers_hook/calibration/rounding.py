"""The weights of transformers by rule ``gptq``, from inputs that were collected or recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dialect_kernels import PackedTensor
from dialect_kernels.calibrated import quantize_factored
from dialect_kernels.formatbook import book_by_name

from ..layers.casting import is_of_transformers
from ..model.jobs import Job
from .recorder import Inputs, collected
from .source import Calibration, generations
from .stored import read

__all__ = ["calibrated_weights", "inputs_of", "linear_layers"]

_log = logging.getLogger(__name__)


def linear_layers(jobs: Iterable[Job]) -> dict[str, tuple[Job, str, nn.Linear]]:
    """Every layer of transformers that becomes 4 bit: the name in its pipeline, and what it is."""
    return {
        f"{job.name}.{path}": (job, path, layer)
        for job in jobs
        if not is_of_transformers(job.module)
        for path, (layer, _) in job.choice.quantized.items()
    }


def inputs_of(target: Any, jobs: Sequence[Job], calibration: Calibration) -> Iterator[Inputs]:
    """The inputs of the layers of transformers, which are in 16 bit.

    Raises:
        ConfigError: if the target cannot run the calibration, or its folder cannot be used.
        ValueError: if an input is not finite.
    """
    layers = linear_layers(jobs)
    if calibration.folder is not None:
        yield from read(calibration.folder, {name: layers[name][2] for name in layers})
        return
    yield from collected(
        {name: layer for name, (_, _, layer) in layers.items()},
        [job.module for job in jobs],
        generations(target, calibration),
        calibration.memory,
    )


def calibrated_weights(
    target: Any, jobs: Sequence[Job], calibration: Calibration, tick: Callable[[], object]
) -> Mapping[str, PackedTensor]:
    """The calibrated weights, by the names of :func:`linear_layers`; nothing is changed.

    Weights whose layers saw too few tokens, or no damping helped, are missing, after a warning.

    Args:
        target: the pipeline or transformer.
        jobs: what is quantized.
        calibration: how the inputs are found.
        tick: is called for every weight.

    Raises:
        ConfigError, ValueError: as :func:`inputs_of`.
    """
    layers = linear_layers(jobs)
    found: dict[str, PackedTensor] = {}
    for inputs in inputs_of(target, jobs, calibration):
        own = [name for name in inputs.layers if name in layers]
        for name, packed in _rounded(inputs, {n: layers[n] for n in own}, calibration.damping):
            if packed is not None:
                found[name] = packed
            tick()
    left = [name for name in layers if name not in found]
    if left:
        _log.warning(
            "calibrate: %d of %d layers saw too few tokens and are rounded to nearest (%s)",
            len(left),
            len(layers),
            left[0] + (", ..." if len(left) > 1 else ""),
        )
    return found


def _rounded(
    inputs: Inputs, layers: Mapping[str, tuple[Job, str, nn.Linear]], damping: float
) -> Iterator[tuple[str, PackedTensor | None]]:
    """The weights of layers that read the same; None where they cannot be calibrated."""
    moments = inputs.moments
    assert moments is not None
    factor = None
    if moments.enough and layers:
        job, path, _ = next(iter(layers.values()))
        rotation = job.choice.rotation(path, job.config)
        if rotation != "none":
            moments.transform(torch.ones(len(moments), device=moments.device), rotation)
        factor = moments.damped_factor(damping)
    for name, (job, path, layer) in layers.items():
        if factor is None:
            yield name, None
            continue
        weight = layer.weight.detach()
        upper, _ = factor
        packed = quantize_factored(
            weight.to(upper.device),
            upper,
            book_by_name(job.config.book),
            job.config.block_size,
            job.choice.rotation(path, job.config),
            f"{name}.weight",
        )
        yield name, None if packed is None else packed.to(weight.device)
