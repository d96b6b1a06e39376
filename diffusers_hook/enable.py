"""Turning SemanticDialect on and off, for pipelines and for single transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import families  # noqa: F401 - registers the layouts
from .attach import attach, attached, detach
from .config import SemanticDialectConfig
from .layouts import Layout, LayoutError, layout_for, layout_named
from .mark import mark, unmark
from .originals import choose_place, keep
from .plan import Plan, make_plan, put, quantized_layer
from .quantizer import SemanticDialectQuantizer
from .summary import Summary, summarize

__all__ = ["disable", "enable", "summary"]

_log = logging.getLogger(__name__)


def enable(
    target: Any,
    config: SemanticDialectConfig | None = None,
    *,
    layout: Layout | str | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Quantize a pipeline's transformers, or one transformer, and hook their attention.

    Args:
        target: a diffusers pipeline, or a video transformer (any `nn.Module` with a layout).
        config: the configuration; default: :class:`SemanticDialectConfig` with its defaults.
        layout: the transformer's layout or the name of a known one, where the class of the
            transformer does not tell.
        progress: whether a progress bar is shown.
        **options: single options of the configuration.

    Returns:
        The target.

    Raises:
        ConfigError: if an option cannot be used.
        LayoutError: if a model's layout is not known or does not fit.
        RuntimeError: if it is enabled already.
        ValueError: if a weight cannot be quantized (naming it).

        Nothing is changed if an error is raised.
    """
    config = (config or SemanticDialectConfig()).replaced(**options)
    if isinstance(layout, str):
        layout = layout_named(layout)
    modules = _transformers(target, layout)
    for name, module in modules.items():
        if attached(module) is not None:
            raise RuntimeError(
                f"{name}: SemanticDialect is enabled already; call disable_semantic_dialect() first"
            )
    work = [_prepare(name, module, config, layout) for name, module in modules.items()]
    layers = [_quantize(job, progress) for job in work]
    for job, new in zip(work, layers, strict=True):
        _replace(job, new)
    return target


def disable(target: Any) -> Any:
    """Take everything off again: exactly the pipeline or transformer it was.

    Args:
        target: what was given to :func:`enable`.

    Returns:
        The target.

    Raises:
        RuntimeError: if the 16-bit weights were not kept or their files are gone; nothing is
            changed then.
    """
    modules = list(_enabled(target).values())
    if not modules:
        _log.warning("SemanticDialect is not enabled; there is nothing to disable")
        return target
    restored = [_restored(module) for module in modules]
    for module, layers in zip(modules, restored, strict=True):
        detach(module)
        for path, layer in layers.items():
            put(module, path, layer)
        unmark(module)
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


@dataclass(frozen=True)
class _Job:
    """One transformer and everything that was decided about it before it is touched."""

    name: str
    module: nn.Module
    layout: Layout
    config: SemanticDialectConfig
    plan: Plan
    place: str
    files: dict[str, Path]


def _prepare(
    name: str, module: nn.Module, config: SemanticDialectConfig, layout: Layout | None
) -> _Job:
    layout = layout or layout_for(module)
    if layout is None:
        raise LayoutError(
            f"{name}: the layout of {type(module).__name__} is not known; pass one as layout=, see "
            "diffusers_hook.Layout"
        )
    config, plan = make_plan(module, config, layout, name)
    place, files = choose_place(module, plan.layers, config.keep_original)
    return _Job(name, module, layout, config, plan, place, files)


def _quantize(job: _Job, progress: bool) -> dict[str, nn.Linear]:
    """The new layers, by name; nothing in the model is touched."""
    from diffusers.utils.logging import tqdm

    bar = tqdm(job.plan.layers, desc=f"{job.name} to 4 bit", unit="layer", disable=not progress)
    return {path: quantized_layer(job.plan, path, job.config, f"{job.name}.{path}") for path in bar}


def _replace(job: _Job, layers: Mapping[str, nn.Linear]) -> None:
    """Put the new layers in, hook the attention and let go of the 16-bit weights."""
    module = job.module
    bytes_before = sum(parameter.nbytes for parameter in module.parameters())
    originals = keep(job.place, job.plan.layers, job.files)
    for path, layer in layers.items():
        put(module, path, layer.train(module.training))
    attach(module, job.config, job.layout, bytes_before, originals)
    mark(module, job.config, SemanticDialectQuantizer(job.config, pre_quantized=False))


def _restored(module: nn.Module) -> Mapping[str, nn.Linear]:
    hook = attached(module)
    if hook is None or hook.originals is None:
        raise RuntimeError(
            f"{type(module).__name__} was loaded quantized; load the 16-bit checkpoint with "
            "from_pretrained instead"
        )
    return hook.originals.restored()


def _transformers(target: Any, layout: Layout | None) -> dict[str, nn.Module]:
    """The transformers of a target that can be enabled, by name.

    Raises:
        LayoutError: if there is none.
    """
    modules = _modules(target)
    if isinstance(target, nn.Module):
        return modules
    if layout is None:
        found = {n: m for n, m in modules.items() if layout_for(m) is not None}
    else:
        found = {n: m for n, m in modules.items() if type(m).__name__ in layout.models}
    if not found:
        classes = ", ".join(f"{n}: {type(m).__name__}" for n, m in modules.items()) or "no modules"
        raise LayoutError(
            f"{type(target).__name__}: has no video transformer with a known layout ({classes}); "
            "give the transformer itself to diffusers_hook.enable() with a layout"
        )
    return found


def _enabled(target: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in _modules(target).items() if attached(m) is not None}


def _modules(target: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline, or the module itself, by name."""
    if isinstance(target, nn.Module):
        return {type(target).__name__: target}
    components: Mapping[str, Any] = getattr(target, "components", None) or {}
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}
