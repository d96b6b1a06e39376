"""Recorded second moments: a folder of safetensors files and a list of what is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dialect_kernels.second_moments import SecondMoments

from ..config import ConfigError
from .recorder import Inputs

__all__ = ["read", "write"]

_LIST = "moments.json"
_VERSION = 1
_NAME = "sums"


def write(folder: Path, found: Iterable[Inputs]) -> None:
    """Write inputs as they come, one file each; the list comes last.

    Raises:
        ConfigError: if the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"folder: {str(folder)!r} is not empty; give another one")
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, inputs in enumerate(found):
        moments = inputs.moments
        assert moments is not None
        file = f"moments-{number:05d}.safetensors"
        save_file({_NAME: moments.flat().cpu()}, folder / file)
        listed.append(
            {
                "layers": inputs.layers,
                "columns": len(moments),
                "tokens": moments.tokens,
                "file": file,
            }
        )
    text = json.dumps({"format_version": _VERSION, "inputs": listed}, indent=1)
    whole = folder / f"{_LIST}.new"
    with whole.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    whole.replace(folder / _LIST)


def read(folder: Path, layers: Mapping[str, nn.Linear]) -> Iterator[Inputs]:
    """The recorded inputs of some layers, on their devices.

    Raises:
        ConfigError: if the folder cannot be read, or is that of another model.
    """
    listed = _listed(folder)
    if not any(name in layers for entry in listed for name in entry["layers"]):
        some = listed[0]["layers"][0] if listed else "nothing"
        raise ConfigError(
            f"calibrate: {str(folder)!r} holds second moments of other layers ({some}); record "
            "those of this model"
        )
    for entry in listed:
        own = [name for name in entry["layers"] if name in layers]
        if not own:
            continue
        columns = {layers[name].in_features for name in own}
        if columns != {entry["columns"]}:
            raise ConfigError(
                f"calibrate: {own[0]} has {layers[own[0]].in_features} columns, and "
                f"{str(folder)!r} holds second moments of {entry['columns']}; record those of this "
                "model"
            )
        try:
            with safe_open(folder / entry["file"], "pt") as file:
                sums = file.get_tensor(_NAME)
            sums = sums.to(layers[own[0]].weight.device)
            moments = SecondMoments.from_flat(entry["columns"], sums, entry["tokens"])
        except (OSError, SafetensorError, ValueError) as error:
            raise _damaged(folder, error) from None
        if not moments.isfinite():
            raise _damaged(folder, f"{entry['file']} holds NaN or Inf")
        yield Inputs(own, moments)


def _listed(folder: Path) -> list[dict[str, Any]]:
    """What the folder holds, checked."""
    try:
        found = json.loads((folder / _LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from None
    version = found.get("format_version") if isinstance(found, dict) else None
    if version != _VERSION:
        raise _damaged(folder, f"format_version is {version}, not {_VERSION}")
    listed = found.get("inputs")
    kinds = {"layers": list, "columns": int, "tokens": int, "file": str}
    fine = isinstance(listed, list) and all(
        isinstance(entry, dict) and all(type(entry.get(k)) is kind for k, kind in kinds.items())
        for entry in listed
    )
    if not fine:
        raise _damaged(folder, f"{_LIST} does not list inputs")
    return list(listed)


def _damaged(folder: Path, why: object) -> ConfigError:
    return ConfigError(
        f"calibrate: {str(folder)!r} is not a folder of recorded second moments ({why}); give a "
        "list of prompts, or record them again"
    )
