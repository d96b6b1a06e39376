"""One model in the engines that a user of a CPU chooses between: llama.cpp, PyTorch, vLLM, ours.

Every engine is a library in a process of its own, without a server in front of it, and computes
with the same number of threads. All of a model's engines stay loaded; in each round each reads one
prompt and then answers another, while the others sleep. All get the same token ids and answer
greedily. Then each answers a little more while other programs keep all cores busy. Of a real model
the KL divergence from transformers' bfloat16 is taken on windows of the text of `bench_accuracy`.
Formats are calibrated where their name says so.

llama.cpp is found if it is installed, built for this processor, in an environment of its own:

    python -m venv .cache/peers/llama
    CMAKE_ARGS=-DGGML_NATIVE=ON .cache/peers/llama/bin/pip install --no-binary llama-cpp-python \
        llama-cpp-python

    python -m benchmarks.language.bench_peers [--models smollm2,llama-3.2-1b] [--peers q4_0 w4a8]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..lib.gate import golden_gate
from ..lib.harness import Table, main_in_parts
from .bench_accuracy import WINDOW, write_text
from .checkpoints import convert
from .measured_server import refusal
from .peer_checkpoints import LLAMA_PYTHON, stored_bytes, write_compressed, write_gguf
from .peer_process import EngineError, EngineProcess
from .served_models import SHAPES, prepare

Figures = dict[str, Any]

PACKAGES = ("torch", "vllm", "transformers")
REAL = "smollm2"
MODELS = {REAL: REAL, "llama-3.2-1b": "1b"}
"""Models -> how their results' files end."""
_BASE = "vllm-bf16"
_REFERENCE = "transformers-bf16"
_THREADS = 2
_PROMPT_TOKENS = 512
_CONTEXT = 1024
_SHORT_PROMPT = 16
_BUSY_TOKENS = 5
_BUSY_ROUNDS = 3
"""Few, because an engine may take a hundred times as long there."""
_BUSY_LOOP = "while True: pass"
_SAME_MODEL = 0.02
"""Nats by which a 16-bit engine may differ from another one; a wrong model differs by far more."""


@dataclass(frozen=True)
class Peer:
    """A format in an engine.

    Attributes:
        name: in the tables.
        engine: ``"llama"``, ``"transformers"`` or ``"vllm"``.
        kind: how the checkpoint is made: a type of GGUF, ``"bf16"``, ``"packed"``,
            ``"calibrated"``, ``"int8"`` or ``"int4"``.
        method: vLLM's ``quantization``, where the checkpoint does not say it all.
        variables: environment variables.
    """

    name: str
    engine: str
    kind: str
    method: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


PEERS = {
    _REFERENCE: Peer("transformers, bf16", "transformers", "bf16"),
    "llama-bf16": Peer("llama.cpp, BF16", "llama", "bf16"),
    "q4_0": Peer("llama.cpp, Q4_0", "llama", "q4_0"),
    "q4_k_m": Peer("llama.cpp, Q4_K_M", "llama", "q4_k_m"),
    "llama-mxfp4": Peer("llama.cpp, MXFP4", "llama", "mxfp4"),
    _BASE: Peer("vLLM, bf16", "vllm", "bf16"),
    "vllm-int8": Peer("vLLM, INT8 W8A8", "vllm", "int8"),
    "vllm-int4": Peer("vLLM, INT4 W4A8", "vllm", "int4"),
    "vllm-int4-w4a16": Peer(
        "vLLM, INT4 W4A16", "vllm", "int4", variables={"VLLM_CPU_INT4_W4A8": "0"}
    ),
    "w4a4": Peer("**ours, W4A4**", "vllm", "packed"),
    "w4a8": Peer("**ours, W4A8**", "vllm", "packed", "blockdialect_w4a8"),
    "w4a16": Peer("**ours, W4A16**", "vllm", "packed", "blockdialect_w4a16"),
    "calibrated-w4a4": Peer("**ours, W4A4, calibrated**", "vllm", "calibrated"),
    "calibrated-w4a8": Peer(
        "**ours, W4A8, calibrated**", "vllm", "calibrated", "blockdialect_w4a8"
    ),
}


