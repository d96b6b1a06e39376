"""Turning SemanticDialect on and off, for pipelines and for single transformers."""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dialect_kernels.formatbook import book_by_name

from . import families  # noqa: F401 - registers the layouts
from .branch import watch_branch
from .config import ConfigError, SemanticDialectConfig
from .layouts import Block, Layout, LayoutError, Stream, layout_for, without_adapters
from .linear import DialectLinear, Fp8Linear
from .mark import mark, unmark
from .observe import observed_processor
from .originals import Originals, keep_nowhere, keep_on_disk, keep_on_host, source_folder
from .state import BlockState, ModelState
from .summary import Summary, TransformerSummary, summarize

__all__ = [
    "Attached",
    "Plan",
    "attach",
    "detach",
    "disable",
    "enable",
    "enabled",
    "make_plan",
    "put",
    "quantized_layer",
    "summary",
]

_log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MODULATION_SHARE = 0.05
"""Share of the parameters from which adaLN modulation is stored in FP8 unless the user says."""


@dataclass
class Attached:
    """The hook on one transformer.

    Attributes:
        config: the configuration in force.
        layout: the transformer's layout.
        state: what the hook remembers between calls.
        bytes_before: bytes of the parameters before.
        originals: the replaced layers; None for a transformer that was loaded quantized.
        processors: attention's name -> its processor before.
        undo: what takes the hooks off again.
    """

    config: SemanticDialectConfig
    layout: Layout
    state: ModelState
    bytes_before: int
    originals: Originals | None = None
    processors: dict[str, Any] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)


_attached: weakref.WeakKeyDictionary[nn.Module, Attached] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Plan:
    """Which linear layers of a transformer become what; names are from the model's root."""

    blocks: tuple[Block, ...]
    quantized: Mapping[str, tuple[nn.Linear, Stream]]
    modulation: Mapping[str, nn.Linear]


