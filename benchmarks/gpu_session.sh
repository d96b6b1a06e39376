#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU is needed for, most important first.
#
#     benchmarks/gpu_session.sh OUT [WHEELS]
#
# OUT takes results, logs and a mark for every step that is done: run it again and it goes on where
# it stopped. At the end OUT/session.tar.gz holds all of it. Copy the results into benchmarks/results,
# OUT/configs into triton_kernels/dialect_kernels/gpu/configs, and commit them with the code they measured.
#
# WHEELS is a folder of packages for a machine without a network; nothing is downloaded. Beside torch,
# triton, pytest and matplotlib it takes pydantic, pydantic-core, annotated-types and
# typing-inspection; steps whose package is missing fail and say so: diffusers (video), vllm and
# blockdialect's own wheel (serve), humming-kernels, gemlite (peers of gemm; left out without them).
#
# Steps, each under eight minutes: STEPS="gate probes" runs only these.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
wheels=${2:-}
steps=${STEPS:-gate probes gemm quantize tune gemm_tuned video serve gemm_large sanitizer}
limit=480

python=${PYTHON:-python3}
site=$out/site
export PYTHONPATH=$PWD/triton_kernels:$PWD:$site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export BENCHMARK_COMMIT=${BENCHMARK_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}

prepare() {
  mkdir -p "$site"
  if [ -n "$wheels" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$wheels"/*.whl
  fi
  "$python" -c 'import torch
if not torch.cuda.is_available():
    raise SystemExit("gpu_session: there is no CUDA device")
print(torch.__version__, torch.cuda.get_device_name())'
}

has() { "$python" -c "import $1" 2>/dev/null || { echo "the package $1 is not installed" >&2; false; }; }

step_gate() {
  "$python" -c 'from dialect_kernels.verify import verify
wrong = [r for r in verify(["cuda"]) if not r.passed]
print(*wrong, sep="\n")
raise SystemExit(bool(wrong))' &&
    "$python" -m pytest -q -m gpu -p no:cacheprovider tests/golden/test_golden.py \
      tests/kernels/gpu $(has diffusers && echo tests/video)
}
step_probes() { "$python" -m benchmarks.lib.probes >"$out/probes.json" && cat "$out/probes.json"; }
step_gemm() { "$python" -m benchmarks.kernels.bench_gemm --models 8B --out "$out/untuned"; }
step_quantize() { "$python" -m benchmarks.kernels.bench_quantize --out "$out"; }
step_tune() {
  "$python" -m benchmarks.kernels.tune --out "$out/configs" &&
    cp "$out"/configs/*.json triton_kernels/dialect_kernels/gpu/configs/
}
step_gemm_tuned() { "$python" -m benchmarks.kernels.bench_gemm --models 8B --out "$out"; }
step_gemm_large() { "$python" -m benchmarks.kernels.bench_gemm --models 70B --out "$out/70B"; }
step_video() { has diffusers && "$python" -m benchmarks.video.bench_video_speed_gpu --out "$out"; }
step_serve() { has vllm && "$python" -m benchmarks.language.bench_serve_gpu --out "$out"; }
step_sanitizer() {
  local tool
  for tool in memcheck racecheck initcheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -m gpu \
      -p no:cacheprovider tests/kernels/gpu/test_linear_on_gpu.py -k "decoded_bytes or decomposed" || return 1
  done
}

prepare >"$out/prepare.log" 2>&1 || { cat "$out/prepare.log"; exit 1; }
cat "$out/prepare.log"
failed=0
for step in $steps; do
  if [ -e "$out/$step.done" ]; then
    echo "$step: done before"
    continue
  fi
  began=$SECONDS
  export -f "step_$step" has
  export python out
  if timeout "$limit" bash -c "step_$step" >"$out/$step.log" 2>&1; then
    touch "$out/$step.done"
    echo "$step: done in $((SECONDS - began)) s"
  else
    failed=1
    echo "$step: FAILED after $((SECONDS - began)) s; the end of its log:"
    tail -n 15 "$out/$step.log"
    if [ "$step" = gate ]; then
      echo "nothing is measured while results are wrong"
      break
    fi
  fi
done
tar -czf "$out/session.tar.gz" --exclude=./site --exclude=./session.tar.gz -C "$out" .
exit $failed
