"""A pipeline whose operations over several components are checked before the first one changes.

Its class becomes a subclass of its own class, of the same name, so that `copy.copy` of a pipeline
(servers make one for each request) is checked too; nothing in diffusers is patched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..layers.casting import check_castable
from ..layers.guards import check_fusing, check_saving
from ..tokens.running import running
from .attach import Attached, attached

__all__ = ["check_components", "modules_of", "uncheck_components", "uncompiled"]


def modules_of(target: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline, or the module itself, by name; each once and not compiled."""
    if isinstance(target, nn.Module):
        module = uncompiled(target)
        return {type(module).__name__: module}
    components: Mapping[str, Any] = getattr(target, "components", None) or {}
    found: dict[str, nn.Module] = {}
    for name, part in components.items():
        if isinstance(part, nn.Module) and uncompiled(part) not in found.values():
            found[name] = uncompiled(part)
    return found


def check_components(pipeline: Any) -> None:
    """Let a pipeline of diffusers look at all its components first; again is harmless."""
    from diffusers import DiffusionPipeline

    original = type(pipeline)
    if isinstance(pipeline, _Checked) or type(original) is not type:
        return
    if issubclass(original, DiffusionPipeline):
        if original not in _checked_classes:
            _checked_classes[original] = _checked_class(original)
        pipeline.__class__ = _checked_classes[original]


def uncheck_components(pipeline: Any) -> None:
    """Undo :func:`check_components`."""
    if isinstance(pipeline, _Checked):
        pipeline.__class__ = type(pipeline).__bases__[1]


class _Checked:
    """Methods of a pipeline in front of those of its own class; they raise what these would.

    Its calls are known to this thread, so that its transformers find its scheduler.
    """

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        for name, _, hook in _enabled(self):
            if hook.originals is not None:
                check_saving(hook.originals.files, Path(save_directory) / name)
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        dtypes = [given for given in (*args, *kwargs.values()) if isinstance(given, torch.dtype)]
        if dtypes and any(_enabled(self)):
            check_castable(dtypes[0])
        return super().to(*args, **kwargs)  # type: ignore[misc]


class _CheckedWithLora(_Checked):
    """The same for a pipeline that loads LoRAs."""

    def fuse_lora(self, *args: Any, **kwargs: Any) -> Any:
        fuse = super().fuse_lora  # type: ignore[misc]
        bound = inspect.signature(fuse).bind(*args, **kwargs)
        bound.apply_defaults()
        chosen = bound.arguments.get("components") or ()
        if any(name in chosen for name, _, _ in _enabled(self)):
            check_fusing("fuse_lora")
        return fuse(*args, **kwargs)

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> Any:
        for _, module, _ in _enabled(self):
            if any(getattr(part, "merged", False) for part in module.modules()):
                check_fusing("unfuse_lora")
        return super().unfuse_lora(*args, **kwargs)  # type: ignore[misc]


class _View(type):
    """A class that is patched where its original is: cache-dit exchanges a pipeline's call.

    It reads the original's call, too, or ours would call itself.
    """

    def __getattribute__(cls, name: str) -> Any:
        found = type.__getattribute__
        return getattr(found(cls, "__bases__")[1], name) if name == _CALL else found(cls, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        setattr(cls.__bases__[1], name, value)

    def __delattr__(cls, name: str) -> None:
        delattr(cls.__bases__[1], name)


_CALL = "__call__"
_checked_classes: dict[type, type] = {}


def _checked_class(original: type) -> type:
    methods = _CheckedWithLora if hasattr(original, "fuse_lora") else _Checked

    @functools.wraps(getattr(original, _CALL))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with running(self):
            return getattr(original, _CALL)(self, *args, **kwargs)

    about = {"__module__": original.__module__, "__doc__": original.__doc__, _CALL: call}
    return _View(original.__name__, (methods, original), about)


def _enabled(pipeline: Any) -> Iterator[tuple[str, nn.Module, Attached]]:
    for name, module in modules_of(pipeline).items():
        hook = attached(module)
        if hook is not None:
            yield name, module, hook


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside what `torch.compile(module)` returns."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner
