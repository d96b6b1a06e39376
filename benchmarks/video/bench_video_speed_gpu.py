"""The video blocks on a GPU: :mod:`benchmarks.video.bench_video_speed` under a name of its own.

python -m benchmarks.video.bench_video_speed_gpu
"""

from ..lib.gpu_timing import on_gpu
from ..lib.harness import main
from .bench_video_speed import PACKAGES, measure, options, tables
from .bench_video_speed import gate as _gate

__all__ = ["PACKAGES", "gate", "measure", "options", "tables"]


gate = on_gpu(_gate)


if __name__ == "__main__":
    main(gate, measure, options)
