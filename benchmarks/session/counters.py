"""Counters of the GEMM's kernels, where NVIDIA's profiler is installed and may read them.

python -m benchmarks.session.counters      # launches the kernels once each, for the profiler
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys

import torch

from ..kernels.tune import Weight
from ..lib.gpu_timing import need_gpu
from ..lib.shapes import LLAMA_8B
from .records import Work

__all__ = ["measure", "parsed"]

_TOKENS = (1, 16, 64, 512)
_METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sectors_op_read.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.sum",
)


def measure(work: Work) -> None:
    """One line for each kernel and metric, or one that says why there are none."""
    if work.rehearsal:
        launch()
        work.lines.add(kind="missing", why="a rehearsal has no counters")
        return
    profiler = shutil.which("ncu")
    if profiler is None:
        work.lines.add(kind="missing", why="ncu is not installed")
        return
    command = [
        *(profiler, "--csv", "--clock-control", "none", "--metrics", ",".join(_METRICS)),
        *("--kernel-name", "regex:bit_kernel|_quantize_activation", "--launch-count", "16"),
        *(sys.executable, "-m", __name__),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=work.left_s())
    (work.results / "counters.csv").write_text(done.stdout, encoding="utf-8")
    print(done.stderr[-2000:])
    found = parsed(done.stdout)
    for kernel, metric, unit, value in found:
        work.lines.add(kind="counter", kernel=kernel, metric=metric, unit=unit, value=value)
    if not found:
        work.lines.add(kind="missing", why=f"ncu ended with {done.returncode} and no counters")


def parsed(output: str) -> list[tuple[str, str, str, str]]:
    """(kernel and its number, metric, unit, value) of ncu's table, whatever stands around it."""
    rows = [line for line in output.splitlines() if line.startswith('"')]
    return [
        (
            f"{row['Kernel Name'].partition('(')[0]} #{row['ID']}",
            row["Metric Name"],
            row["Metric Unit"],
            row["Metric Value"],
        )
        for row in csv.DictReader(io.StringIO("\n".join(rows)))
    ]


def launch() -> None:
    """A product of the largest layer for each number of tokens, quantizer and GEMM."""
    from dialect_kernels import dialect_linear

    weight = Weight(*LLAMA_8B.fused_projections["gate_up"])
    for tokens in _TOKENS:
        x = torch.ones(tokens, weight.shape[1], dtype=torch.bfloat16, device="cuda")
        dialect_linear(x, weight.copies[0])
    torch.cuda.synchronize()


if __name__ == "__main__":
    need_gpu()
    launch()
