"""The rounds of :mod:`.bench_serve`: one server after the other, each started anew."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from demo.language.server import ServerError

from ..lib.memory import device_bytes, watch
from .measured_server import MeasuredServer, read_log, refusal, server_arguments
from .served_models import FORMATS, Format, Load, Shape, layer_bytes, prepare, remove
from .vllm_bench import run_client, run_offline, warmup

__all__ = ["OFFLINE", "Session", "add_figures", "loads_of", "measure_server"]

Figures = dict[str, Any]
"""Lists of figures, one for each round or each run, and dicts of such lists."""

OFFLINE = ("latency", "throughput")
"""Subcommands of ``vllm bench`` that start an engine of their own."""

_SLOW_LOAD = Load(at_once=1, prompts=1, input_tokens=8, output_tokens=3)
_LATENCY_VOCABULARY = 10_000
"""``vllm bench latency`` draws its prompts from so many token ids, whatever the model."""
_UNQUANTIZED = 0.9
"""A share of bf16's memory that no quantized model takes."""


@dataclass
class Session:
    """The servers of one measurement.

    Attributes:
        formats: keys of `FORMATS`, in the order of a round.
        rounds: starts of every server.
        repeats: runs of every load in a round.
        eager: whether models run uncompiled.
        offline: whether the subcommands in `OFFLINE` run too.
        minutes: start no server that would not be done so many minutes after this process began.
        refused: format -> why it is not served on this platform; it is not tried again.
        longest_s: the most seconds that a server of this model has taken, from start to stop.
    """

    formats: Sequence[str]
    rounds: int
    repeats: int
    eager: bool
    offline: bool
    minutes: float
    refused: dict[str, str] = field(default_factory=dict)
    longest_s: float = 0.0

    def measure_shape(self, shape: Shape, directory: Path) -> Figures:
        """All rounds of one model.

        Args:
            shape: the model.
            directory: for its checkpoint, if one is made; it must not exist.
        """
        model = prepare(shape, directory)
        self.longest_s = 0.0
        found: dict[str, Figures] = {}
        for number in range(self.rounds):
            for key in self.formats:
                if self._is_due(key, number, key in found):
                    self._measure(shape, model, key, number, found)
        remove(shape, directory)
        return {
            "name": shape.name,
            "weights": shape.weights,
            "loads": {name: asdict(load) for name, load in shape.loads.items()},
            "layer_bytes": {key: layer_bytes(shape.model, form) for key, form in FORMATS.items()},
            "formats": found,
        }

    def _is_due(self, key: str, number: int, has_figures: bool) -> bool:
        if key in self.refused or (FORMATS[key].slow and number > 0):
            return False
        running_s = time.time() - psutil.Process().create_time()
        if running_s + self.longest_s < 60 * self.minutes:
            return True
        if not has_figures:
            self.refused[key] = f"not started: the {self.minutes:g} minutes allowed were over"
        return False

    def _measure(
        self, shape: Shape, model: Path, key: str, number: int, found: dict[str, Figures]
    ) -> None:
        """Start one server and add its figures to those that were `found` before."""
        began = time.monotonic()
        form = FORMATS[key]
        seeds = [1 + number * self.repeats + repeat for repeat in range(self.repeats)]
        try:
            with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
                once = measure_server(shape, model, form, self.eager, seeds, Path(folder))
                _check_quantized(form, once, found.get("bf16"))
                if self.offline and not form.slow:
                    once["offline"] = _measure_offline(shape, model, form, self.eager, Path(folder))
        except (ServerError, RuntimeError) as error:
            found.pop(key, None)
            self.refused[key] = refusal(str(error))
            print(f"{shape.name}, {form.name}: not served: {error}", flush=True)
        else:
            add_figures(found.setdefault(key, {}), once)
            print(f"{shape.name}, {form.name}, round {number + 1}: {once}", flush=True)
        self.longest_s = max(self.longest_s, time.monotonic() - began)


def loads_of(shape: Shape, form: Format) -> Mapping[str, Load]:
    """The loads for a format's server, by name."""
    return {"single": _SLOW_LOAD} if form.slow else shape.loads


def add_figures(total: Figures, once: Figures) -> None:
    """Append the lists of `once` to those of `total`."""
    for name, value in once.items():
        if isinstance(value, dict):
            add_figures(total.setdefault(name, {}), value)
        else:
            total.setdefault(name, []).extend(value)


def measure_server(
    shape: Shape, model: Path, form: Format, eager: bool, seeds: Sequence[int], folder: Path
) -> Figures:
    """Times of the runs of one server, its peak memory, and the figures of its log.

    Args:
        shape, form: model and format.
        model: directory of the checkpoint.
        eager: whether the model runs uncompiled.
        seeds: of the prompts, one for each run of every load.
        folder: for the server's log.

    Returns:
        a list of values for each figure; for each load a dict of such lists.

    Raises:
        ServerError, RuntimeError: if the server does not start or does not answer.
    """
    loads = loads_of(shape, form)
    arguments = server_arguments(shape, form, eager)
    before, began = device_bytes(), time.monotonic()
    with MeasuredServer(model, folder / "log", arguments, form.environment) as server:
        with watch(server.pid, before) as starting:
            server.wait_until_ready()
        start_s = time.monotonic() - began
        # not timed, so that the watch may take its share of the processor
        with watch(server.pid, before) as answering:
            run_client(model, server.port, warmup(list(loads.values())[-1]), seed=0)
        taken = {
            name: [
                run_client(model, server.port, load, seed)
                for seed in (seeds[:1] if form.slow else seeds)
            ]
            for name, load in loads.items()
        }
        said = read_log(server.log.read_text(encoding="utf-8", errors="replace"))
    return {
        "start_s": [start_s],
        "peak_start_bytes": [starting.peak],
        "peak_answering_bytes": [answering.peak],
        **{name: [value] for name, value in said.items()},
        **{
            name: {figure: [run[figure] for run in found] for figure in found[0]}
            for name, found in taken.items()
        },
    }


def _check_quantized(form: Format, once: Figures, bf16: Figures | None) -> None:
    """Refuse a method that this version of vLLM accepts but does not apply to linear layers.

    Raises:
        RuntimeError: if loading took as much memory as it does in bf16, where vLLM says so.
    """
    if form.method is None or bf16 is None:
        return
    (ours,), theirs = once["model_gib"], bf16["model_gib"][0]
    if ours is not None and theirs is not None and ours > _UNQUANTIZED * theirs:
        raise RuntimeError(
            f"this vLLM takes --quantization {form.method} but quantizes nothing: loading took "
            f"{ours:g} GiB, and {theirs:g} GiB in bf16"
        )


def _measure_offline(shape: Shape, model: Path, form: Format, eager: bool, folder: Path) -> Figures:
    kinds = [
        kind
        for kind in OFFLINE
        if kind != "latency" or shape.model.vocabulary >= _LATENCY_VOCABULARY
    ]
    return {kind: [run_offline(kind, model, shape, form, eager, folder)] for kind in kinds}
