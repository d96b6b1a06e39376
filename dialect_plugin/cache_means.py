"""Means of keys and values in a checkpoint, which a 4-bit KV cache subtracts before it rounds.

Section 12 of the format (ours): bfloat16 [heads of keys and values, D], stored behind the name of
an attention module.
"""

from __future__ import annotations

from typing import Final

__all__ = ["KEY_MEAN", "MEANS_FILE", "VALUE_MEAN", "attention_of"]

MEANS_FILE: Final = "kv_cache_means.safetensors"
"""The file of a packed checkpoint that holds all of them."""
KEY_MEAN: Final = "k_mean"
VALUE_MEAN: Final = "v_mean"


def attention_of(tensor: str) -> tuple[str, str] | None:
    """The attention module and which of its means a tensor is; None if it is none."""
    module, _, leaf = tensor.rpartition(".")
    return (module, leaf) if module and leaf in (KEY_MEAN, VALUE_MEAN) else None
