"""Where the 16-bit weights wait while a transformer is quantized, so that ``disable`` is exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from .layouts import without_adapters

__all__ = ["Originals", "keep_nowhere", "keep_on_disk", "keep_on_host", "source_folder"]

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


def keep_on_host(layers: Mapping[str, nn.Linear]) -> Originals:
    """Keep the weights in host memory."""
    devices = {name: layer.weight.device for name, layer in layers.items()}
    for layer in layers.values():
        if layer.weight.device.type != "cpu":
            layer.weight.data = layer.weight.data.to("cpu")
    return Originals("host", dict(layers), devices)


def keep_nowhere(layers: Mapping[str, nn.Linear]) -> Originals:
    """Keep the layers without their weights."""
    return _without_weights("none", layers)


def keep_on_disk(layers: Mapping[str, nn.Linear], folder: Path) -> Originals | None:
    """Keep the name of each weight's file, if the file holds exactly what is in memory.

    Args:
        layers: the layers.
        folder: where the model was loaded from.

    Returns:
        None if a weight is not there or differs from the one in memory (a LoRA was fused).
    """
    found = _files(folder)
    for name, layer in layers.items():
        key = _key(name)
        if key not in found or not _equal(found[key], key, layer.weight):
            return None
    originals = _without_weights("disk", layers)
    originals.files = {name: found[_key(name)] for name in layers}
    return originals


def source_folder(module: nn.Module) -> Path | None:
    """The folder a diffusers model was loaded from, or None."""
    config = getattr(module, "config", None)
    path = getattr(config, "_name_or_path", None) if config is not None else None
    if not path or not Path(path).is_dir():
        return None
    return Path(path)


def _key(name: str) -> str:
    return f"{without_adapters(name)}.weight"


def _without_weights(place: str, layers: Mapping[str, nn.Linear]) -> Originals:
    devices = {name: layer.weight.device for name, layer in layers.items()}
    for layer in layers.values():
        empty = torch.empty_like(layer.weight, device="meta")
        layer.weight = nn.Parameter(empty, requires_grad=layer.weight.requires_grad)
    return Originals(place, dict(layers), devices)


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
