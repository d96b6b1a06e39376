"""The guidance branch and the step of a call of the transformer, where the pipeline names them.

Most video pipelines wrap their calls in ``transformer.cache_context("cond")`` and ``("uncond")``.
diffusers hands that name to stateful hooks only, so we register one that does nothing else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Context", "watch_branch"]

_NAME = "semantic_dialect"


@dataclass(frozen=True)
class Context:
    """The guidance branch and the step of a call; None where the pipeline does not name them."""

    branch: str | None = None
    step: int | None = None


def watch_branch(
    module: nn.Module,
) -> tuple[Callable[[], Context], Callable[[nn.Module], None]]:
    """Watch the cache context of a transformer.

    Args:
        module: the transformer.

    Returns:
        (a function that returns the context in force, a function that stops watching the module
        it is given); neither keeps the module alive.
    """
    if not hasattr(module, "cache_context"):
        return Context, lambda module: None
    from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager

    class Watcher(ModelHook):
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.manager = StateManager(BaseState)

        def reset_state(self, module: nn.Module) -> nn.Module:
            return module

    hook = Watcher()
    manager = hook.manager
    had_forward = "forward" in vars(module)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _NAME)
    ours: Callable[[], Any] = weakref.ref(module.forward)

    def context() -> Context:
        try:
            found = manager.context
        except ValueError:  # no context is set
            return Context()
        return Context(found.name, found.step_index)

    def unwatch(module: nn.Module) -> None:
        registry: Any = module._diffusers_hook
        inner = registry.hooks[_NAME].fn_ref.forward
        _unlink(module, registry, ours(), inner)
        index = registry._hook_order.index(_NAME)
        del registry.hooks[_NAME], registry._hook_order[index], registry._fn_refs[index]
        registry.invalidate_child_registries_cache()
        if not had_forward and not registry.hooks and module.forward is inner:
            # what is left is the class's own method, bound, in the instance
            del module.forward
            del module._diffusers_hook

    return context, unwatch


def _unlink(module: nn.Module, registry: Any, ours: Any, inner: Any) -> None:
    """Let every caller of our forward call the one inside it.

    `HookRegistry.remove_hook` would put that one in the place of the module's forward, or of the
    next hook's. Offloading of accelerate that was added around ours would be lost, one that was
    removed since would come back, and so would a forward that the next hook has itself.
    """
    if ours is None:
        return  # nobody calls it any more
    places = [(module, "forward"), (module, "_old_forward")]  # accelerate's own name
    places += [(ref, name) for ref in registry._fn_refs for name in ("forward", "original_forward")]
    for place, name in places:
        if getattr(place, name, None) is ours:
            setattr(place, name, inner)
