"""Where the 16-bit weights wait while a transformer is quantized, so that ``disable`` is exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from .config import ConfigError
from .layouts import without_adapters

__all__ = ["Originals", "choose_place", "keep", "source_folders"]

_WEIGHTS = "diffusion_pytorch_model"


@dataclass
class Originals:
    """The linear layers that were replaced, by name from the model's root.

    Attributes:
        place: ``"disk"``, ``"host"`` or ``"none"``.
        layers: the layers themselves; on ``"disk"`` and ``"none"`` without their weights.
        devices: where each layer's weight was.
        files: on ``"disk"``: the file of each layer's weight.
    """

    place: str
    layers: dict[str, nn.Linear] = field(default_factory=dict)
    devices: dict[str, torch.device] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def host_bytes(self) -> int:
        """Bytes of the weights that are kept in host memory."""
        if self.place != "host":
            return 0
        return sum(layer.weight.nbytes for layer in self.layers.values())

    def restored(self) -> dict[str, nn.Linear]:
        """The layers with their weights, where they were.

        Raises:
            RuntimeError: if no weights were kept, or the files are gone or other than they were.
        """
        if self.place == "none":
            raise RuntimeError(
                "the 16-bit weights were not kept (keep_original='none'); load the pipeline again "
                "with from_pretrained"
            )
        weights = _read(self) if self.place == "disk" else {}
        for name, layer in self.layers.items():
            weight = weights.get(name, layer.weight).to(self.devices[name])
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        return self.layers


def choose_place(
    module: nn.Module, layers: Mapping[str, nn.Linear], wanted: str | None
) -> tuple[str, dict[str, Path]]:
    """Where the weights will be kept; nothing is changed.

    Args:
        module: the model.
        layers: the layers that will be replaced, by name from the model's root.
        wanted: ``"disk"``, ``"host"``, ``"none"``, or None for the first of the first two that
            works.

    Returns:
        (the place, on ``"disk"`` the file of each layer's weight).

    Raises:
        ConfigError: if `wanted` is ``"disk"`` and the model's files do not hold exactly the weights
            that are in memory (e.g. after a LoRA was fused).
    """
    if wanted in ("host", "none"):
        return wanted, {}
    files = _exact_files(layers, source_folders(module))
    if files is not None:
        return "disk", files
    if wanted == "disk":
        raise ConfigError(
            "keep_original: 'disk' needs the files the weights were loaded from, with exactly "
            "these weights in them; use 'host' or 'none'"
        )
    return "host", {}


def keep(place: str, layers: Mapping[str, nn.Linear], files: dict[str, Path]) -> Originals:
    """Let go of the weights, or move them to host memory, as :func:`choose_place` found."""
    devices = {name: layer.weight.device for name, layer in layers.items()}
    for layer in layers.values():
        if place == "host":
            layer.weight.data = layer.weight.data.to("cpu")
        else:
            empty = torch.empty_like(layer.weight, device="meta")
            layer.weight = nn.Parameter(empty, requires_grad=layer.weight.requires_grad)
    return Originals(place, dict(layers), devices, files)


def source_folders(module: nn.Module) -> list[Path]:
    """The folders a diffusers model may have been loaded from, hub models from the local cache."""
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


def _exact_files(layers: Mapping[str, nn.Linear], folders: list[Path]) -> dict[str, Path] | None:
    """The file of each layer's weight in the first folder that holds all of them exactly."""
    for folder in folders:
        found = _files(folder)
        keys = {name: _key(name) for name in layers}
        if all(key in found for key in keys.values()) and all(
            _equal(found[key], key, layers[name].weight) for name, key in keys.items()
        ):
            return {name: found[key] for name, key in keys.items()}
    return None


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, for every safetensors file of a model's folder."""
    found = {}
    for path in sorted(folder.glob(f"{_WEIGHTS}*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _equal(path: Path, key: str, weight: torch.Tensor) -> bool:
    with safe_open(path, "pt") as file:
        stored = file.get_tensor(key)
    return torch.equal(stored.to(weight.dtype), weight.detach().to("cpu"))


def _read(originals: Originals) -> dict[str, torch.Tensor]:
    weights = {}
    for name, layer in originals.layers.items():
        path, key = originals.files[name], _key(name)
        try:
            with safe_open(path, "pt") as file:
                stored = file.get_tensor(key)
        except (OSError, KeyError) as error:
            raise RuntimeError(
                f"{key} cannot be read from {path} any more ({error}); load the pipeline again "
                "with from_pretrained"
            ) from None
        if stored.shape != layer.weight.shape:
            raise RuntimeError(
                f"{key} in {path} has shape {list(stored.shape)} now, it was "
                f"{list(layer.weight.shape)}; load the pipeline again with from_pretrained"
            )
        # a copy of our own: the file's mapping is neither aligned nor ours to keep
        weights[name] = stored.to(layer.weight.dtype, copy=True)
    return weights
