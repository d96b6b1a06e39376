"""The benchmarks of a GPU, as far as they can be seen without one: tables and plans."""

import json
import runpy
import sys

import pytest
import torch

from benchmarks.kernels import bench_gemm, bench_machine_code, bench_quantize, tune
from benchmarks.lib import gpu_timing
from benchmarks.lib.gpu_timing import Ceilings, copies_for
from benchmarks.lib.render import markdown
from benchmarks.lib.shapes import LLAMA_8B
from dialect_kernels.gpu.tuning import GemmPlan, config_name, parse_plans

H200 = Ceilings(bytes_per_s=4.3e12, bf16_per_s=790e12, fp8_per_s=1500e12)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def layer(shape, **median_us):
    found = {
        name: {"median_us": us, "fastest_us": us, "slowest_us": us, "of_floor": 0.5}
        for name, us in median_us.items()
    }
    return {"shape": list(shape), "tokens": {"1": found, "4096": found}}


GEMM = {
    "ceilings": {},
    "missing": {"gemlite MXFP4 W4A8": "ImportError: No module named 'gemlite'"},
    "models": {
        "8B": {
            "qkv": layer((6144, 4096), bfloat16=10, W4A4=4, FP8=5, Humming=6),
            "o": layer((4096, 4096), bfloat16=10, W4A4=5, FP8=5),
            "down": layer((4096, 14336), bfloat16=30, W4A4=10, FP8=15, Humming=20),
        }
    },
}


def test_ratios_are_medians_over_the_layers_of_what_all_of_them_have():
    table = bench_gemm.tables(GEMM)["ratios_8b"]
    assert table[0] == ["tokens", "W4A4", "FP8"], "a peer that failed for one layer is left out"
    assert table[1] == ["1", "2.50 x", "2.00 x"]


def test_every_layer_has_its_times_with_the_share_of_the_floor():
    table = bench_gemm.tables(GEMM)["times_8b"]
    assert table[1][:3] == ["qkv 6144 x 4096", "1", "10.0 µs (50%)"]
    assert len(table) == 1 + 3 * 2
    for shown in bench_gemm.tables(GEMM).values():
        markdown(shown)


def test_a_missing_peer_is_named_with_its_reason():
    assert bench_gemm.tables(GEMM)["missing"][1][1] == "ImportError: No module named 'gemlite'"


def test_the_floor_is_bytes_for_few_tokens_and_operations_for_many():
    shape = (28672, 4096)
    few = bench_gemm._floor_s("W4A4", shape, 1, H200)
    assert few == pytest.approx((28672 * 4096 * 4.25 / 8) / 4.3e12, rel=0.01)
    many = bench_gemm._floor_s("W4A4", shape, 16384, H200)
    assert many == pytest.approx(2 * 16384 * 28672 * 4096 / 1500e12)
    assert bench_gemm._floor_s("W4A16", shape, 16384, H200) > many
    assert bench_gemm._floor_s("bfloat16", shape, 1, H200) == pytest.approx(few * 16 / 4.25, 0.01)


def test_copies_do_not_fit_into_the_cache():
    assert copies_for(200 << 20, 60 << 20) == 2
    assert copies_for(13 << 20, 60 << 20) * 13 >= 3 * 60
    assert copies_for(100, 60 << 20) == 64


def test_quantizing_is_compared_with_plain_fp8():
    times = {
        kind: {"median_us": 10.0 * (1 + number), "of_copy": 0.5}
        for number, kind in enumerate(bench_quantize.KINDS)
    }
    figures = {
        "tokens": {"16 x 4096": times},
        "share": {"2048": {"quantize_us": 50.0, "multiply_us": 950.0, "share": 0.05}},
        "weights": {"dialect_fp4": {"weights_per_s": 2e9}},
    }
    made = bench_quantize.tables(figures)
    assert made["tokens"][1][-1] == "3.00 x"
    assert made["share"][1] == ["2048", "50 µs", "5.0%"]
    assert made["weights"][1] == ["dialect_fp4", "2000", "3.5 s"], "6.98 billion weights"


@pytest.mark.parametrize("tokens", tune.TOKENS)
@pytest.mark.parametrize("shape", LLAMA_8B.fused_projections.values(), ids=str)
def test_candidates_are_plans_that_fit(shape, tokens):
    plans = list(tune.candidates(tokens, *shape, processors=132))
    assert len(plans) == len(set(plans))
    assert [plan.kind for plan in plans].count("scratch") == 1
    assert any(plan.kind == "fused" for plan in plans)
    for plan in plans:
        steps = shape[1] // plan.columns
        assert plan.splits == 1 or steps // plan.splits >= 2


def test_measured_plans_are_added_to_a_file(tmp_path):
    plan = GemmPlan("fused", 32, 64, 256, splits=3)
    first = {"dialect": {"16": tune.fields(plan)}}
    file = tune.write(tmp_path / "configs", 64, 128, "NVIDIA H200", first)
    assert file.name == config_name(64, 128, "NVIDIA H200")
    tune.write(tmp_path / "configs", 64, 128, "NVIDIA H200", {"none": {"1": {"kind": "scratch"}}})
    read = parse_plans(json.loads(file.read_text()))
    assert read == {"dialect": {16: plan}, "none": {1: GemmPlan("scratch")}}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@without_gpu
@pytest.mark.parametrize(
    "module",
    [
        "kernels.bench_gemm",
        "kernels.bench_quantize",
        "language.bench_serve_gpu",
        "video.bench_video_speed_gpu",
        "kernels.tune",
    ],
)
@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
def test_one_sentence_without_a_gpu(module, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^this benchmark measures a GPU, and there is no CUDA"):
        runpy.run_module(f"benchmarks.{module}", run_name="__main__", alter_sys=True)
    assert not (tmp_path / "out").exists()


def test_the_reason_of_a_peer_is_short():
    assert gpu_timing.reason(ValueError("no\nsuch thing")) == "ValueError: no"
    assert gpu_timing.reason(RuntimeError()) == "RuntimeError: "


def test_machine_code_is_shown_side_by_side():
    def row(gpu, operands, per_weight):
        return {
            "gpu": gpu, "operands": operands, "tokens": 16, "features": 64, "instruction": "QGMMA",
            "per_weight": per_weight, "registers": 100, "shared_kib": 1.0, "faults": [],
        }  # fmt: skip

    hopper = bench_machine_code.GPUS[90]
    figures = {
        "triton": {
            "3.6.0": [row(hopper, "FP8", 2.25), row(hopper, "bfloat16", 4.0)],
            "3.9.0": [row(hopper, "FP8", 2.5), row(hopper, "bfloat16", 5.0)],
        }
    }
    made = bench_machine_code.tables(figures)
    assert made["hopper"][1:] == [["16 x 64", "2.25", "2.50"]]
    assert made["gemm"][2] == [
        hopper,
        "bfloat16",
        "16 x 64",
        "`QGMMA`",
        "4.00",
        "100",
        "5.00",
        "100",
    ]
