"""Completing a new checkpoint once its shards are written: everything else, config.json last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .reader import CONFIG, INDEX, Checkpoint
from .writer import copied_files, write_file, write_text

__all__ = ["finish_checkpoint"]


def finish_checkpoint(
    source: Checkpoint,
    destination: Path,
    stored: Mapping[str, tuple[str, int]],
    card: str,
    quantization_config: Mapping[str, Any],
) -> int:
    """Write everything but the shards; a directory without config.json is no checkpoint yet.

    The tokenizer and licence files are copied, and an index is written where the source has one.

    Args:
        source: the checkpoint that was converted.
        destination: directory that holds the shards.
        stored: tensor -> (shard, bytes).
        card: text of README.md.
        quantization_config: the entry of config.json, in place of the source's.

    Returns:
        The bytes of all tensors together.
    """
    total = sum(nbytes for _, nbytes in stored.values())
    for file in copied_files(source.path):
        write_file(destination / file.name, partial(shutil.copyfile, file))
    write_text(destination / "README.md", card)
    if (source.path / INDEX).exists():
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: shard for name, (shard, _) in sorted(stored.items())},
        }
        write_text(destination / INDEX, json.dumps(index, indent=2) + "\n")
    config = dict(source.config)
    config.pop("auto_map", None)  # names Python files, which are never copied
    config["quantization_config"] = dict(quantization_config)
    write_text(destination / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return total