def options(parser: argparse.ArgumentParser) -> None:
    """Add models, engines, and how much each of them computes."""
    add = parser.add_argument
    add("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="in this order")
    add("--rounds", type=int, default=5, help="rounds that are timed, after one that is not")
    add("--tokens", type=int, default=32, help="tokens of each answer")
    add("--busy", type=int, default=_THREADS, help="busy programs beside the last answers")
    add("--windows", type=int, default=4, help="windows of 512 tokens for the divergence")
    add("--eager", action="store_true", help="do not compile vLLM's models")


def parts(models: str) -> dict[str, str]:
    """Models, separated by commas -> how their results' files end.

    Raises:
        SystemExit: if a model is not known.
    """
    chosen = models.split(",")
    if not set(chosen) <= set(MODELS):
        raise SystemExit(f"--models: {models!r}; it must be some of {', '.join(MODELS)}")
    return {name: MODELS[name] for name in chosen}


def measure(
    model: str,
    peers: Sequence[str],
    rounds: int,
    tokens: int,
    busy: int,
    windows: int,
    eager: bool,
) -> Figures:
    """Every engine's times of every round, its memory and, of a real model, its divergence."""
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as directory, ExitStack() as stack:
        session = _Session(Path(directory), model, eager, stack)
        for key in peers:
            session.start(key)
        session.wait_until_loaded()
        prompts = session.token_ids(windows)
        if model == REAL:
            session.measure_divergence(prompts)
        session.measure_times(prompts, rounds, tokens)
        if busy:
            session.measure_busy(prompts[0][:_SHORT_PROMPT], busy)
        return {
            "model": model,
            "threads": _THREADS,
            "compiled": not eager,
            "answer_tokens": tokens,
            "busy": busy,
            "windows": windows if model == REAL else 0,
            "peers": session.found,
            "refused": session.refused,
        }


class _Session:
    """The engines of one model.

    Args:
        folder: for checkpoints, logs and logits.
        model: a key of `MODELS`.
        eager: whether vLLM runs it uncompiled.
        stack: ends the engines' processes.

    Attributes:
        found: peer -> its figures.
        refused: peer -> why it has none.
    """

    def __init__(self, folder: Path, model: str, eager: bool, stack: ExitStack) -> None:
        self.found: dict[str, Figures] = {}
        self.refused: dict[str, str] = {}
        self._folder, self._eager, self._stack = folder, eager, stack
        self._real = model == REAL
        self._source = _source(model, folder)
        self._processes: dict[str, EngineProcess] = {}

    def start(self, key: str) -> None:
        """Make a peer's checkpoint and begin to load it, or note why it cannot be."""
        peer = PEERS[key]
        if peer.engine == "llama" and not LLAMA_PYTHON.exists():
            self.refused[key] = "llama-cpp-python is not installed in .cache/peers/llama"
            return
        given: dict[str, Any] = {"threads": _THREADS, "context": _CONTEXT}
        if peer.engine == "vllm":
            given |= {"eager": self._eager, "quantization": peer.method}
        try:
            checkpoint = self._checkpoint(peer)
        except RuntimeError as error:
            self._refuse(key, error)
            return
        log = self._folder / f"{key}.log"
        process = EngineProcess(peer.engine, checkpoint, given, log, peer.variables)
        self._processes[key] = self._stack.enter_context(process)
        self.found[key] = {"weight_bytes": stored_bytes(checkpoint)}

    def wait_until_loaded(self) -> None:
        """Let each engine answer once, and note its memory."""
        for key, process in list(self._processes.items()):
            try:
                said = process.description()
                _, peak = process.seconds(range(100, 100 + _PROMPT_TOKENS), 2)
            except EngineError as error:
                self._refuse(key, error)
                continue
            if said["threads"] != _THREADS:
                raise SystemExit(f"{PEERS[key].name} computes with {said['threads']} threads")
            self.found[key] |= {"engine": said["engine"], "peak_bytes": peak}
            print(f"{PEERS[key].name}: loaded, {self.found[key]}", flush=True)

    def _refuse(self, key: str, error: Exception) -> None:
        self.refused[key] = refusal(str(error))
        self.found.pop(key, None)
        self._processes.pop(key, None)
        print(f"{PEERS[key].name}: refused: {error}", flush=True)

    def token_ids(self, windows: int) -> list[list[int]]:
        """Windows of the accuracy benchmark's text, or random ones where there is no tokenizer."""
        if self._real:
            return _windows(self._source, self._folder, windows)
        generator = torch.Generator().manual_seed(0)
        found: list[list[int]] = torch.randint(
            1000, 100_000, (windows, WINDOW), generator=generator
        ).tolist()
        return found

    def measure_times(self, prompts: Sequence[Sequence[int]], rounds: int, tokens: int) -> None:
        """Let each engine read a long prompt and answer a short one, in every round."""
        for number in range(-1, rounds):
            long = prompts[number % len(prompts)][:_PROMPT_TOKENS]
            for key, process in list(self._processes.items()):
                try:
                    (prompt_s,), _ = process.seconds(long, 1)
                    (_, *token_s), _ = process.seconds(long[:_SHORT_PROMPT], tokens)
                except EngineError as error:
                    self._refuse(key, error)
                    continue
                if number >= 0:
                    self.found[key].setdefault("prompt_s", []).append(prompt_s)
                    self.found[key].setdefault("token_s", []).append(statistics.mean(token_s))
            print(f"round {number + 1} of {rounds}", flush=True)

    def measure_busy(self, prompt: Sequence[int], busy: int) -> None:
        """Let each engine answer while so many other programs compute without end."""
        with ExitStack() as stack:
            for _ in range(busy):
                loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", _BUSY_LOOP]))
                stack.callback(loop.kill)
            for _ in range(_BUSY_ROUNDS):
                for key, process in self._processes.items():
                    (_, *token_s), _ = process.seconds(prompt, _BUSY_TOKENS)
                    busy_s = self.found[key].setdefault("busy_token_s", [])
                    busy_s.append(statistics.mean(token_s))

    def measure_divergence(self, windows: Sequence[Sequence[int]]) -> None:
        """Compare each engine's predictions with those of transformers in bfloat16.

        Raises:
            SystemExit: if a 16-bit engine runs another model.
        """
        if _REFERENCE not in self._processes:
            return
        expected = self._logits(_REFERENCE, windows)
        for key in self._processes:
            if key == _REFERENCE:
                continue
            try:
                logits = self._logits(key, windows)
            except EngineError as error:
                print(f"{PEERS[key].name}: no divergence: {error}", flush=True)
                continue
            self.found[key] |= divergence(expected, logits, windows)
            nats = statistics.mean(self.found[key]["divergence"])
            print(f"{PEERS[key].name}: {nats:.4f} nats", flush=True)
            if PEERS[key].kind == "bf16" and nats > _SAME_MODEL:
                raise SystemExit(f"{PEERS[key].name} is not the same model: {nats:.3f} nats")

    def _logits(self, key: str, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        import numpy as np

        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            self._processes[key].write_logits(windows, Path(folder))
            paths = [Path(folder, f"{number}.npy") for number in range(len(windows))]
            return [torch.from_numpy(np.load(path))[: WINDOW - 1] for path in paths]

    def _checkpoint(self, peer: Peer) -> Path:
        """The checkpoint that a peer loads; made, unless it is there already."""
        if peer.engine == "llama":
            path = self._folder / f"{peer.kind}.gguf"
            if not path.exists():
                write_gguf(self._source, path, peer.kind)
            return path
        path = self._source if peer.kind == "bf16" else self._folder / peer.kind
        if path.exists():
            return path
        if peer.kind == "packed":
            convert(self._source, path)
        elif peer.kind == "calibrated":
            if not self._real:
                raise RuntimeError("random weights have no text to be calibrated on")
            convert(self._source, path, "--calibrate", "default")
        else:
            write_compressed(self._source, path, int(peer.kind.removeprefix("int")))
        return path


def _source(model: str, folder: Path) -> Path:
    """The 16-bit checkpoint."""
    if model != REAL:
        return prepare(SHAPES[model], folder / "bf16")
    from demo.language.real_models import RealModelError
    from demo.language.real_models import prepare as prepare_real

    try:
        return prepare_real(model)
    except RealModelError as error:
        raise SystemExit(f"peers: {model}: {error}") from None


def _windows(model: Path, folder: Path, windows: int) -> list[list[int]]:
    """The windows that ``blockdialect evaluate`` takes of the same text."""
    from dialect_plugin.calibration.options import CalibrationOptions
    from dialect_plugin.calibration.text import read_text

    chosen = CalibrationOptions(
        calibrate=str(write_text(folder)), samples=windows, sequence_length=WINDOW
    )
    found: list[list[int]] = read_text(model, chosen, torch.iinfo(torch.int64).max).windows.tolist()
    return found


def divergence(
    expected: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
    windows: Sequence[Sequence[int]],
) -> Figures:
    """``divergence``: nats, for each window; ``same_top``: share of positions.

    Args:
        expected, found: of each window [T - 1, V], the logits of two models.
        windows: token ids [T].
    """
    from dialect_plugin.evaluation.divergence import compare

    compared = [
        compare(one, other, torch.tensor(window[1:]))
        for one, other, window in zip(expected, found, windows, strict=True)
    ]
    agreed = [(one.expected == one.top).double().mean().item() for one in compared]
    nats = [one.divergence.mean().item() for one in compared]
    return {"divergence": nats, "same_top": statistics.mean(agreed)}


def tables(figures: Figures) -> dict[str, Table]:
    """``speed``: times and memory; ``busy``; ``versions``; ``refused``; perhaps ``divergence``.

    Medians over the rounds; ratios to vLLM in bfloat16 are taken round by round, above 1 is faster.
    """
    found: dict[str, Table] = {"speed": _speed(figures)}
    if figures["busy"]:
        found["busy"] = _busy(figures)
    if figures["windows"]:
        found["divergence"] = _divergence(figures)
    versions = {peer["engine"] for _, peer in _measured(figures)}
    found["versions"] = [["engines"], *([version] for version in sorted(versions))]
    refused = figures["refused"].items()
    found["refused"] = [
        ["format", "why it has no figures here"],
        *([PEERS[key].name, reason.replace("|", "\\|")] for key, reason in refused),
    ]
    return found


def _speed(figures: Figures) -> Table:
    rows = [["engine and format", "decoded tokens/s", "against vLLM bf16", "prompt tokens/s",
             "against vLLM bf16", "weights", "peak memory"]]  # fmt: skip
    base = figures["peers"].get(_BASE)
    for key, peer in _measured(figures):
        decoded = 1 / statistics.median(peer["token_s"])
        prompt = _PROMPT_TOKENS / statistics.median(peer["prompt_s"])
        rows.append(
            [
                PEERS[key].name,
                f"{decoded:.1f}",
                _against(base, peer, "token_s"),
                f"{prompt:,.0f}",
                _against(base, peer, "prompt_s"),
                f"{peer['weight_bytes'] / 1e6:,.0f} MB",
                f"{peer['peak_bytes'] / 2**30:.2f} GiB",
            ]
        )
    return rows


def _busy(figures: Figures) -> Table:
    rows = [["engine and format", "decoded tokens/s", f"beside {figures['busy']} busy programs",
             "of the rate before", "against vLLM bf16"]]  # fmt: skip
    base = figures["peers"].get(_BASE)
    for key, peer in _measured(figures):
        quiet, busy = (statistics.median(peer[name]) for name in ("token_s", "busy_token_s"))
        rows.append(
            [
                PEERS[key].name,
                f"{1 / quiet:.1f}",
                f"{1 / busy:.1f}",
                f"{quiet / busy:.2f} x",
                _against(base, peer, "busy_token_s"),
            ]
        )
    return rows


def _against(base: Figures | None, peer: Figures, figure: str) -> str:
    if base is None:
        return "–"
    ratios = [theirs / own for theirs, own in zip(base[figure], peer[figure], strict=True)]
    return f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


def _divergence(figures: Figures) -> Table:
    rows = [["engine and format", "weights", "KL to bf16, nats", "same top token"]]
    for key, peer in _measured(figures):
        if "divergence" not in peer:
            continue
        nats = peer["divergence"]
        error = statistics.stdev(nats) / len(nats) ** 0.5 if len(nats) > 1 else 0.0
        rows.append(
            [
                PEERS[key].name,
                f"{peer['weight_bytes'] / 1e6:,.0f} MB",
                f"{statistics.mean(nats):.4f} ± {error:.4f}",
                f"{peer['same_top']:.1%}",
            ]
        )
    return rows


def _measured(figures: Mapping[str, Any]) -> list[tuple[str, Figures]]:
    return [(key, figures["peers"][key]) for key in PEERS if key in figures["peers"]]


if __name__ == "__main__":
    main_in_parts(golden_gate, measure, options, parts)