def enable(
    target: Any,
    config: SemanticDialectConfig | None = None,
    *,
    layout: Layout | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Quantize a pipeline's transformers, or one transformer, and hook their attention.

    Args:
        target: a diffusers pipeline, or a video transformer (any `nn.Module` with a layout).
        config: the configuration; default: :class:`SemanticDialectConfig` with its defaults.
        layout: the transformer's layout, where its class is not known.
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
    modules = _transformers(target, layout)
    for name, module in modules.items():
        if module in _attached:
            raise RuntimeError(
                f"{name}: SemanticDialect is enabled already; call disable_semantic_dialect() first"
            )
    layouts = {name: layout or _known_layout(module, name) for name, module in modules.items()}
    work = [
        (module, layouts[name], *make_plan(module, config, layouts[name], name), name)
        for name, module in modules.items()
    ]
    layers = [_quantize(plan, resolved, name, progress) for *_, resolved, plan, name in work]
    for (module, known, resolved, plan, _), new in zip(work, layers, strict=True):
        _replace(module, plan, new, resolved, known)
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
    modules = {n: m for n, m in _transformers(target, None, known=False).items() if m in _attached}
    if not modules:
        _log.warning("SemanticDialect is not enabled; there is nothing to disable")
        return target
    restored = {name: _restored(module) for name, module in modules.items()}
    for name, module in modules.items():
        detach(module)
        for path, layer in restored[name].items():
            put(module, path, layer)
        unmark(module)
    return target


def summary(target: Any) -> Summary:
    """What the hook did: layers, bits, memory, salient share, groups, refreshes, time.

    Raises:
        RuntimeError: if SemanticDialect is not enabled.
    """
    found: list[TransformerSummary] = []
    for name, module in _transformers(target, None, known=False).items():
        if module in _attached:
            attached = _attached[module]
            found.append(summarize(name, module, attached))
    if not found:
        raise RuntimeError("SemanticDialect is not enabled; call enable_semantic_dialect() first")
    return Summary(tuple(found))


def enabled(module: nn.Module) -> bool:
    """Whether SemanticDialect is enabled on a transformer."""
    return module in _attached


def make_plan(
    module: nn.Module,
    config: SemanticDialectConfig,
    layout: Layout,
    name: str,
    *,
    empty: bool = False,
) -> tuple[SemanticDialectConfig, Plan]:
    """Which layers become what; checks everything that can be checked before any work is done.

    Args:
        module: the transformer.
        config: the configuration.
        layout: the transformer's layout.
        name: what error messages call the transformer.
        empty: whether the weights are yet to be loaded.

    Returns:
        (the configuration with `modulation` resolved, the plan).

    Raises:
        LayoutError, ConfigError, ValueError: if the model does not fit; one sentence.
    """
    if config.strict and not layout.has_saliency and (config.decomposes or config.groups):
        raise LayoutError(
            f"{name}: {type(module).__name__} has no attention that salient tokens could be read "
            f"from ({layout.remark}); pass strict=False, or salient_fraction=0 and seda=False"
        )
    if getattr(module, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{name}: is quantized already; load the 16-bit checkpoint to quantize it another way"
        )
    blocks = tuple(layout.blocks(module))
    linears = {
        f"{block.name}.{path}": (layer, stream)
        for block in blocks
        for path, layer, stream in block.linears()
    }
    quantized = {n: found for n, found in linears.items() if not _skipped(n, config)}
    if not quantized:
        raise ValueError(
            f"{name}: no linear layer is left to quantize; skip={list(config.skip)} matches all of "
            f"{len(linears)}"
        )
    for path, (layer, _) in quantized.items():
        _check_layer(f"{name}.{path}", layer, config.block_size, empty)
    modulation = _modulation(module, layout, config)
    config = config.replaced(modulation="fp8" if modulation else "16bit")
    return config, Plan(blocks, quantized, modulation)


def attach(
    module: nn.Module, config: SemanticDialectConfig, layout: Layout, bytes_before: int
) -> None:
    """Hook a transformer whose linear layers are replaced already.

    Args:
        module: the transformer.
        config: the configuration.
        layout: its layout.
        bytes_before: bytes of its parameters in 16 bit, for the summary.
    """
    if not layout.has_saliency and (config.decomposes or config.groups):
        _log.warning(
            "%s: quantized without salient tokens and groups: %s",
            type(module).__name__,
            layout.remark,
        )
        config = config.replaced(salient_fraction=0.0, seda=False)
    state = ModelState(config)
    attached = Attached(config, layout, state, bytes_before)
    for index, block in enumerate(layout.blocks(module)):
        block_state = BlockState(state, block, index)
        state.blocks.append(block_state)
        for layer in block.module.modules():
            if isinstance(layer, DialectLinear):
                layer.slot = block_state.slot
        if (config.decomposes or config.groups) and block.kind.attention is not None:
            attention = block.module.get_submodule(block.kind.attention)
            attached.processors[f"{block.name}.{block.kind.attention}"] = attention.processor
            attention.processor = observed_processor(attention.processor, block_state.slot)
    _hook(module, attached)
    _attached[module] = attached


def detach(module: nn.Module) -> None:
    """Take the hook off a transformer; its linear layers stay as they are."""
    attached = _attached.pop(module)
    for path, processor in attached.processors.items():
        module.get_submodule(path).processor = processor
    for undo in attached.undo:
        undo()
    for layer in module.modules():
        if isinstance(layer, DialectLinear):
            layer.leave_block()


def _transformers(
    target: Any, layout: Layout | None, *, known: bool = True
) -> dict[str, nn.Module]:
    """The transformers of a target, by name; with `known`, at least one that has a layout.

    Raises:
        LayoutError: if there is none.
    """
    if isinstance(target, nn.Module):
        return {type(target).__name__: target}
    components: Mapping[str, Any] = getattr(target, "components", None) or {}
    modules = {n: m for n, m in components.items() if isinstance(m, nn.Module)}
    found = {n: m for n, m in modules.items() if layout_for(m) is not None or m in _attached}
    if known and layout is not None:
        found = {n: m for n, m in modules.items() if type(m).__name__ in layout.models}
    if known and not found:
        classes = ", ".join(f"{n}: {type(m).__name__}" for n, m in modules.items()) or "no modules"
        raise LayoutError(
            f"{type(target).__name__}: has no video transformer with a known layout ({classes}); "
            "give the transformer itself to diffusers_hook.enable() with a layout"
        )
    return found


def _known_layout(module: nn.Module, name: str) -> Layout:
    layout = layout_for(module)
    if layout is None:
        raise LayoutError(
            f"{name}: the layout of {type(module).__name__} is not known; pass one as layout=, see "
            "diffusers_hook.Layout"
        )
    return layout


def _check_layer(name: str, layer: nn.Linear, block_size: int, empty: bool) -> None:
    weight = layer.weight
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"{name}: is a {type(layer).__name__}, not a plain linear layer; unload or fuse its "
            "adapters, or add it to skip"
        )
    if weight.device.type == "meta" and not empty:
        raise ValueError(
            f"{name}.weight: is not in memory (offloaded); enable SemanticDialect before offloading"
        )
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"{name}.weight: has dtype {weight.dtype}; allowed are float32, bfloat16 and float16"
        )
    if layer.in_features % block_size:
        raise ValueError(
            f"{name}.weight: has {layer.in_features} columns, not a multiple of block_size "
            f"{block_size}; choose a smaller block_size or add the layer to skip"
        )


