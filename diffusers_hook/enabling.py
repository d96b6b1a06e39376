"""Turning SemanticDialect on and off, for pipelines and for single transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dialect_kernels import PackedTensor

from .calibration.rounding import calibrated_weights, linear_layers
from .calibration.source import Calibration, calibration_of
from .config import ConfigError, SemanticDialectConfig
from .layers.offload import check_offloading
from .layers.quantized import QuantizedLinear
from .layouts import Layout
from .model.attach import attached, follow
from .model.components import Components, chosen_components
from .model.jobs import Job, config_of, layout_of, prepare
from .model.pipeline import check_components, modules_of, uncheck_components
from .model.reconfigure import change_options, changed_config
from .model.report import Summary, summarize
from .model.swap import put_in, take_out
from .tokens.protection import check_scheduler

__all__ = ["disable", "enable", "summary"]

_log = logging.getLogger(__name__)


def enable(
    target: Any,
    config: SemanticDialectConfig | None = None,
    *,
    layout: Layout | str | None = None,
    components: Components | None = None,
    calibrate: Calibration | Sequence[str] | Callable[[], object] | str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Quantize a pipeline's transformers, or one transformer, and hook their attention.

    With `components`, text encoders too: their tokens are rounded alone. A model that was loaded
    quantized takes the given options instead, where they need no other weights; without options
    only its hook learns of the pipeline.

    Args:
        target: a diffusers pipeline, or a video transformer (any `nn.Module` with a layout).
        config: the configuration; default: :class:`SemanticDialectConfig` with its defaults.
        layout: the transformer's layout or the name of a known one, where the class of the
            transformer does not tell.
        components: names of the pipeline's components to quantize, or a dictionary from them to
            options of their own: ``{"text_encoder": {"ignore": []}}``; default: its transformers.
        calibrate: prompts that the 16-bit pipeline generates videos for first, to round the weights
            of transformers so that their layers' outputs change little; or a function that runs it,
            a folder of :func:`~diffusers_hook.record`, or a :class:`~diffusers_hook.Calibration`.
            Default: each weight is rounded to nearest.
        progress: whether a progress bar is shown.
        **options: single options of the configuration.

    Returns:
        The target.

    Raises:
        ConfigError: if an option cannot be used.
        LayoutError: if a model's layout is not known or does not fit.
        RuntimeError: if it is enabled already, and was not loaded quantized.
        ValueError: if a weight cannot be quantized (naming it).

        Nothing is changed if an error is raised.
    """
    layout = layout_of(layout)
    work, changes = [], []
    parts = chosen_components(target, config_of(config, options), components, layout)
    for name, (module, wanted) in parts.items():
        if attached(module) is None:
            work.append(prepare(name, module, wanted, layout))
        elif calibrate is not None:
            raise ConfigError(
                f"calibrate: {name} is in 4 bit already; load the 16-bit checkpoint to calibrate it"
            )
        else:
            changes.append((module, changed_config(name, module, wanted, layout)))
    _check_schedulers(target, [*((job.module, job.config) for job in work), *changes])
    _put_in_force(changes, work, _quantized(target, work, calibrate, progress))
    check_components(target)
    for module in (*(job.module for job in work), *(module for module, _ in changes)):
        if target is not module:
            follow(module, target)
    return target


def disable(target: Any) -> Any:
    """Restore the 16-bit layers and remove the hooks: the weights are bit for bit those before.

    Args:
        target: what was given to :func:`enable`.

    Returns:
        The target.

    Raises:
        RuntimeError: if the 16-bit weights were not kept, if their files are gone or have changed,
            or if the offloading in force does not let layers be exchanged; nothing is changed then.
    """
    modules = _enabled(target)
    if not modules:
        _log.warning("SemanticDialect is not enabled; there is nothing to disable")
        return target
    for name, module in modules.items():
        check_offloading(name, module)
    take_out(list(modules.values()))
    uncheck_components(target)
    return target


def summary(target: Any) -> Summary:
    """What the hook did: layers, bits, memory, salient share, groups, refreshes, time.

    Raises:
        RuntimeError: if SemanticDialect is not enabled.
    """
    found = []
    for name, module in _enabled(target).items():
        hook = attached(module)
        assert hook is not None
        found.append(summarize(name, module, hook))
    if not found:
        raise RuntimeError("SemanticDialect is not enabled; call enable_semantic_dialect() first")
    return Summary(tuple(found))


def _pipeline(target: Any, module: nn.Module) -> Any:
    """The pipeline that a transformer of the target belongs to, or None."""
    if target is not module:
        return target
    hook = attached(module)
    return None if hook is None else hook.state.pipeline()


def _check_schedulers(
    target: Any, models: Sequence[tuple[nn.Module, SemanticDialectConfig]]
) -> None:
    """Raise ConfigError if steps cannot be protected because their scheduler is not known."""
    for module, wanted in models:
        if wanted.protected_steps == "auto":
            check_scheduler(getattr(_pipeline(target, module), "scheduler", None))


def _put_in_force(
    changes: Sequence[tuple[nn.Module, SemanticDialectConfig]],
    work: Sequence[Job],
    layers: Sequence[Mapping[str, QuantizedLinear]],
) -> None:
    """Change the options of some transformers and put layers into others, or do neither."""
    before = []
    try:
        for module, changed in changes:
            hook = attached(module)
            assert hook is not None
            before.append((module, hook.config))
            change_options(module, changed)
        put_in(work, layers)
    except BaseException:
        for module, config in reversed(before):
            change_options(module, config)
        raise


def _quantized(
    target: Any, jobs: Sequence[Job], calibrate: object, progress: bool
) -> list[dict[str, QuantizedLinear]]:
    """The new layers of each job, by name; nothing in the models is touched."""
    from diffusers.utils.logging import tqdm

    calibrated: Mapping[str, PackedTensor] = {}
    if calibrate is not None:
        count = len(linear_layers(jobs))
        with tqdm(total=count, desc="calibrating", unit="layer", disable=not progress) as bar:
            calibrated = calibrated_weights(target, jobs, calibration_of(calibrate), bar.update)
    found = []
    for job in jobs:
        bar = tqdm(job.choice.layers, f"{job.name} to 4 bit", unit="layer", disable=not progress)
        layers: dict[str, QuantizedLinear] = {}
        for path in bar:
            name = f"{job.name}.{path}"
            packed = calibrated.get(name)
            layers[path] = job.choice.quantized_layer(path, job.config, name, packed)
        found.append(layers)
    return found


def _enabled(target: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in modules_of(target).items() if attached(m) is not None}
