"""Served models on a GPU: :mod:`benchmarks.bench_serve` under a name of its own.

python -m benchmarks.bench_serve_gpu
"""

from .bench_serve import gate as _gate
from .bench_serve import measure, options, stop_on_signals, tables
from .gpu_timing import need_gpu
from .harness import main

__all__ = ["gate", "measure", "options", "tables"]


def gate() -> list[str]:
    """As there.

    Raises:
        SystemExit: if there is no GPU.
    """
    need_gpu()
    return _gate()


if __name__ == "__main__":
    stop_on_signals()
    main(gate, measure, options)
