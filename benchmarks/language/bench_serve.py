"""Served models under vLLM's own benchmark: bf16, BlockDialect, and vLLM's other formats.

One ``vllm serve`` runs at a time, and ``vllm bench serve`` sends it random prompts: one request
after the other (*single*), then several at once (*many*). In every round each format's server is
started anew, so that a change of the machine's pace meets all of them; all get the same prompts.
Formats that vLLM does not serve on a platform stand in the tables with its reason. ``--offline``
adds ``vllm bench latency`` and ``throughput``, which start engines of their own.

On a CPU the models are LLaMA-3.2-1B's shape and the shipped LLaMA, and the plugin's torch path
answers one short request; models run eagerly there, because compiling takes longer than all
requests together (``--no-eager`` compiles them). On a GPU the model is LLaMA-3-8B's shape,
compiled; starting takes long there, so that a server is started once and measured several times. A
server that would not be done ``--minutes`` after the command's beginning is not started: rounds are
left out then, and formats if need be.

    python -m benchmarks.language.bench_serve [--shape demo] [--formats bf16 w4a4] [--minutes 60]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from demo.language.server import ServerError, serve_environment
from demo.terminal import interrupt_on_signals
from dialect_plugin.checkpoint.reader import PACKED_SUFFIXES, open_packed

from ..lib.gate import golden_faults
from ..lib.harness import Table, main
from .checkpoints import convert
from .measured_server import MeasuredServer, server_arguments
from .serve_rounds import OFFLINE, Session, loads_of
from .served_models import DEMO, FORMATS, SHAPES, layer_bytes
from .vllm_bench import client_arguments, offline_arguments, shown_command

Figures = dict[str, Any]

PACKAGES = ("torch", "vllm")
GOAL_SHAPE = "llama-3.2-1b"

_PROMPT = "def read_"
_ANSWER_TOKENS = 24
_GATE_ARGUMENTS = (
    *("--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(256 << 20)),
)
"""Eager: compiling takes longer than one answer; a small cache: these servers run together."""
_MINUTES = {"cpu": 25.0, "cuda": 7.0}
"""On a GPU the step `serve` of a session, which ends after eight."""
_SHOWN_ENVIRONMENT = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")
_LARGEST_BURST_SHARE = 0.05
_NOTHING = "–"
_REFUSED = "not served"


def gate() -> list[str]:
    """Faults of the golden vectors, of the count of bytes, and of the servers' answers.

    A packed checkpoint and a 16-bit one that is quantized while it loads must give the same answer,
    token by token; on a CPU so must the torch path, and the log-probabilities must be equal.
    """
    faults = golden_faults(_device())
    if faults:
        return faults
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as directory:
        packed = Path(directory, "packed")
        convert(DEMO, packed)
        counted, stored = layer_bytes(SHAPES["demo"].model, FORMATS["w4a4"]), _stored(packed)
        if counted != stored:
            faults.append(f"quantized layers: {stored} bytes are stored, but {counted} counted")
        try:
            answers = _answers(packed, Path(directory))
        except ServerError as error:
            return [*faults, str(error)]
    return faults + different(answers)


def options(parser: argparse.ArgumentParser) -> None:
    """Models, formats, numbers of rounds, and a limit of time."""
    gpu = torch.cuda.is_available()
    shapes = ["llama-3-8b"] if gpu else [GOAL_SHAPE, "demo"]
    formats = [
        name for name, form in FORMATS.items() if not (gpu and (form.slow or form.vocabulary))
    ]
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, default=shapes, help="models, by their dimensions")
    add("--formats", nargs="+", choices=FORMATS, default=formats, help="in this order")
    add("--rounds", type=int, default=1 if gpu else 3, help="starts of every server")
    add("--repeats", type=int, default=3 if gpu else 1, help="runs of every load in a round")
    add("--eager", action=argparse.BooleanOptionalAction, default=not gpu, help="do not compile")
    add("--offline", action="store_true", help="also vllm bench latency and throughput")
    add(
        "--minutes",
        type=float,
        default=_MINUTES[_device()],
        help="start no server that would not be done so many minutes after the command began",
    )


def measure(
    shape: Sequence[str],
    formats: Sequence[str],
    rounds: int,
    repeats: int,
    eager: bool,
    offline: bool,
    minutes: float,
) -> Figures:
    """Per shape and format: times of every run, peak memory, figures of the log; the commands."""
    # the client's connections stay on this machine, whatever proxy the environment names
    os.environ.update(NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    environment = serve_environment()
    session = Session(formats, rounds, repeats, eager, offline, minutes)
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as directory:
        found = {key: session.measure_shape(SHAPES[key], Path(directory, key)) for key in shape}
    return {
        "device": _device(),
        "rounds": rounds,
        "repeats": repeats,
        "environment": {k: environment[k] for k in _SHOWN_ENVIRONMENT if k in environment},
        "commands": {key: commands(key, formats, eager, offline) for key in shape},
        "refused": session.refused,
        "shapes": found,
    }


def commands(shape: str, formats: Sequence[str], eager: bool, offline: bool) -> list[str]:
    """The command lines for a shape; words in capitals stand for parts that differ by run."""
    model = SHAPES[shape]
    lines = []
    for form in (FORMATS[key] for key in formats):
        arguments = ["MODEL", *server_arguments(model, form, eager)]
        lines.append(shown_command("serve", arguments, form.environment))
    loads = [load for key in formats for load in loads_of(model, FORMATS[key]).values()]
    for load in dict.fromkeys(loads):
        arguments = client_arguments("MODEL", "PORT", load, "RUN")
        lines.append(shown_command("bench serve", arguments, {}))
    for kind in OFFLINE if offline else ():
        form = FORMATS[formats[0]]
        arguments = offline_arguments(kind, "MODEL", model, form, eager, "FILE")
        lines.append(shown_command(f"bench {kind}", arguments, {}))
    return lines


def different(answers: dict[str, tuple[list[str], list[float]]]) -> list[str]:
    """Which answers differ from the first: their tokens, or on a CPU their log-probabilities."""
    (first, (tokens, logprobs)), *others = answers.items()
    faults = []
    for name, (other_tokens, other_logprobs) in others:
        if other_tokens != tokens:
            faults.append(f"{name} answers {''.join(other_tokens)!r}, {first} {''.join(tokens)!r}")
        elif _device() == "cpu" and other_logprobs != logprobs:
            faults.append(f"{name} and {first} give the same tokens other log-probabilities")
    return faults


def tables(figures: Figures) -> dict[str, Table]:
    """``single`` and ``many``: times; ``memory``; ``refused``; ``offline``; ``goals`` on a CPU.

    Medians over the runs of whole rounds. Ratios are taken run by run, the lowest and the highest
    stand beside their median; above 1 is better than bf16.
    """
    shapes = {name: _whole_rounds(shape) for name, shape in figures["shapes"].items()}
    figures = figures | {"shapes": shapes}
    found = {"single": _times(figures, "single"), "many": _times(figures, "many")}
    found["memory"] = _memory(figures)
    found["refused"] = [["format", "why it has no figures here"]]
    for key, reason in figures["refused"].items():
        found["refused"].append([FORMATS[key].name, reason.replace("|", "\\|")])
    if any("offline" in form for _, _, form in _rows(figures) if form):
        found["offline"] = _offline(figures)
    if figures["device"] == "cpu" and GOAL_SHAPE in figures["shapes"]:
        found["goals"] = _goals(figures["shapes"][GOAL_SHAPE])
    return found


def _whole_rounds(shape: Figures) -> Figures:
    """`shape` without the last round, if the limit of time cut it short for some formats."""
    formats = {key: dict(form) for key, form in shape["formats"].items()}
    for load in ("single", "many"):
        taken = [form for key, form in formats.items() if load in form and not FORMATS[key].slow]
        whole = min((len(form[load]["output_tokens_per_s"]) for form in taken), default=0)
        for form in taken:
            form[load] = {figure: values[:whole] for figure, values in form[load].items()}
    return shape | {"formats": formats}


def _rows(figures: Figures) -> list[tuple[Figures, str, Figures | None]]:
    """(shape, format, its figures, or None if it is refused), in the order of the tables."""
    return [
        (shape, key, shape["formats"].get(key))
        for shape in figures["shapes"].values()
        for key in FORMATS
        if key in shape["formats"] or key in figures["refused"]
    ]


def _times(figures: Figures, load: str) -> Table:
    rows = [["model", "format", "first token", "each further", "against bf16",
             "output tokens/s", "against bf16"]]  # fmt: skip
    for shape, key, form in _rows(figures):
        names = [shape["name"], FORMATS[key].name]
        if form is None:
            rows.append([*names, _REFUSED, *4 * [_NOTHING]])
        elif load in form:
            peer = None if key == "bf16" else shape["formats"].get("bf16", {}).get(load)
            taken = form[load]
            same_load = None if FORMATS[key].slow else peer
            rows.append([*names, *_latencies(taken, peer), *_rates(taken, same_load)])
    return rows


def _latencies(taken: Figures, peer: Figures | None) -> list[str]:
    if not is_streamed(taken):
        return 3 * [_NOTHING]
    times = [statistics.median(taken[figure]) for figure in ("ttft_ms", "tpot_ms")]
    against = _NOTHING
    if peer is not None and is_streamed(peer):
        against = _spread([a / b for a, b in _pairs(peer["tpot_ms"], taken["tpot_ms"])])
    return [*(f"{time:.3g} ms" if time < 100 else f"{time:.0f} ms" for time in times), against]


def _rates(taken: Figures, peer: Figures | None) -> list[str]:
    ours = taken["output_tokens_per_s"]
    rate = statistics.median(ours)
    against = _NOTHING
    if peer is not None:
        against = _spread([b / a for a, b in _pairs(peer["output_tokens_per_s"], ours)])
    return [f"{rate:.3g}" if rate < 100 else f"{rate:.0f}", against]


def is_streamed(taken: Figures) -> bool:
    """Whether each token was sent when it was computed, so that a message's time is its token's.

    Where computing keeps all cores busy, tokens pile up and a server sends several in one burst.
    """
    return max(taken["burst_share"]) < _LARGEST_BURST_SHARE


def _pairs(first: Sequence[float], second: Sequence[float]) -> list[tuple[float, float]]:
    """Run by run; of a slow format there is but one."""
    return list(zip(first, second, strict=False))


def _memory(figures: Figures) -> Table:
    gpu = figures["device"] == "cuda"
    rows = [["model", "format", "quantized layers", "against bf16", "ready after",
             "peak while starting", "peak while answering",
             "room for the KV cache" if gpu else "KV cache"]]  # fmt: skip
    for shape, key, form in _rows(figures):
        nbytes = shape["layer_bytes"][key]
        share = nbytes / shape["layer_bytes"]["bf16"]
        row = [shape["name"], FORMATS[key].name, f"{nbytes / 1e6:.1f} MB", f"{share:.3f} x"]
        if form is None:
            rows.append([*row, _REFUSED, *3 * [_NOTHING]])
            continue
        room, tokens = form["kv_cache_gib"][0], form["kv_cache_tokens"][0]
        rows.append(
            [
                *row,
                f"{statistics.median(form['start_s']):.0f} s",
                f"{max(form['peak_start_bytes']) / 2**30:.2f} GiB",
                f"{max(form['peak_answering_bytes']) / 2**30:.2f} GiB",
                _NOTHING if room is None else f"{room:g} GiB, {tokens:,} tokens",
            ]
        )
    return rows


def _offline(figures: Figures) -> Table:
    rows = [["model", "format", "`vllm bench latency`", "`vllm bench throughput`"]]
    for shape, key, form in _rows(figures):
        if form is None or "offline" not in form:
            continue
        taken = {kind: statistics.median(values) for kind, values in form["offline"].items()}
        latency = f"{taken['latency']:.2f} s" if "latency" in taken else _NOTHING
        throughput = f"{taken['throughput']:.1f} tokens/s"
        rows.append([shape["name"], FORMATS[key].name, latency, throughput])
    return rows


def _goals(shape: Figures) -> Table:
    """The CPU's goals at `GOAL_SHAPE`, with what was measured."""
    forms, size = shape["formats"], shape["layer_bytes"]
    rows = [["goal", "wanted", "measured"]]
    for key, own, peer, name, goal in (
        ("w4a4", "W4A4", "bf16", "bf16", "≥ 1.5 x"),
        ("w4a4", "W4A4", "w4a4-torch", "the torch path", "≥ 3 x"),
        ("w4a4-vocabulary", "W4A4 and vocabulary", "bf16", "bf16", "≥ 2.8 x"),
    ):
        if key in forms and peer in forms:
            pairs = _pairs(forms[peer]["single"]["tpot_ms"], forms[key]["single"]["tpot_ms"])
            median = statistics.median(theirs / ours for theirs, ours in pairs)
            what = f"decoded tokens/s of one request, {own} against {name}"
            rows.append([what, goal, f"{median:.2f} x"])
    for key in ("w4a4", "w4a8", "w4a16"):
        if key in forms and "many" in forms[key] and "many" in forms.get("bf16", {}):
            rates = [forms[name]["many"]["output_tokens_per_s"] for name in (key, "bf16")]
            median = statistics.median(ours / theirs for ours, theirs in _pairs(*rates))
            what = f"output tokens/s of eight requests at once, {key.upper()} against bf16"
            rows.append([what, "≥ 1.3 x", f"{median:.2f} x"])
    share = size["w4a4"] / size["bf16"]
    rows.append(["bytes of the quantized layers against bf16", "≤ 0.28 x", f"{share:.3f} x"])
    return rows


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


