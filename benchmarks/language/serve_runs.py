"""One server at a time under ``vllm bench``: start, watch, send, read what vLLM says of itself.

Everything stays on the loopback interface. ``vllm bench serve`` runs in this process, by vLLM's own
parser and function, because importing vLLM again for every run takes longer than many a run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from demo.language.server import Server, serve_environment

from ..lib.harness import ROOT
from ..lib.memory import PeakMemory
from .serve_models import Format, Load, Shape

__all__ = [
    "SLOW_LOAD",
    "DeviceMemory",
    "MeasuredServer",
    "client_arguments",
    "device_bytes",
    "offline_arguments",
    "peak_bytes",
    "read_client",
    "read_log",
    "read_offline",
    "refusal",
    "run_client",
    "run_offline",
    "server_arguments",
    "shown_command",
    "warmup",
    "watch",
]

SLOW_LOAD = Load(at_once=1, prompts=1, input_tokens=8, output_tokens=3)
_WARMUP_TOKENS = 2
_BURST_S = 1e-4
"""No model computes a token in so little time."""
_KILL_SECONDS = 10
_BATCHED_TOKENS = 512
"""On a CPU vLLM warms up with as many tokens, which takes the torch path a minute at its 4096."""
_VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
"""`vllm`, also where its command is not beside Python."""

_CORES = re.compile(r"core ids=\[([\d, ]*)\]")
_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_KV_GIB = re.compile(
    r"Available KV cache memory: ([\d.]+) GiB|\(([\d.]+)/[\d.]+\) GiB for KV cache"
)
_MODEL_GIB = re.compile(r"Model loading took ([\d.]+) GiB")
_ENDED = re.compile(r"vllm serve ended with status -?\d+(?: \((.*)\))?")
_PATH = re.compile(r"(?<![\w.:/])~?/[A-Za-z][^\s'\",;)]*")


class MeasuredServer(Server):
    """A server with an environment of its own, whose processes can be watched.

    Args:
        model: directory of the checkpoint.
        log: file that receives the server's output.
        arguments: further arguments of ``vllm serve``.
        environment: variables beside those of every server.
    """

    def __init__(
        self, model: Path, log: Path, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        super().__init__(model, log, *arguments)
        self._command = [*_VLLM, *self._command[1:]]
        self._environment = _environment(environment)

    @property
    def pid(self) -> int:
        """The process that started all others of the server."""
        return self._process.pid

    def __enter__(self) -> MeasuredServer:
        before = dict(os.environ)
        os.environ.update(self._environment)
        try:
            super().__enter__()
        finally:
            os.environ.clear()
            os.environ.update(before)
        return self


@dataclass
class DeviceMemory(PeakMemory):
    """The same of a GPU, whoever uses it.

    Attributes:
        before: bytes in use on it before the server was started; not counted.
        used: the largest amount beyond that, in bytes.
    """

    before: int = 0
    used: int = 0

    def sample(self) -> None:
        """Take one sample now."""
        self.used = max(self.used, device_bytes() - self.before)
        self.samples += 1


def watch(pid: int, before: int) -> PeakMemory:
    """A watch over the GPU's memory where there is one, else over a process tree's.

    Args:
        pid: root of the tree.
        before: `device_bytes` before it was started.
    """
    if torch.cuda.is_available():
        return DeviceMemory(pid, before=before)
    return PeakMemory(pid, interval_s=0.5)  # one sample of a large process takes 0.05 s


def peak_bytes(watched: PeakMemory) -> int:
    """What a watch has seen: bytes of the GPU, or of the process tree (PSS)."""
    return watched.used if isinstance(watched, DeviceMemory) else watched.pss


def device_bytes() -> int:
    """Bytes in use on the GPU; 0 where there is none."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


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
    return arguments


