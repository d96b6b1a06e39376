"""Turning SemanticDialect on and off, for pipelines and for single transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .config import ConfigError, SemanticDialectConfig
from .layers.offload import check_offloading
from .layers.originals import choose_place
from .layers.quantized import QuantizedLinear
from .layouts import Layout, LayoutError, generic_layout, layout_for, layout_named
from .model.attach import attached, follow
from .model.components import Components, chosen_components
from .model.layer_choice import choose_layers
from .model.pipeline import check_components, modules_of, uncheck_components
from .model.reconfigure import change_options, changed_config
from .model.report import Summary, summarize
from .model.swap import Job, put_in, take_out
from .model.text_encoder import encoder_defaults, encoder_layout
from .tokens.protection import check_scheduler

__all__ = ["disable", "enable", "summary"]

_log = logging.getLogger(__name__)


def enable(
    target: Any,
    config: SemanticDialectConfig | None = None,
    *,
    layout: Layout | str | None = None,
    components: Components | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Quantize a pipeline's transformers, or one transformer, and hook their attention.

    With `components`, text encoders too: their tokens are rounded alone.

    A transformer that was loaded quantized takes the given options instead, where they need no
    other weights; without options only its hook learns of the pipeline.

    Args:
        target: a diffusers pipeline, or a video transformer (any `nn.Module` with a layout).
        config: the configuration; default: :class:`SemanticDialectConfig` with its defaults.
        layout: the transformer's layout or the name of a known one, where the class of the
            transformer does not tell.
        components: names of the pipeline's components to quantize, e.g. ``("transformer",
            "text_encoder")``, or a dictionary from their names to options that are their own, e.g.
            ``{"text_encoder": {"activation_format": "fp8"}}``; default: its transformers.
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
    config = _config(config).replaced(**options)
    layout = _layout(layout)
    work, changes = [], []
    parts = chosen_components(target, config, components, layout)
    for name, (module, wanted) in parts.items():
        if attached(module) is None:
            check_offloading(name, module)
            work.append(_prepare(name, module, wanted, layout))
        else:
            changes.append((module, changed_config(name, module, wanted, layout)))
    for module, wanted in (*((job.module, job.config) for job in work), *changes):
        if wanted.protected_steps == "auto":
            check_scheduler(getattr(_pipeline(target, module), "scheduler", None))
    _put_in_force(changes, work, [_quantize(job, progress) for job in work])
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


def _config(config: object) -> SemanticDialectConfig:
    if config is None:
        return SemanticDialectConfig()
    if not isinstance(config, SemanticDialectConfig):
        raise ConfigError(
            f"config: {config!r} cannot be used: it must be a SemanticDialectConfig; give single "
            "options as keywords, e.g. salient_fraction=0.2"
        )
    return config


def _layout(layout: object) -> Layout | None:
    if isinstance(layout, str):
        return layout_named(layout)
    if layout is not None and not isinstance(layout, Layout):
        raise LayoutError(
            f"layout: {layout!r} cannot be used: it must be a diffusers_hook.Layout or the name of "
            "a known one, e.g. 'wan'"
        )
    return layout


def _prepare(
    name: str, module: nn.Module, config: SemanticDialectConfig, layout: Layout | None
) -> Job:
    encoder = encoder_layout(module)
    if encoder is not None:
        layout, config = encoder, encoder_defaults(module, config)
    layout = layout or layout_for(module) or generic_layout(module)
    if layout is None:
        raise LayoutError(
            f"{name}: the layout of {type(module).__name__} is not known; pass one as layout=, see "
            "diffusers_hook.Layout"
        )
    config, choice = choose_layers(module, config, layout, name)
    place, sources = choose_place(module, choice.layers, config.keep_original)
    return Job(name, module, layout, config, choice, place, sources)


def _pipeline(target: Any, module: nn.Module) -> Any:
    """The pipeline that a transformer of the target belongs to, or None."""
    if target is not module:
        return target
    hook = attached(module)
    return None if hook is None else hook.state.pipeline()


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


def _quantize(job: Job, progress: bool) -> dict[str, QuantizedLinear]:
    """The new layers, by name; nothing in the model is touched."""
    from diffusers.utils.logging import tqdm

    name, config, choice = job.name, job.config, job.choice
    bar = tqdm(choice.layers, desc=f"{name} to 4 bit", unit="layer", disable=not progress)
    return {path: choice.quantized_layer(path, config, f"{name}.{path}") for path in bar}


def _enabled(target: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in modules_of(target).items() if attached(m) is not None}
