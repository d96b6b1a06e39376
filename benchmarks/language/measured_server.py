"""A server under measurement: its arguments, its environment, and what vLLM's log says of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from demo.language.server import Server

from .served_models import Format, Shape

__all__ = ["VLLM", "MeasuredServer", "read_log", "refusal", "server_arguments"]

VLLM = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]
"""`vllm`, also where its command is not beside Python; from any directory, as the command is."""

_VOCABULARY = json.dumps({"embeddings": True, "lm_head": True})
_BATCHED_TOKENS = 512
"""On a CPU vLLM warms up with as many tokens, which takes the torch path a minute at its 4096."""

_CORES = re.compile(r"core ids=\[([\d, ]*)\]")
_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_KV_GIB = re.compile(
    r"Available KV cache memory: ([\d.]+) GiB|\(([\d.]+)/[\d.]+\) GiB for KV cache"
)
_MODEL_GIB = re.compile(r"Model loading took ([\d.]+) GiB")
_ENDED = re.compile(r"vllm serve ended with status -?\d+(?: \((.*)\))?")
_PATH = re.compile(r"(?<![\w.:/])~?/[A-Za-z][^\s'\",;)]*")


class MeasuredServer(Server):
    """A server with its own environment variables, whose processes can be watched.

    Args:
        model: directory of the checkpoint.
        log: file that receives the server's output; `read_log` reads it.
        arguments: further arguments of ``vllm serve``.
        variables: environment variables beside those of every server.
    """

    def __init__(
        self, model: Path, log: Path, arguments: Sequence[str], variables: Mapping[str, str]
    ) -> None:
        needed_by_log = {"VLLM_LOGGING_LEVEL": "INFO"}
        super().__init__(model, log, *arguments, variables=needed_by_log | dict(variables))
        self._command = [*VLLM, *self._command[1:]]

    @property
    def pid(self) -> int:
        """The process that started all others of this server."""
        return self._process.pid


def server_arguments(shape: Shape, form: Format, eager: bool) -> list[str]:
    """For ``vllm serve MODEL``; the same for all formats, but for the format."""
    arguments = ["--dtype", "bfloat16", "--max-model-len", str(shape.context)]
    # the same prompt in two runs would be half an answer already
    arguments.append("--no-enable-prefix-caching")
    if not torch.cuda.is_available():
        arguments += ["--max-num-batched-tokens", str(_BATCHED_TOKENS)]
    if eager:
        arguments.append("--enforce-eager")
    if shape.weights == "dummy":
        arguments += ["--load-format", "dummy"]
    if form.method is not None:
        arguments += ["--quantization", form.method]
    if form.vocabulary:
        arguments += ["--hf-overrides", json.dumps({"quantization_config_dict_json": _VOCABULARY})]
    return arguments


def read_log(text: str) -> dict[str, Any]:
    """Figures in a server's log; None for those that vLLM does not log on this platform.

    Returns:
        cores: on which the worker computes. kv_cache_tokens, kv_cache_gib: size of the KV cache.
        model_gib: memory that loading the model took.
    """
    cores, tokens = _CORES.search(text), _KV_TOKENS.search(text)
    room, model = _KV_GIB.search(text), _MODEL_GIB.search(text)
    return {
        "cores": len(cores[1].split(",")) if cores and cores[1] else None,
        "kv_cache_tokens": int(tokens[1].replace(",", "")) if tokens else None,
        "kv_cache_gib": float(room[1] or room[2]) if room else None,
        "model_gib": float(model[1]) if model else None,
    }


def refusal(error: str) -> str:
    """Why a server did not start, as one sentence without a path, from a ServerError's text."""
    first = error.partition("; the end of ")[0].partition("\n")[0]
    ended = _ENDED.fullmatch(first)
    reason = ended[1] if ended and ended[1] else first
    return _PATH.sub("PATH", reason.removesuffix("Reasons: ")).strip()
