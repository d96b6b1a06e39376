"""How an engine's process is driven: a line of JSON for each call, and one for its answer.

Needs no package but numpy, because some engines live in environments of their own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

__all__ = ["Engine", "serve"]


class Engine(Protocol):
    """A loaded model, which answers greedily and keeps nothing between two calls."""

    def describe(self) -> dict[str, Any]:
        """``engine``: name and version; ``threads``: how many compute."""
        ...

    def generate(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        """The next tokens of a prompt, each as soon as it is known."""
        ...

    def logits(self, window: Sequence[int]) -> np.ndarray:
        """float32 [T, V]: what follows each token of a window."""
        ...


def serve(load: Callable[[str, dict[str, Any]], Engine]) -> None:
    """Load the model that the command line names, and answer calls until there are no more.

    Args:
        load: makes the engine of the path of a model and of options.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever engines print goes to their log
    path, options = sys.argv[1:]
    engine = load(path, json.loads(options))
    print(json.dumps(engine.describe() | peak_memory()), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(engine, json.loads(line))), file=answers, flush=True)


def _answer(engine: Engine, call: dict[str, Any]) -> dict[str, Any]:
    if call["call"] == "generate":
        return {"seconds": timed(engine, call["prompt"], call["tokens"])} | peak_memory()
    for number, window in enumerate(call["windows"]):
        np.save(Path(call["folder"], f"{number}.npy"), engine.logits(window))
    return {}


def timed(engine: Engine, prompt: Sequence[int], tokens: int) -> list[float]:
    """Seconds until the first token was known, then between each token and the one before it.

    Raises:
        RuntimeError: if the engine gives another number of tokens.
    """
    clock = [perf_counter()]
    clock.extend(perf_counter() for _ in engine.generate(prompt, tokens))
    if len(clock) != tokens + 1:
        raise RuntimeError(f"{len(clock) - 1} tokens were generated instead of {tokens}")
    return [after - before for before, after in pairwise(clock)]


def peak_memory() -> dict[str, int]:
    """``peak_bytes``: the largest resident set of this process so far, its libraries included."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return {"peak_bytes": 1024 * int(line.split()[1])}
    raise RuntimeError("/proc/self/status states no VmHWM: peak memory needs Linux")
