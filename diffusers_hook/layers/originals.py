"""Where the 16-bit weights wait while a transformer is quantized, so that ``disable`` is exact."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..config import ConfigError
from ..layouts import without_adapters
from .quantized import QuantizedLinear

__all__ = ["Originals", "Source", "choose_place", "keep"]

_WEIGHTS = ("diffusion_pytorch_model*.safetensors", "model*.safetensors")
"""The files of weights that diffusers and transformers write."""


@dataclass(frozen=True)
class Source:
    """A weight in a file, with its SHA-256 to recognize it by."""

    path: Path
    digest: bytes


@dataclass
class Originals:
    """The linear layers that were replaced, by name from the model's root.

    Attributes:
        place: ``"disk"``, ``"host"`` or ``"none"``.
        layers: the layers themselves; on ``"disk"`` without their weights, on ``"none"`` no layers.
        sources: on ``"disk"``: where each layer's weight is.
    """

    place: str
    layers: dict[str, nn.Linear] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)

    @property
    def host_bytes(self) -> int:
        """Bytes of the weights that are kept in host memory."""
        if self.place != "host":
            return 0
        return sum(layer.weight.nbytes for layer in self.layers.values())

    @property
    def files(self) -> set[Path]:
        """The files that ``disable`` will read, symbolic links followed."""
        return {source.path.resolve() for source in self.sources.values()}

    def weight(self, layer: QuantizedLinear) -> torch.Tensor:
        """The weight [N, K] that a quantized layer stands for, on its device and in its dtype.

        Raises:
            RuntimeError: if no weights were kept, or the file is gone or other than it was.
        """
        if self.place == "none":
            raise RuntimeError(
                "the 16-bit weights were not kept (keep_original='none'); load the pipeline again "
                "with from_pretrained"
            )
        name = layer.original_name
        if name not in self.layers:
            raise RuntimeError(
                f"a quantized layer ({name or 'without a name'}) was put into the transformer by "
                "something else; load the pipeline again with from_pretrained"
            )
        if name in self.sources:
            # a copy: the file's mapping is neither aligned nor ours to keep
            stored = _read(name, self.sources[name])
            return stored.to(layer.device, layer.original_dtype, copy=True)
        return self.layers[name].weight.detach().to(layer.device, layer.original_dtype)


def choose_place(
    module: nn.Module, layers: Mapping[str, nn.Linear], wanted: str | None
) -> tuple[str, dict[str, Source]]:
    """Where the weights will be kept; nothing is changed.

    Args:
        module: the model.
        layers: the layers that will be replaced, by name from the model's root.
        wanted: ``"disk"``, ``"host"``, ``"none"``, or None for the first of the first two that
            works.

    Returns:
        (the place, on ``"disk"`` the source of each layer's weight).

    Raises:
        ConfigError: if `wanted` is ``"disk"`` and the model's files do not hold exactly the weights
            that are in memory (e.g. after a LoRA was fused).
    """
    if wanted in ("host", "none"):
        return wanted, {}
    sources = _exact_sources(layers, _source_folders(module))
    if sources is not None:
        return "disk", sources
    if wanted == "disk":
        raise ConfigError(
            "keep_original: 'disk' needs the files the weights were loaded from, with exactly "
            "these weights in them; use 'host' or 'none'"
        )
    return "host", {}


def keep(place: str, layers: Mapping[str, nn.Linear], sources: dict[str, Source]) -> Originals:
    """Let go of the weights, or move them to host memory, as :func:`choose_place` found.

    Each layer gets a new parameter: the caller can still put the old ones back.
    """
    if place == "none":
        return Originals(place)
    for layer in layers.values():
        weight = layer.weight.detach()
        weight = weight.to("cpu") if place == "host" else torch.empty_like(weight, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    return Originals(place, dict(layers), sources)


def _source_folders(module: nn.Module) -> list[Path]:
    """The folders a model may have been loaded from, hub models from the local cache."""
    config = getattr(module, "config", None)
    path = getattr(config, "_name_or_path", None) if config is not None else None
    if not path:
        return []
    root = Path(path) if Path(path).is_dir() else _cached(path)
    if root is None:
        return []
    # with from_pretrained(..., subfolder=) the name lacks the subfolder
    return [root, *sorted(child for child in root.iterdir() if child.is_dir())]


def _cached(repository: str) -> Path | None:
    """The local copy of a hub repository; nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _key(name: str) -> str:
    return f"{without_adapters(name)}.weight"


def _exact_sources(
    layers: Mapping[str, nn.Linear], folders: list[Path]
) -> dict[str, Source] | None:
    """The source of each layer's weight in the first folder that holds all of them exactly."""
    for folder in folders:
        files = _files(folder)
        sources = {}
        for name, layer in layers.items():
            source = _exact_source(files.get(_key(name)), name, layer.weight)
            if source is None:
                break
            sources[name] = source
        else:
            return sources
    return None


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, for every safetensors file of a model's folder that can be read."""
    found = {}
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        try:
            with safe_open(path, "pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError):
            continue
    return found


def _exact_source(path: Path | None, name: str, weight: torch.Tensor) -> Source | None:
    """The source of a weight in a file, or None if the file holds another one."""
    if path is None:
        return None
    with safe_open(path, "pt") as file:
        stored = file.get_tensor(_key(name))
    if not torch.equal(stored.to(weight.dtype), weight.detach().to("cpu")):
        return None
    return Source(path, _digest(stored))


def _digest(stored: torch.Tensor) -> bytes:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{stored.dtype} {list(stored.shape)}".encode())
    digest.update(stored.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def _read(name: str, source: Source) -> torch.Tensor:
    """A layer's weight as it is in its file."""
    key = _key(name)
    try:
        with safe_open(source.path, "pt") as file:
            stored = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"{key} cannot be read from {source.path} any more ({error}); load the pipeline again "
            "with from_pretrained"
        ) from None
    if _digest(stored) != source.digest:
        raise RuntimeError(
            f"{key} in {source.path} is not the weight it was; load the pipeline again with "
            "from_pretrained"
        )
    return stored
