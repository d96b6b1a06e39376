"""Methods of a transformer that would lose its quantization, refused while it is enabled."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from .quantized import QuantizedLinear

__all__ = ["guard", "unguard"]

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


def guard(module: nn.Module, files: Collection[Path]) -> None:
    """Put refusals in front of a transformer's methods, see :func:`unguard`.

    Args:
        module: the transformer, its layers quantized.
        files: files that ``disable`` will read; nothing is saved over them.
    """
    refusals: dict[str, _Refusal] = {"fuse_qkv_projections": _Refusal(_FUSE_QKV)}
    for name in ("fuse_lora", "unfuse_lora"):
        refusals[name] = _Refusal(_FUSE.format(name=name))
    if files and hasattr(module, "save_pretrained"):
        refusals["save_pretrained"] = _CarefulSave(module, files)
    for name, refusal in refusals.items():
        if hasattr(module, name):
            setattr(module, name, refusal)
    # pipe.unfuse_lora() calls the adapters, and PEFT forgets what was merged before it comes to the
    # weight, which refuses; merging comes to the weight first
    for part in module.modules():
        base = getattr(part, "base_layer", None)
        if isinstance(base, QuantizedLinear) and getattr(part, "merged", False):
            setattr(part, "unmerge", refusals["unfuse_lora"])  # noqa: B010 - not a module's type


def unguard(module: nn.Module) -> None:
    """Remove the refusals."""
    for part in module.modules():
        for name in [name for name, held in vars(part).items() if isinstance(held, _Refusal)]:
            delattr(part, name)


class _Refusal:
    """A callable in the place of a method that raises RuntimeError."""

    def __init__(self, sentence: str) -> None:
        self._sentence = sentence

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(self._sentence)


class _CarefulSave(_Refusal):
    """`save_pretrained` that refuses to overwrite the files."""

    def __init__(self, module: nn.Module, files: Collection[Path]) -> None:
        super().__init__(_SAVE)
        self._files = files
        self._module = weakref.ref(module)
        model_class: Any = type(module)
        self._save = model_class.save_pretrained
        # diffusers reads from it which arguments there are
        parameters = list(inspect.signature(self._save).parameters.values())[1:]
        self.__signature__ = inspect.Signature(parameters)

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        folder = Path(save_directory)
        if folder.is_dir() and any(child.resolve() in self._files for child in folder.iterdir()):
            super().__call__()
        return self._save(self._module(), save_directory, *args, **kwargs)
