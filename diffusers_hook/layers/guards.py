"""Methods of a transformer that would damage it while it is enabled: refused, or made to fit."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .casting import cast, check_castable
from .quantized import QuantizedLinear

__all__ = ["check_fusing", "check_saving", "guard", "unguard"]

_FUSE_QKV = (
    "fuse_qkv_projections: the projections are quantized already; fuse them before "
    "enable_semantic_dialect()"
)
_FUSE = (
    "{name}: a LoRA cannot be put into or taken out of quantized weights; call "
    "disable_semantic_dialect() first, or leave the LoRA as it is"
)
_SAVE = (
    "save_pretrained: the folder holds the 16-bit weights that disable_semantic_dialect() will "
    "read; save into another one, or enable with keep_original='host' or 'none'"
)
_OTHER_TOOL = (
    "{model}: {tool} cannot quantize its linear layers, which SemanticDialect has quantized; call "
    "disable_semantic_dialect() first, or quantize other components"
)
_OTHER_TOOLS = ("torchao", "optimum.quanto")
"""Packages that exchange the linear layers of a model, one after the other while they walk it."""


def guard(module: nn.Module, files: Collection[Path]) -> None:
    """Put guards in front of a transformer's methods, see :func:`unguard`.

    Args:
        module: the transformer, its layers quantized.
        files: files that ``disable`` will read; nothing is saved over them.
    """
    guards: dict[str, _Guard] = {"fuse_qkv_projections": _Refusal(_FUSE_QKV)}
    for name in ("fuse_lora", "unfuse_lora"):
        guards[name] = _Refusal(_FUSE.format(name=name))
    if files and hasattr(module, "save_pretrained"):
        guards["save_pretrained"] = _CarefulSave(module, files)
    if hasattr(module, "save_pretrained"):  # diffusers' own method refuses another dtype
        guards["to"] = _CastingTo(module)
    for name in ("named_children", "named_modules"):
        guards[name] = _Walk(module, name)
    for name, held in guards.items():
        # what somebody else has put into the instance stays, e.g. accelerate's own `to`
        if hasattr(module, name) and name not in vars(module):
            setattr(module, name, held)
    # pipe.unfuse_lora() calls the adapters, and PEFT forgets what was merged before it comes to the
    # weight, which refuses; merging comes to the weight first
    for part in module.modules():
        base = getattr(part, "base_layer", None)
        if isinstance(base, QuantizedLinear) and getattr(part, "merged", False):
            setattr(part, "unmerge", guards["unfuse_lora"])  # noqa: B010 - not a module's type


def unguard(module: nn.Module) -> None:
    """Remove the guards."""
    for part in module.modules():
        for name in [name for name, held in vars(part).items() if isinstance(held, _Guard)]:
            delattr(part, name)


def check_saving(files: Collection[Path], folder: Path) -> None:
    """Raise RuntimeError if one of the files, symbolic links followed, is in the folder."""
    if folder.is_dir() and any(child.resolve() in files for child in folder.iterdir()):
        raise RuntimeError(_SAVE)


def check_fusing(name: str) -> None:
    """Raise RuntimeError: the method of that name cannot be called while a model is enabled."""
    raise RuntimeError(_FUSE.format(name=name))


class _Guard:
    """A callable in the place of a method, in a module's instance."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class _Refusal(_Guard):
    """It raises RuntimeError."""

    def __init__(self, sentence: str) -> None:
        self._sentence = sentence

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(self._sentence)


class _OfClass(_Guard):
    """It calls the method of the module's class."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = weakref.ref(module)
        self._method = getattr(type(module), name)
        # diffusers reads from it which arguments there are
        parameters = list(inspect.signature(self._method).parameters.values())[1:]
        self.__signature__ = inspect.Signature(parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(self._module(), *args, **kwargs)


class _CarefulSave(_OfClass):
    """`save_pretrained` that refuses to overwrite the files."""

    def __init__(self, module: nn.Module, files: Collection[Path]) -> None:
        super().__init__(module, "save_pretrained")
        self._files = files

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        check_saving(self._files, Path(save_directory))
        return super().__call__(save_directory, *args, **kwargs)


class _CastingTo(_OfClass):
    """`to` that casts a quantized model too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "to")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is None:
            return super().__call__(*args, **kwargs)
        check_castable(dtype)
        if device is not None:
            super().__call__(device)
        module = self._module()
        assert module is not None
        cast(module, dtype)
        return module


class _Walk(_OfClass):
    """A walk over a model's parts that is refused to tools which would exchange them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caller = _caller()
        for tool in _OTHER_TOOLS:
            if f"{caller}.".startswith(f"{tool}."):
                model = type(self._module()).__name__
                raise RuntimeError(_OTHER_TOOL.format(model=model, tool=tool))
        return super().__call__(*args, **kwargs)


def _caller() -> str:
    """The module of the function that walks; torch's own walks over modules are looked through."""
    frame = inspect.currentframe()
    while frame is not None:
        name: str = frame.f_globals.get("__name__", "")
        if name not in (__name__, nn.Module.__module__):
            return name
        frame = frame.f_back
    return ""
