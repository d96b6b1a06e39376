"""How much each 4-bit format loses on synthetic data: relative MSE and SQNR at stated bits.

Gaussian, Laplace and Student-t4 matrices, the same for every format; five seeds. Relative MSE is
``sum error**2 / sum x**2`` over the matrix, SQNR its inverse in dB. Synthetic data says how a
format fits a shape of distribution, nothing about a model: for that, see the perplexities.

    python -m benchmarks.kernels.bench_sqnr
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, quantize
from dialect_kernels.baselines import quantize_mxfp4, quantize_nvfp4
from dialect_kernels.formatbook import Formatbook

from ..lib.gate import golden_gate
from ..lib.harness import Table, main

ROWS, COLUMNS = 256, 4096
SEEDS = range(5)

Rounded = tuple[torch.Tensor, float]
"""The rounded values, float32, and the stored bits per element."""


def dialect(book: Formatbook, block_size: int, rule: str) -> Callable[[torch.Tensor], Rounded]:
    def round_(x: torch.Tensor) -> Rounded:
        p = quantize(x, book, block_size, rule)
        return p.dequantize(torch.float32), p.bits_per_element

    return round_


def mxfp4(block_size: int) -> Callable[[torch.Tensor], Rounded]:
    """An E8M0 byte for each block."""
    return lambda x: (quantize_mxfp4(x, block_size), 4 + 8 / block_size)


def nvfp4(x: torch.Tensor) -> Rounded:
    """An E4M3 byte for each block of 16 and one float32 for the tensor."""
    return quantize_nvfp4(x), 4 + 8 / 16 + 32 / x.numel()


FORMATS: dict[str, Callable[[torch.Tensor], Rounded]] = {
    "MXFP4-16": mxfp4(16),
    "MXFP4-32": mxfp4(32),
    "NVFP4-16": nvfp4,
    "BlockDialect-16 two_stage": dialect(DIALECT_FP4, 16, "two_stage"),
    "BlockDialect-32 two_stage": dialect(DIALECT_FP4, 32, "two_stage"),
    "BlockDialect-64 two_stage": dialect(DIALECT_FP4, 64, "two_stage"),
    "BlockDialect-16 mse": dialect(DIALECT_FP4, 16, "mse"),
    "BlockDialect-32 mse": dialect(DIALECT_FP4, 32, "mse"),
    "BlockDialect-64 mse": dialect(DIALECT_FP4, 64, "mse"),
    "32-dialect book-16 lut": dialect(SEMANTIC_32, 16, "lut"),
    "32-dialect book-32 lut": dialect(SEMANTIC_32, 32, "lut"),
    "32-dialect book-64 lut": dialect(SEMANTIC_32, 64, "lut"),
    "32-dialect book-16 mse": dialect(SEMANTIC_32, 16, "mse"),
    "32-dialect book-32 mse": dialect(SEMANTIC_32, 32, "mse"),
    "32-dialect book-64 mse": dialect(SEMANTIC_32, 64, "mse"),
}

DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "gaussian": lambda rng: rng.standard_normal((ROWS, COLUMNS)),
    "laplace": lambda rng: rng.laplace(size=(ROWS, COLUMNS)),
    "student_t4": lambda rng: rng.standard_t(4, (ROWS, COLUMNS)),
}


def measure() -> dict[str, Any]:
    """Per format: bits per element and, per distribution, relative MSE (mean, spread) and SQNR."""
    figures: dict[str, Any] = {}
    for distribution, draw in DISTRIBUTIONS.items():
        matrices = [
            torch.from_numpy(draw(np.random.default_rng(seed)).astype(np.float32)) for seed in SEEDS
        ]
        for name, round_ in FORMATS.items():
            losses, bits = [], 0.0
            for x in matrices:
                rounded, bits = round_(x)
                losses.append(relative_mse(x, rounded))
            mean = statistics.fmean(losses)
            figures.setdefault(name, {"bits_per_element": round(bits, 3)})[distribution] = {
                "relative_mse": mean,
                "relative_mse_spread": max(losses) - min(losses),
                "sqnr_db": -10 * math.log10(mean),
            }
    return {"rows": ROWS, "columns": COLUMNS, "seeds": list(SEEDS), "formats": figures}


def relative_mse(x: torch.Tensor, rounded: torch.Tensor) -> float:
    error = (x.double() - rounded.double()).square().sum()
    return float(error / x.double().square().sum())


_SHOWN = {"gaussian": "Gaussian", "laplace": "Laplace", "student_t4": "Student-t4"}


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``formats``: relative MSE and SQNR of every format."""
    head = ["format", "bits"]
    for shown in _SHOWN.values():
        head += [f"{shown}: relative MSE", "SQNR"]
    rows = [head]
    for name, measured in figures["formats"].items():
        row = [name, f"{measured['bits_per_element']:.3f}"]
        for distribution in _SHOWN:
            loss = measured[distribution]
            row += [f"{loss['relative_mse']:.4f}", f"{loss['sqnr_db']:.2f} dB"]
        rows.append(row)
    return {"formats": rows}


def plots(figures: dict[str, Any]) -> dict[str, Figure]:
    """``bits``: SQNR against bits per element, one panel per distribution."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(_SHOWN), sharex=True)
    families: dict[str, list[dict[str, Any]]] = {}
    for name, measured in figures["formats"].items():
        family, _, rest = name.rpartition("-")
        rule = rest.partition(" ")[2]
        families.setdefault(f"{family} {rule}".strip(), []).append(measured)
    for panel, (distribution, shown) in zip(panels, _SHOWN.items(), strict=True):
        for family, points in families.items():
            bits = [point["bits_per_element"] for point in points]
            panel.plot(bits, [p[distribution]["sqnr_db"] for p in points], "o-", label=family)
        panel.set(title=shown, xlabel="bits per element")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("SQNR in dB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return {"bits": figure}


if __name__ == "__main__":
    main(golden_gate, measure)
