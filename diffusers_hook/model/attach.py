"""The hook on a transformer: its blocks' states, its observed attention, its calls."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn

from ..config import SemanticDialectConfig
from ..layers.dialect import DialectLinear
from ..layers.guards import guard, unguard
from ..layers.originals import Originals
from ..layouts import Layout, without_adapters
from ..tokens.branch import watch_branch
from ..tokens.model_state import ModelState
from ..tokens.observe import Observed, observed_processor
from .share import warn_of_a_small_share

__all__ = ["Attached", "attach", "attached", "blocks_read", "detach", "follow"]

_log = logging.getLogger(__name__)


@dataclass
class Attached:
    """The hook on one transformer.

    Attributes:
        config: the configuration in force.
        layout: the transformer's layout.
        state: what the hook remembers between calls.
        bytes_before: bytes of the parameters before.
        originals: the replaced layers; None for a transformer that was loaded quantized.
        processors: number of a block's state -> its attention's processor before.
        undo: functions that remove the hooks from the module, in the order they were added.
        warned: whether the user knows that blocks are not read.
    """

    config: SemanticDialectConfig
    layout: Layout
    state: ModelState
    bytes_before: int
    originals: Originals | None = None
    processors: dict[int, Any] = field(default_factory=dict)
    undo: list[Callable[[nn.Module], None]] = field(default_factory=list)
    warned: bool = False

    @property
    def blocks_to_read(self) -> int:
        """How many blocks tell salient tokens and groups through their attention."""
        return len(self.processors)


_attached: weakref.WeakKeyDictionary[nn.Module, Attached] = weakref.WeakKeyDictionary()
# nothing in an Attached may refer to its module, or neither would ever be freed


def attached(module: nn.Module) -> Attached | None:
    """The hook on a transformer, or None."""
    return _attached.get(module)


def attach(
    module: nn.Module,
    config: SemanticDialectConfig,
    layout: Layout,
    bytes_before: int,
    originals: Originals | None = None,
) -> None:
    """Hook a transformer whose linear layers have been replaced.

    Args:
        module: the transformer.
        config: the configuration.
        layout: its layout.
        bytes_before: bytes of its parameters in 16 bit, for the summary.
        originals: the layers that were replaced.
    """
    if not layout.has_saliency and (config.decomposes or config.groups):
        _log.warning(
            "%s: quantized without salient tokens and groups: %s",
            type(module).__name__,
            layout.remark,
        )
        config = config.replaced(salient_fraction=0.0, seda=False)
    blocks = layout.blocks(module)
    state = ModelState(config, blocks, timestep_rises=layout.timestep_rises)
    # registered from the first step on, so that detach can undo whatever was done
    hook = _attached[module] = Attached(config, layout, state, bytes_before, originals)
    for block, block_state in zip(blocks, state.blocks, strict=True):
        for name, layer in block.module.named_modules():
            if isinstance(layer, DialectLinear):
                layer.enter_block(block_state.slot, without_adapters(name))
        if state.reads_attention and block.kind.attention is not None:
            path = f"{block.name}.{block.kind.attention}".rstrip(".")
            attention: Any = module.get_submodule(path)
            hook.processors[int(block_state.slot[0])] = attention.processor
            attention.processor = observed_processor(attention.processor, block_state.slot)
    _watch_calls(module, hook)
    hook.undo.append(unguard)
    guard(module, originals.files if originals is not None else ())
    warn_of_a_small_share(module)


def detach(module: nn.Module) -> None:
    """Remove the hook from a transformer, even one half added; its linear layers stay."""
    hook = _attached[module]
    _give_back_processors(module, hook.processors)
    while hook.undo:
        hook.undo.pop(0)(module)
    for layer in module.modules():
        if isinstance(layer, DialectLinear):
            layer.leave_block()
    del _attached[module]


def _give_back_processors(module: nn.Module, processors: dict[int, Any]) -> None:
    """Restore the processors of attention, except where the user has set another one."""
    for attention in module.modules():
        observed = getattr(attention, "processor", None)
        if isinstance(observed, Observed) and int(observed._slot[0]) in processors:
            processor = processors[int(observed._slot[0])]
            # what was set in the meantime, e.g. by set_attention_backend
            kept = {name: value for name, value in vars(observed).items() if name != "_slot"}
            vars(processor).update(kept)
            setattr(attention, "processor", processor)  # noqa: B010 - not a module's type


def blocks_read(module: nn.Module) -> int:
    """How many blocks still have the processor that reads their attention.

    One that is set later is not observed.
    """
    return sum(
        isinstance(getattr(attention, "processor", None), Observed)
        for attention in module.modules()
    )


def follow(module: nn.Module, pipeline: object) -> None:
    """Follow the pipeline of a hooked transformer: its scheduler shows where generations begin."""
    _attached[module].state.follow(pipeline)


def _watch_calls(module: nn.Module, hook: Attached) -> None:
    """Report the beginning and the end of every call of the transformer to its state."""
    layout, state = hook.layout, hook.state
    own = type(module).forward is nn.Module.forward  # Open-Sora gives every instance its own
    signature = inspect.signature(module.forward if own else type(module).forward)
    branch, unwatch = watch_branch(module)
    hook.undo.append(unwatch)

    @torch.compiler.disable
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if state.reads_attention:
            _refuse_halved_batches(module)
            _warn_of_blocks_not_read(module, hook)
        arguments = signature.bind_partial(*(() if own else (module,)), *args, **kwargs).arguments
        # a forward that stands before the class's own may name nothing itself
        arguments.update(arguments.pop("kwargs", {}))
        state.begin(layout.grid(module, arguments), arguments.get(layout.timestep), branch())

    @torch.compiler.disable
    def end(module: nn.Module, args: object, output: object) -> None:
        state.end()

    before = module.register_forward_pre_hook(_Call(begin), with_kwargs=True)
    hook.undo.append(lambda module: before.remove())
    after = module.register_forward_hook(_Call(end))
    hook.undo.append(lambda module: after.remove())


def _refuse_halved_batches(module: nn.Module) -> None:
    """Raise RuntimeError if the transformer computes other samples than it is called with."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("faster_cache_denoiser")
    if hook is not None and not hook.is_guidance_distilled:
        raise RuntimeError(
            f"{type(module).__name__}: FasterCache leaves out half of a batch inside the model, "
            "where salient tokens and groups cannot follow; call disable_cache(), or enable "
            "SemanticDialect with salient_fraction=0 and seda=False"
        )


def _warn_of_blocks_not_read(module: nn.Module, hook: Attached) -> None:
    """Say once that processors of attention were exchanged, so that blocks are not read."""
    if hook.warned or (found := blocks_read(module)) == hook.blocks_to_read:
        return
    hook.warned = True
    _log.warning(
        "%s: another processor of attention was set after SemanticDialect was enabled, so that %d "
        "of %d blocks are read; salient tokens and groups of the others stay as they are. Set "
        "processors before enabling",
        type(module).__name__,
        found,
        hook.blocks_to_read,
    )


class _Call:
    """A hook of a transformer that is neither copied nor pickled: a copy would share its state."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: object) -> None:
        self._call(*args)

    def __deepcopy__(self, memo: object) -> None:
        _refuse_copying()

    def __reduce_ex__(self, protocol: object) -> str:
        return _refuse_copying()


def _refuse_copying() -> NoReturn:
    raise RuntimeError(
        "a transformer cannot be copied or pickled while SemanticDialect is enabled; call "
        "disable_semantic_dialect() first, or use save_pretrained and from_pretrained"
    )
