"""The hook on a transformer: its blocks' states, its observed attention, its calls."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .branch import watch_branch
from .config import SemanticDialectConfig
from .layouts import Layout
from .linear import DialectLinear
from .observe import observed_processor
from .originals import Originals
from .state import BlockState, ModelState

__all__ = ["Attached", "attach", "attached", "detach"]

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
        processors: attention's name -> its processor before.
        undo: what takes the hooks off again.
    """

    config: SemanticDialectConfig
    layout: Layout
    state: ModelState
    bytes_before: int
    originals: Originals | None = None
    processors: dict[str, Any] = field(default_factory=dict)
    undo: Callable[[nn.Module], None] = lambda module: None


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
    """Hook a transformer whose linear layers are replaced already.

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
    state = ModelState(config)
    hook = Attached(config, layout, state, bytes_before, originals)
    for index, block in enumerate(layout.blocks(module)):
        block_state = BlockState(state, block, index)
        state.blocks.append(block_state)
        for layer in block.module.modules():
            if isinstance(layer, DialectLinear):
                layer.slot = block_state.slot
        if (config.decomposes or config.groups) and block.kind.attention is not None:
            path = f"{block.name}.{block.kind.attention}".rstrip(".")
            attention = module.get_submodule(path)
            hook.processors[path] = attention.processor
            attention.processor = observed_processor(attention.processor, block_state.slot)
    _watch_calls(module, hook)
    _attached[module] = hook


def detach(module: nn.Module) -> None:
    """Take the hook off a transformer; its linear layers stay as they are."""
    hook = _attached.pop(module)
    for path, processor in hook.processors.items():
        module.get_submodule(path).processor = processor
    hook.undo(module)
    for layer in module.modules():
        if isinstance(layer, DialectLinear):
            layer.leave_block()


def _watch_calls(module: nn.Module, hook: Attached) -> None:
    """Tell the state when a call of the transformer begins and ends."""
    layout, state = hook.layout, hook.state
    own = type(module).forward is nn.Module.forward  # Open-Sora gives every instance its own
    signature = inspect.signature(module.forward if own else type(module).forward)
    branch, unwatch = watch_branch(module)

    @torch.compiler.disable
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = signature.bind_partial(*(() if own else (module,)), *args, **kwargs).arguments
        timestep = arguments.get(layout.timestep)
        noise = 0.0 if timestep is None else float(torch.as_tensor(timestep).max())
        state.begin(layout.grid(module, arguments), noise, branch())

    @torch.compiler.disable
    def end(module: nn.Module, args: object, output: object) -> None:
        state.end()

    handles = (
        module.register_forward_pre_hook(begin, with_kwargs=True),
        module.register_forward_hook(end),
    )
    refuses_fusing = hasattr(module, "fuse_qkv_projections")
    if refuses_fusing:
        setattr(module, "fuse_qkv_projections", _refuse_fusing)  # noqa: B010 - not a module's type

    def undo(module: nn.Module) -> None:
        for handle in handles:
            handle.remove()
        unwatch(module)
        if refuses_fusing:
            del module.fuse_qkv_projections

    hook.undo = undo


def _refuse_fusing() -> None:
    """Fused now, the projections would be 16-bit copies beside the quantized ones."""
    raise RuntimeError(
        "fuse_qkv_projections: the projections are quantized already; fuse them before "
        "enable_semantic_dialect()"
    )
