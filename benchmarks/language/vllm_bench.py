"""``vllm bench``: its command lines, its runs, and the figures of their results.

Everything stays on the loopback interface. ``vllm bench serve`` runs in this process, by vLLM's own
parser and function, because importing vLLM again for every run takes longer than many a run.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo.language.server import serve_environment

from .measured_server import VLLM, server_arguments
from .served_models import Format, Load, Shape

__all__ = [
    "client_arguments",
    "offline_arguments",
    "run_client",
    "run_offline",
    "shown_command",
    "warmup",
]

_WARMUP_TOKENS = 2
_BURST_S = 1e-4
"""No model computes a token in so little time."""
_KILL_SECONDS = 10


def client_arguments(model: str, port: str, load: Load, seed: str) -> list[str]:
    """Arguments of ``vllm bench serve``: random prompts, the same for the same seed."""
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
    """Arguments of ``vllm bench latency`` or ``throughput``, which start their own engine."""
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
    """A command line as a result shows it."""
    assignments = [f"{name}={value}" for name, value in environment.items()]
    words = map(shlex.quote, arguments)
    return " ".join([*assignments, "vllm", subcommand, *words])


def warmup(load: Load) -> Load:
    """A load of one short answer for each request that `load` sends at the same time."""
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
            [*VLLM, "bench", kind, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**serve_environment(), **form.environment},
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
