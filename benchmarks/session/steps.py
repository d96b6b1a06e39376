"""The steps of a session, in the order in which their answers are worth most."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..kernels import bench_gemm, bench_quantize, tune
from ..kernels.peer_kernels import PEERS
from ..lib.harness import ROOT, measure_result
from ..lib.probes import fp8_accumulator_bits
from ..lib.shapes import LLAMA_8B
from . import baselines, counters, products, small_gate
from .records import Work
from .runner import Step

__all__ = ["OPTIONAL", "STEPS", "TABLE_TOKENS"]

TABLE_TOKENS = (1, 4, 16, 64, 256, 512, 1024, 4096, 16384)
_TUNED_TOKENS = (1, 16, 48, 96, 256)
_QUANTIZED_TOKENS = (1, 16, 2048, 16384)
_PEER_TOKENS = (1, 16, 64, 512, 4096)
_GPU_TESTS = ("tests/golden/test_golden.py", "tests/kernels/gpu")
_FACTS = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
_PACKAGES = ("torch", "triton", "humming-kernels", "gemlite")


def _device(work: Work) -> None:
    """Which device, driver and versions."""
    if shutil.which("nvidia-smi") and not work.rehearsal:
        command = ["nvidia-smi", f"--query-gpu={_FACTS}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        names = _FACTS.split(",")
        values = done.stdout.strip().split(", ")
        work.lines.add(kind="nvidia-smi", **dict(zip(names, values, strict=False)))
    properties = torch.cuda.get_device_properties(0)
    work.lines.add(
        kind="device",
        name=torch.cuda.get_device_name(),
        capability=list(torch.cuda.get_device_capability()),
        processors=properties.multi_processor_count,
        cache_mib=properties.L2_cache_size >> 20,
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        versions=_versions(),
        profiler=shutil.which("ncu") is not None,
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _probes(work: Work) -> None:
    work.lines.add(kind="fp8_accumulator_bits", **fp8_accumulator_bits())


def _quantizers(work: Work) -> None:
    _result(work, "quantize", bench_quantize, tokens=list(_QUANTIZED_TOKENS))


def _table(work: Work) -> None:
    _result(work, "gemm", bench_gemm, models=["8B"], tokens=list(TABLE_TOKENS), peers={})


def _peers(work: Work) -> None:
    _result(work, "peers", bench_gemm, models=["8B"], tokens=list(_PEER_TOKENS), peers=PEERS)


def _large(work: Work) -> None:
    _result(work, "gemm_large", bench_gemm, models=["70B"], tokens=list(TABLE_TOKENS), peers={})


def _module(room: str, name: str, work: Work) -> None:
    """A benchmark in a process of its own, which checks itself before it measures."""
    command = [sys.executable, "-m", f"benchmarks.{room}.bench_{name}", "--out", str(work.results)]
    if work.rehearsal:
        command = [sys.executable, "-m", f"benchmarks.{room}.bench_{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"bench_{name} ended with {done.returncode}")


def _result(work: Work, name: str, benchmark: Any, **options: Any) -> None:
    """Measure, line by line; a result that can be committed only if the gate has passed."""
    faults = small_gate.faults(work.results)
    gate = "not passed" if faults else "passed"

    def measure() -> dict[str, Any]:
        report = partial(work.lines.add, gate=gate)
        figures: dict[str, Any] = benchmark.measure(report=report, **options)
        return figures

    if faults or work.rehearsal:
        print("no result, only lines:", *faults, sep="\n")
        measure()
        return
    result = measure_result(name, lambda: [], measure)  # the gate was a step of its own
    file = work.results / f"{name}.json"
    file.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _tune(work: Work) -> None:
    """The few candidates of every layer; the table that follows is measured with what is found."""
    folder = work.results / "configs"
    for activation_format in ("dialect", "none", "fp8"):
        for shape in LLAMA_8B.fused_projections.values():
            tune.tune(
                shape, activation_format, _TUNED_TOKENS, folder, few=True, report=work.lines.add
            )
    if not work.rehearsal and not small_gate.faults(work.results):
        for file in folder.glob("*.json"):
            shutil.copy(file, tune.CONFIGS / file.name)


def _tests(work: Work) -> None:
    """All tests that need a GPU; a failure does not end them."""
    report = work.results / "tests.xml"
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    try:
        version("pytest-xdist")
        options.append(f"--numprocesses={min(8, len(os.sched_getaffinity(0)))}")
    except PackageNotFoundError:
        pass
    if work.rehearsal:
        options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--collect-only"]
    _pytest(work, [sys.executable], options)


def _sanitizer(work: Work) -> None:
    """compute-sanitizer sees only memory that PyTorch does not keep for later use."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        work.lines.add(kind="missing", why="compute-sanitizer is not installed")
        return
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    for tool in ("memcheck", "racecheck", "initcheck"):
        before = [program, "--tool", tool, "--error-exitcode", "1", sys.executable]
        chosen = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-k", "decoded_bytes or decomposed"]
        _pytest(work, before, chosen, tool=tool)


def _pytest(work: Work, before: Sequence[str], options: Sequence[str], **facts: Any) -> None:
    command = [*before, "-m", "pytest", *options, *_GPU_TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    work.lines.add(kind="pytest", status=done.returncode, last=last.strip("= "), **facts)
    if done.returncode != 0:
        raise SystemExit(last)


STEPS = [
    Step("device", "which card, driver and versions", 20, _device),
    Step("probes", "whether fast accumulation is within the contract", 25, _probes),
    Step("library", "what cuBLAS reaches in FP8 and bfloat16", 45, baselines.measure),
    Step("gate", "whether results are right", 60, small_gate.check, fixed_s=12),
    Step("products", "stages, tiles and splits at few tokens", 110, products.measure),
    Step("counters", "conflicts, sectors and issue slots", 60, counters.measure, fixed_s=30),
    Step("quantizers", "what quantizing costs", 40, _quantizers),
    Step("tune", "plans for the dispatch", 90, _tune),
    Step("table", "our products beside FP8 and bfloat16", 100, _table),
    Step("tests", "all tests that need a GPU", 240, _tests, fixed_s=120),
    Step("peers", "other projects' kernels", 120, _peers, fixed_s=20),
]
OPTIONAL = [
    Step("sanitizer", "whether memory is used rightly", 240, _sanitizer, fixed_s=200),
    Step("large", "the table for LLaMA-3-70B", 240, _large),
    Step("video", "blocks; needs diffusers", 480, partial(_module, "video", "video_speed_gpu")),
    Step("serve", "vLLM under load; needs vLLM", 480, partial(_module, "language", "serve_gpu")),
]
"""Only where they are named."""
