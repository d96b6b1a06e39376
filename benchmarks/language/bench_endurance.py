"""A server under many clients for some minutes: errors, growth of memory, the same answers after.

64 clients stream answers from ``vllm serve``; a third of them close the connection in the middle of
every answer. Memory is the anonymous memory of all processes of the server; the first minute is not
counted, and a line is fitted to the rest. Greedy answers, one request at a time, are compared by
tokens and log-probabilities before and after. A server in 16 bit is the control.

    python -m benchmarks.language.bench_endurance [--seconds 300] [--clients 64]
"""

from __future__ import annotations

import argparse
import re
import tempfile
from operator import eq
from pathlib import Path
from typing import Any

import psutil

from demo.terminal import interrupt_on_signals

from ..lib.gate import golden_gate
from ..lib.harness import ROOT, Table, main
from ..lib.memory import MemorySeries, process_tree

Figures = dict[str, Any]

PACKAGES = ("torch", "vllm")
_WARM_UP_S = 60.0
_IDLE_S = 60.0
_SAMPLE_S = 1.0
_PROMPTS = 64
_PROMPT_CHARACTERS = (40, 300)
_ANSWERS = 16
_ANSWER_TOKENS = 64
_SHOWN_ERRORS = 10
_ARGUMENTS = ("--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager")
_FAULT = re.compile(r"^.*\bERROR\b.*|^Traceback.*", re.M)


def options(parser: argparse.ArgumentParser) -> None:
    """How long, and how many clients."""
    parser.add_argument("--seconds", type=float, default=300, help="measured, for each server")
    parser.add_argument("--clients", type=int, default=64, help="connections at once")


def measure(seconds: float, clients: int) -> Figures:
    """For each way to serve the shipped model: traffic, growth of memory, answers compared."""
    # here, because rendering the tables needs none of it
    from .checkpoints import convert
    from .served_models import DEMO, FORMATS

    with tempfile.TemporaryDirectory(prefix="bench-endurance-") as directory:
        packed = Path(directory, "packed")
        convert(DEMO, packed)
        method = FORMATS["w4a4"].method
        assert method is not None
        ways = {
            "W4A4, packed": (packed, ()),
            "W4A4, packed while loading": (DEMO, ("--quantization", method)),
            "bfloat16, the control": (DEMO, ()),
        }
        served = {
            name: _serve(model, Path(directory, f"{number}.log"), arguments, seconds, clients)
            for number, (name, (model, arguments)) in enumerate(ways.items())
        }
    packed_answers, online_answers, _ = (row.pop("answers") for row in served.values())
    return {
        "clients": clients,
        "seconds": seconds,
        "warm_up_s": _WARM_UP_S,
        "arguments": list(_ARGUMENTS),
        "packed_equals_online": sum(map(eq, packed_answers, online_answers)),
        "served": served,
    }


def _serve(
    model: Path, log: Path, arguments: tuple[str, ...], seconds: float, clients: int
) -> Figures:
    """The figures of one server, from its start to its end."""
    from .measured_server import MeasuredServer
    from .soak import Load, answers, slope, soak, unfinished

    prompts = _prompts()
    load = Load(prompts, clients=clients, seconds=_WARM_UP_S + seconds)
    with MeasuredServer(model, log, [*_ARGUMENTS, *arguments], {}) as server:
        server.wait_until_ready()
        url = f"http://127.0.0.1:{server.port}"
        asked = prompts[:_ANSWERS]
        before = answers(url, asked, "before", _ANSWER_TOKENS)
        with MemorySeries(server.pid, interval_s=_SAMPLE_S) as memory:
            traffic = soak(url, load)
        left = unfinished(url, _IDLE_S)
        after = answers(url, asked, "after", _ANSWER_TOKENS)
        processes = process_tree(server.pid)
        # here: what a signal interrupts may write a traceback when the server is stopped
        logged = _FAULT.findall(log.read_text(encoding="utf-8", errors="replace"))
    begin = memory.seconds[0]
    kept = [
        (second - begin, size)
        for second, size in zip(memory.seconds, memory.sizes, strict=True)
        if _WARM_UP_S <= second - begin <= _WARM_UP_S + seconds
    ]
    per_second, error = slope(*zip(*kept, strict=True))
    return {
        "whole": traffic.whole,
        "left_early": traffic.left,
        "errors": len(traffic.errors),
        "first_errors": traffic.errors[:_SHOWN_ERRORS],
        "tokens": traffic.tokens,
        "slope_mb_per_min": per_second * 60 / 1e6,
        "slope_standard_error": error * 60 / 1e6,
        "memory_mb": [kept[0][1] / 1e6, kept[-1][1] / 1e6],
        "samples": len(kept),
        "unfinished_requests": left,
        "same_answers": sum(b == a for b, a in zip(before, after, strict=True)),
        "asked": len(asked),
        "answers": before,
        "logged_errors": len(logged),
        "first_logged_errors": logged[:_SHOWN_ERRORS],
        "processes_left": sum(map(_is_running, processes)),
    }


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _prompts() -> list[str]:
    """Pieces of the held-out text, of different lengths."""
    text = (ROOT / "demo" / "heldout.txt").read_text(encoding="utf-8")
    shortest, longest = _PROMPT_CHARACTERS
    step = len(text) // _PROMPTS
    lengths = [shortest + (longest - shortest) * i // (_PROMPTS - 1) for i in range(_PROMPTS)]
    return [text[i * step : i * step + length] for i, length in enumerate(lengths)]


def tables(figures: Figures) -> dict[str, Table]:
    """``soak``: traffic, memory and answers of every server."""
    rows = [
        [
            "served as",
            "whole answers",
            "clients left",
            "errors",
            "memory, MB/min",
            "of",
            "same answers after",
        ]
    ]
    for name, row in figures["served"].items():
        rows.append(
            [
                name,
                f"{row['whole']:,}",
                f"{row['left_early']:,}",
                str(row["errors"] + row["logged_errors"]),
                f"{row['slope_mb_per_min']:+.2f} ± {row['slope_standard_error']:.2f}",
                f"{row['memory_mb'][1]:,.0f} MB",
                f"{row['same_answers']} of {row['asked']}",
            ]
        )
    return {"soak": rows}


if __name__ == "__main__":
    interrupt_on_signals()
    main(golden_gate, measure, options)
