"""The video blocks on a GPU: :mod:`benchmarks.bench_video_speed` under a name of its own.

python -m benchmarks.bench_video_speed_gpu
"""

from .bench_video_speed import gate as _gate
from .bench_video_speed import measure, options, tables
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
    main(gate, measure, options)
