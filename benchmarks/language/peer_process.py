"""An engine's process, as :mod:`.bench_peers` drives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ..lib.harness import ROOT
from .peer_checkpoints import LLAMA_PYTHON

__all__ = ["EngineError", "EngineProcess"]

_STOP_SECONDS = 30
_MODULES = "benchmarks.language.engines"


class EngineError(RuntimeError):
    """An engine's process ended before it answered; the last lines of its log."""


class EngineProcess:
    """An engine with a loaded model, inside a ``with`` block.

    Args:
        engine: ``"llama"``, ``"transformers"`` or ``"vllm"``.
        model: its checkpoint's directory, or a GGUF file.
        options: see the engine's module.
        log: file that receives whatever it prints.
        variables: environment variables beside those of every engine.
    """

    def __init__(
        self,
        engine: str,
        model: Path,
        options: Mapping[str, Any],
        log: Path,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        python = str(LLAMA_PYTHON) if engine == "llama" else sys.executable
        module = f"{_MODULES}.{engine}_engine"
        self._command = [python, "-m", module, str(model), json.dumps(options)]
        self._variables = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(options["threads"]),
            **(variables or {}),
        }
        self._log = log

    def __enter__(self) -> EngineProcess:
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=os.environ | self._variables,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()  # it ends at the end of its calls
        try:
            self._process.wait(0 if error else _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def description(self) -> dict[str, Any]:
        """What the engine says of itself once it has loaded the model.

        Raises:
            EngineError: if it cannot load it.
        """
        return self._answer()

    def seconds(self, prompt: Sequence[int], tokens: int) -> tuple[list[float], int]:
        """Seconds until the first token, then of each further one; peak memory so far, in bytes."""
        found = self._call(call="generate", prompt=list(prompt), tokens=tokens)
        return found["seconds"], found["peak_bytes"]

    def write_logits(self, windows: Sequence[Sequence[int]], folder: Path) -> None:
        """Write ``NUMBER.npy`` for each window: float32 [T or T - 1, V]."""
        self._call(call="logits", windows=[list(w) for w in windows], folder=str(folder))

    def _call(self, **call: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says why
            print(json.dumps(call), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            if status < 0:
                raise EngineError(f"its process was ended by {signal.Signals(-status).name}")
            text = self._log.read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if "Error" in line] or text.splitlines()
            raise EngineError(lines[-1] if lines else "its process ended without a word")
        answer: dict[str, Any] = json.loads(line)
        return answer