def _stored(packed: Path) -> int:
    """Bytes of the quantized layers of a packed checkpoint."""
    tensors = open_packed(packed).checkpoint.tensors
    return sum(info.nbytes for name, info in tensors.items() if name.endswith(PACKED_SUFFIXES))


def _answers(packed: Path, folder: Path) -> dict[str, tuple[list[str], list[float]]]:
    """The tokens, and their log-probabilities, with which each way of serving W4A4 answers."""
    quantized = ("--quantization", "blockdialect")
    ways: dict[str, tuple[Path, tuple[str, ...], dict[str, str]]] = {
        "the packed checkpoint": (packed, (), {}),
        "the 16-bit checkpoint": (DEMO, quantized, {}),
    }
    if _device() == "cpu":
        ways["the torch path"] = (DEMO, quantized, dict(FORMATS["w4a4-torch"].environment))
    answers = {}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                MeasuredServer(
                    model, folder / f"{name}.log", [*_GATE_ARGUMENTS, *arguments], environment
                )
            )
            for name, (model, arguments, environment) in ways.items()
        }
        for name, server in servers.items():
            server.wait_until_ready()
            found = server.completion(_PROMPT, max_tokens=_ANSWER_TOKENS, logprobs=1)["logprobs"]
            answers[name] = (found["tokens"], found["token_logprobs"])
    return answers


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    interrupt_on_signals()
    main(gate, measure, options)
