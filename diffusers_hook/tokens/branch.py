"""The guidance branch and the step of a call of the transformer, where the pipeline names them.

Most video pipelines wrap their calls in ``transformer.cache_context("cond")`` and ``("uncond")``.
diffusers hands that name to stateful hooks only, so we register one that does nothing else.
"""

from __future__ import annotations

import threading
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
        (a function that returns the context in force in the thread that calls it, a function that
        stops watching the module it is given); neither keeps the module alive.
    """
    if not hasattr(module, "cache_context"):
        return Context, lambda module: None
    from diffusers.hooks.hooks import HookRegistry

    had_registry = "_diffusers_hook" in vars(module)
    hook = _watcher()
    of_thread = hook.contexts.of_thread
    # In front of all others, and by hand: `register_hook` would put a functools.partial in the
    # place of the module's forward, which nobody could unwrap but in the order of wrapping.
    registry: Any = HookRegistry.check_if_exists_or_initialize(module)
    registry.hooks = {_NAME: hook, **registry.hooks}
    registry._hook_order.insert(0, _NAME)
    registry._fn_refs.insert(0, hook.fn_ref)
    registry.invalidate_child_registries_cache()

    def context() -> Context:
        found = getattr(of_thread, "context", None)
        return Context() if found is None else Context(found.name, found.step_index)

    def unwatch(module: nn.Module) -> None:
        registry: Any = module._diffusers_hook
        index = registry._hook_order.index(_NAME)
        del registry.hooks[_NAME], registry._hook_order[index], registry._fn_refs[index]
        registry.invalidate_child_registries_cache()
        if not had_registry and not registry.hooks:
            del module._diffusers_hook

    return context, unwatch


def _watcher() -> Any:
    """A hook of diffusers whose `contexts` keep one context for each thread."""
    from diffusers.hooks.hooks import BaseState, HookFunctionReference, ModelHook, StateManager

    class Contexts(StateManager):
        def __init__(self) -> None:
            super().__init__(BaseState)
            self.of_thread = threading.local()

        def set_context(self, context: Any) -> None:
            self.of_thread.context = context

    class Watcher(ModelHook):
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.contexts = Contexts()
            self.fn_ref = HookFunctionReference()

        def reset_state(self, module: nn.Module) -> nn.Module:
            return module

    return Watcher()
