"""What is wrong with a checkpoint that transformers loads: one sentence each."""

from __future__ import annotations

from typing import Any

from ..checkpoint.reader import CheckpointError

__all__ = ["AGAIN", "ELSEWHERE", "missing", "wrong_shape"]

AGAIN = "convert the model again"
ELSEWHERE = "serve the checkpoint with vLLM, or convert the model with this layer in 16 bit"


def missing(name: str) -> CheckpointError:
    """A tensor is not there."""
    return CheckpointError(f"{name}: the checkpoint does not hold it; {AGAIN}")


def wrong_shape(name: str, found: Any, needed: Any) -> CheckpointError:
    """A tensor has another shape than the model's."""
    return CheckpointError(
        f"{name}: the checkpoint's tensor is {list(found)} where transformers' model needs "
        f"{list(needed)}; config.json belongs to another model: copy it and the weights again"
    )
