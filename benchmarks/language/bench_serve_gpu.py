"""Served models on a GPU: :mod:`benchmarks.language.bench_serve` under a name of its own.

python -m benchmarks.language.bench_serve_gpu
"""

from demo.terminal import interrupt_on_signals

from ..lib.gpu_timing import on_gpu
from ..lib.harness import main
from .bench_serve import PACKAGES, measure, options, tables
from .bench_serve import gate as _gate

__all__ = ["PACKAGES", "gate", "measure", "options", "tables"]


gate = on_gpu(_gate)


if __name__ == "__main__":
    interrupt_on_signals()
    main(gate, measure, options)
