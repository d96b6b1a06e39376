#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU is needed for, in the minutes for which it can be had.
#
#     benchmarks/gpu_session.sh --minutes 12 [--kernels FILE] [--wheels DIR] OUT
#     benchmarks/gpu_session.sh --rehearse OUT        # without a GPU: every step, counted
#
# benchmarks/README.md says how to prepare FILE and DIR, and --help names all options.
set -uo pipefail
BEGAN=$(date +%s.%N)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

wheels=
previous=
for argument in "$@"; do
  [ "$previous" = --wheels ] && wheels=$argument
  previous=$argument
done
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
fi
export BEGAN PYTHONPATH=$PWD/triton_kernels:$PWD:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ -z "${BENCHMARK_COMMIT:-}" ] && ! git rev-parse HEAD >/dev/null 2>&1; then
  export BENCHMARK_COMMIT=unknown
fi
"$python" -m benchmarks.session "$@"
