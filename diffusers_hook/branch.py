"""Which guidance branch a call of the transformer belongs to, where the pipeline says it.

Most video pipelines wrap their calls in ``transformer.cache_context("cond")`` and ``("uncond")``.
diffusers hands that name to stateful hooks only, so we register one that does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Context", "watch_branch"]

_NAME = "semantic_dialect"


@dataclass(frozen=True)
class Context:
    """What a pipeline says about a call of its transformer; None where it says nothing."""

    branch: str | None = None
    step: int | None = None


def watch_branch(
    module: nn.Module,
) -> tuple[Callable[[], Context], Callable[[nn.Module], None]]:
    """Watch the cache context of a transformer.

    Args:
        module: the transformer.

    Returns:
        (the context in force, what stops watching the module it is given);
        neither keeps the module alive.
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

    def context() -> Context:
        try:
            found = manager.context
        except ValueError:  # no context is set
            return Context()
        return Context(found.name, found.step_index)

    def unwatch(module: nn.Module) -> None:
        registry: Any = module._diffusers_hook
        registry.remove_hook(_NAME, recurse=False)
        registry.invalidate_child_registries_cache()
        if not had_forward and not registry.hooks:
            # remove_hook leaves the class's own method behind, bound, in the instance
            del module.forward
            del module._diffusers_hook

    return context, unwatch