def _modulation(
    module: nn.Module, layout: Layout, config: SemanticDialectConfig
) -> dict[str, nn.Linear]:
    """The modulation layers that are stored in FP8, by name."""
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and any(re.fullmatch(p, without_adapters(name)) for p in layout.modulation)
        and not _skipped(name, config)
    }
    if config.modulation is None:
        held = sum(layer.weight.numel() for layer in layers.values())
        whole = sum(parameter.numel() for parameter in module.parameters())
        return layers if held > _MODULATION_SHARE * whole else {}
    return layers if config.modulation == "fp8" else {}


def _skipped(name: str, config: SemanticDialectConfig) -> bool:
    return any(re.fullmatch(pattern, without_adapters(name)) for pattern in config.skip)


def _quantize(
    plan: Plan, config: SemanticDialectConfig, name: str, progress: bool
) -> dict[str, nn.Linear]:
    """The new layers, by name; nothing in the model is touched."""
    from diffusers.utils.logging import tqdm

    paths = [*plan.quantized, *plan.modulation]
    bar = tqdm(paths, desc=f"{name} to 4 bit", unit="layer", disable=not progress)
    return {path: quantized_layer(plan, path, config, f"{name}.{path}") for path in bar}


def quantized_layer(
    plan: Plan, path: str, config: SemanticDialectConfig, name: str
) -> DialectLinear | Fp8Linear:
    """The layer that takes the place of `path`.

    Raises:
        ValueError: if its weight cannot be quantized (calling it `name`).
    """
    if path in plan.modulation:
        return Fp8Linear.quantized(plan.modulation[path], name)
    layer, stream = plan.quantized[path]
    book = book_by_name(config.book)
    return DialectLinear.quantized(layer, stream, book, config.block_size, config.activation, name)


def _replace(
    module: nn.Module,
    plan: Plan,
    layers: Mapping[str, nn.Linear],
    config: SemanticDialectConfig,
    layout: Layout,
) -> None:
    """Put the new layers in, hook the attention and let go of the 16-bit weights."""
    bytes_before = sum(parameter.nbytes for parameter in module.parameters())
    replaced = {path: layer for path, (layer, _) in plan.quantized.items()}
    replaced.update(plan.modulation)
    originals = _keep(module, replaced, config)
    for path, layer in layers.items():
        put(module, path, layer.train(module.training))
    attach(module, config, layout, bytes_before)
    _attached[module].originals = originals
    _mark(module, config)


def _mark(module: nn.Module, config: SemanticDialectConfig) -> None:
    # imported here: the quantizer stands above this module
    from .quantizer import SemanticDialectQuantizer

    mark(module, config, SemanticDialectQuantizer(config, pre_quantized=False))


def _keep(
    module: nn.Module, layers: Mapping[str, nn.Linear], config: SemanticDialectConfig
) -> Originals:
    """Keep the 16-bit weights where the configuration says."""
    if config.keep_original == "none":
        return keep_nowhere(layers)
    folder = source_folder(module)
    if config.keep_original != "host" and folder is not None:
        originals = keep_on_disk(layers, folder)
        if originals is not None:
            return originals
    if config.keep_original == "disk":
        raise ConfigError(
            "keep_original: 'disk' needs the files the weights were loaded from, with exactly "
            "these weights in them; use 'host' or 'none'"
        )
    return keep_on_host(layers)


def _restored(module: nn.Module) -> Mapping[str, nn.Linear]:
    attached = _attached[module]
    if attached.originals is None:
        raise RuntimeError(
            f"{type(module).__name__} was loaded quantized; load the 16-bit checkpoint with "
            "from_pretrained instead"
        )
    return attached.originals.restored()


def _hook(module: nn.Module, attached: Attached) -> None:
    """Tell the state when a call of the transformer begins and ends."""
    layout, state = attached.layout, attached.state
    signature = inspect.signature(type(module).forward)
    branch, unwatch = watch_branch(module)

    @torch.compiler.disable
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = signature.bind_partial(module, *args, **kwargs).arguments
        timestep = arguments.get(layout.timestep)
        noise = 0.0 if timestep is None else float(torch.as_tensor(timestep).max())
        state.begin(layout.grid(module, arguments), noise, branch())

    @torch.compiler.disable
    def end(module: nn.Module, args: object, output: object) -> None:
        state.end()

    if hasattr(module, "fuse_qkv_projections"):
        module.fuse_qkv_projections = _refuse_fusing  # type: ignore[assignment]
        attached.undo.append(lambda: delattr(module, "fuse_qkv_projections"))
    attached.undo += [
        module.register_forward_pre_hook(begin, with_kwargs=True).remove,
        module.register_forward_hook(end).remove,
        unwatch,
    ]


def _refuse_fusing() -> None:
    """Fused now, the projections would be 16-bit copies beside the quantized ones."""
    raise RuntimeError(
        "fuse_qkv_projections: the projections are quantized already; fuse them before "
        "enable_semantic_dialect()"
    )


def put(module: nn.Module, path: str, child: nn.Module) -> None:
    """Put a module in the place of another, by its name from the root."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)