def client_arguments(model: str, port: str, load: Load, seed: str) -> list[str]:
    """For ``vllm bench serve``: random prompts, the same for the same seed."""
    return [
        *("--host", "127.0.0.1", "--port", port, "--model", model),
        *("--dataset-name", "random", "--seed", seed),
        *("--random-input-len", str(load.input_tokens)),
        *("--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(load.prompts), "--max-concurrency", str(load.at_once)),
        *("--temperature", "0", "--ignore-eos", "--disable-tqdm", "--save-detailed"),
    ]


def offline_arguments(
    kind: str, model: str, shape: Shape, form: Format, eager: bool, result: str
) -> list[str]:
    """For ``vllm bench latency`` or ``throughput``, which start an engine of their own."""
    single, many = shape.loads["single"], shape.loads["many"]
    arguments = ["--model", model, "--output-json", result, *server_arguments(shape, form, eager)]
    if kind == "latency":
        return [
            *arguments,
            *("--batch-size", str(single.at_once), "--num-iters-warmup", "1", "--num-iters", "3"),
            *("--input-len", str(single.input_tokens), "--output-len", str(single.output_tokens)),
        ]
    return [
        *arguments,
        *("--dataset-name", "random", "--num-prompts", str(many.prompts)),
        *("--random-input-len", str(many.input_tokens)),
        *("--random-output-len", str(many.output_tokens)),
    ]


def shown_command(subcommand: str, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command line as it is told in a result."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    return " ".join([*variables, "vllm", subcommand, *arguments])


def warmup(load: Load) -> Load:
    """One request for each place of a load, with short answers."""
    return replace(load, prompts=load.at_once, output_tokens=_WARMUP_TOKENS)


def run_client(model: Path, port: int, load: Load, seed: int) -> dict[str, float]:
    """Run ``vllm bench serve`` and return its figures, see :func:`read_client`."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    arguments = parser.parse_args(client_arguments(str(model), str(port), load, str(seed)))
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        return read_client(serve.main(arguments), load)


def read_client(result: Mapping[str, Any], load: Load) -> dict[str, float]:
    """The figures of one run.

    Returns:
        ttft_ms: time to the first message of an answer; tpot_ms: time per token after it; both
        medians over the requests. burst_share: of the messages after the first, those that came
        right behind another. output_tokens_per_s: of all requests together.

    Raises:
        RuntimeError: if a request failed, or was answered with another number of tokens.
    """
    wanted = (load.prompts, load.prompts * load.output_tokens)
    found = (result["completed"], result["total_output_tokens"])
    if found != wanted:
        raise RuntimeError(
            f"{found[0]} of {wanted[0]} requests were answered, with {found[1]} tokens instead of "
            f"{wanted[1]}"
        )
    intervals = [seconds for answer in result["itls"] for seconds in answer]
    return {
        "ttft_ms": float(result["median_ttft_ms"]),
        "tpot_ms": float(result["median_tpot_ms"]),
        "burst_share": sum(seconds < _BURST_S for seconds in intervals) / max(1, len(intervals)),
        "output_tokens_per_s": float(result["output_throughput"]),
    }


def read_log(text: str) -> dict[str, Any]:
    """What a server's log says of itself; None for what it does not say on this platform.

    Returns:
        cores: on which the worker computes. kv_cache_tokens, kv_cache_gib: room of the KV cache.
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


def run_offline(
    kind: str, model: Path, shape: Shape, form: Format, eager: bool, folder: Path
) -> float:
    """Run ``vllm bench latency`` or ``throughput``.

    Returns:
        latency: seconds of one request, median over its iterations; throughput: output tokens per
        second.

    Raises:
        RuntimeError: if it fails.
    """
    result = folder / f"{kind}.json"
    arguments = offline_arguments(kind, str(model), shape, form, eager, str(result))
    log = folder / f"{kind}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_VLLM, "bench", kind, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**serve_environment(), **_environment(form.environment)},
            start_new_session=True,  # its workers too can then be stopped as one group
        )
        try:
            status = process.wait()
        finally:
            _kill_group(process)
    if status:
        end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"vllm bench {kind} ended with status {status}:\n{end}")
    return read_offline(kind, json.loads(result.read_text(encoding="utf-8")), shape.loads["many"])


def read_offline(kind: str, result: Mapping[str, Any], many: Load) -> float:
    """The figure of ``vllm bench latency`` or ``throughput``, see :func:`run_offline`."""
    if kind == "latency":
        latencies = sorted(result["latencies"])
        return float(latencies[len(latencies) // 2])
    return float(result["num_requests"] * many.output_tokens / result["elapsed_time"])


def _environment(further: Mapping[str, str]) -> dict[str, str]:
    """`further`, the log that is read, and a PYTHONPATH without the repository, see `_VLLM`."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [folder for folder in folders if folder and Path(folder).resolve() != ROOT]
    return {"VLLM_LOGGING_LEVEL": "INFO", **further, "PYTHONPATH": os.pathsep.join(kept)}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process's group and wait until it is gone."""
    deadline = time.monotonic() + _KILL_SECONDS
    try:
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()
            time.sleep(0.05)
    except ProcessLookupError:
        return
