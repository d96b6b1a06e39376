"""The machine code that compilers make of the GPU kernels; no GPU is needed.

For every tile that the dispatch can choose: the matrix instruction, registers, shared memory and
the instructions of the main loop per weight, by the Triton that is installed and by the one beside
the oldest supported PyTorch (fetched by ``make test``). None of this is a time.

An H200 that reads 4.25 bits a weight at the full speed of its memory (4.8 TB/s by its data sheet)
can issue 3.7 instructions for each of them: a loop with fewer is not what keeps it waiting.

    python -m benchmarks.kernels.bench_machine_code
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import triton

from dialect_kernels.gpu.linear import EXACT_PLANS, table_of
from dialect_kernels.gpu.tuning import TABLES

from ..lib.harness import ROOT, Table, in_new_process, main
from ..lib.machine_code import MMA, compile_gemm, faults, per_weight

PACKAGES = ("triton",)
OLD_TRITON = ROOT / ".cache" / "triton-3.6.0"
GPUS = {80: "sm_80", 89: "sm_89", 90: "sm_90 (H100, H200)", 100: "sm_100", 120: "sm_120"}


def gate() -> list[str]:
    """Spilled registers and missing matrix instructions by the installed Triton."""
    return [
        f"{row['gpu']}, {row['operands']}, {row['tokens']} x {row['features']}: {fault}"
        for row in rows()
        for fault in row["faults"]
    ]


def measure() -> dict[str, Any]:
    """The rows of both compilers, by Triton version."""
    found = rows_here()
    if OLD_TRITON.exists():
        # everything else from where this process has it
        path = os.pathsep.join([os.fspath(OLD_TRITON), os.fspath(ROOT), *sys.path[1:]])
        found |= in_new_process(rows_here, {"PYTHONPATH": path})
    return {"triton": dict(sorted(found.items()))}


def rows_here() -> dict[str, list[dict[str, Any]]]:
    """The rows by the Triton of this process, under its version."""
    return {triton.__version__: rows()}


def rows() -> list[dict[str, Any]]:
    """One row for every plan of every device."""
    found = []
    for eight_bits, mma in MMA.items():
        for capability in mma:
            table = TABLES[table_of(divmod(capability, 10), eight_bits)]
            plans = dict.fromkeys(plan for _, plan in table)
            found += [_row(plan, capability, eight_bits, False) for plan in plans]
    for capability in MMA[False]:
        found += [_row(plan, capability, False, True) for _, plan in EXACT_PLANS]
    return found


def _row(plan: Any, capability: int, eight_bits: bool, exact: bool) -> dict[str, Any]:
    code = compile_gemm(plan, capability, eight_bits, exact)
    pattern = MMA[eight_bits][capability]
    used = next((text for text in code.main_loop() if re.search(pattern, text)), "none")
    return {
        "gpu": GPUS[capability],
        "operands": "FP8" if eight_bits else "bfloat16, exact" if exact else "bfloat16",
        "tokens": plan.tokens,
        "features": plan.features,
        "instruction": used.split()[0] if not used.startswith("@") else used.split()[1],
        "per_weight": round(per_weight(code, plan, exact), 2),
        "registers": code.registers,
        "shared_kib": round(code.shared / 1024, 1),
        "faults": faults(code, capability, pattern),
    }


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``gemm``: every plan; ``hopper``: instructions per weight of FP8 operands on sm_90."""
    versions = figures["triton"]
    columns = [f"{version}: {what}" for version in versions for what in ("per weight", "registers")]
    shown = [["GPU", "operands", "tokens x features", "instruction", *columns]]
    hopper = [["tokens x features of a tile", *(f"Triton {version}" for version in versions)]]
    for by_version in zip(*versions.values(), strict=True):
        first = by_version[0]
        cells = [
            c for row in by_version for c in (f"{row['per_weight']:.2f}", str(row["registers"]))
        ]
        tile = f"{first['tokens']} x {first['features']}"
        shown.append([first["gpu"], first["operands"], tile, f"`{first['instruction']}`", *cells])
        if first["gpu"] == GPUS[90] and first["operands"] == "FP8":
            hopper.append([tile, *(f"{row['per_weight']:.2f}" for row in by_version)])
    return {"gemm": shown, "hopper": hopper}


if __name__ == "__main__":
    main(gate, measure)
