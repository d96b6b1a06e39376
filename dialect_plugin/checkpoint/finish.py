"""Completing a new checkpoint once its shards are written: everything else, config.json last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .companions import Companions, without_local_code
from .json_files import read_json
from .reader import CONFIG, INDEX, Checkpoint
from .writer import write_file, write_text

__all__ = ["finish_checkpoint"]


def finish_checkpoint(
    source: Checkpoint,
    destination: Path,
    stored: Mapping[str, tuple[str, int]],
    card: str,
    companions: Companions,
    quantization_config: Mapping[str, Any],
) -> int:
    """Write everything but the shards; a directory without config.json is no checkpoint yet.

    An index is written where the source has one. Entries of ``auto_map`` that point to Python files
    of the source are left out, because those are never copied.

    Args:
        source: the checkpoint that was converted.
        destination: directory that holds the shards.
        stored: tensor -> (shard, bytes).
        card: text of README.md.
        companions: files beside the weights that are copied.
        quantization_config: the entry of config.json, in place of the source's.

    Returns:
        The bytes of all tensors together.
    """
    total = sum(nbytes for _, nbytes in stored.values())
    for name in companions.copied:
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(name) in companions.code:
            write_text(target, _json_text(without_local_code(read_json(source.path / name))))
        else:
            write_file(target, partial(shutil.copyfile, source.path / name))
    write_text(destination / "README.md", card)
    if (source.path / INDEX).exists():
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: shard for name, (shard, _) in sorted(stored.items())},
        }
        write_text(destination / INDEX, _json_text(index))
    config = dict(without_local_code(source.config))
    config["quantization_config"] = dict(quantization_config)
    write_text(destination / CONFIG, _json_text(config))
    return total


def _json_text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
