"""The benchmark harness: gate first, honest captions, timings side by side."""

import os
import subprocess
import sys
import time

import pytest
import torch
from pydantic import ValidationError

from benchmarks.lib import gate, harness, memory
from benchmarks.lib.harness import Machine, Result, Timing, measure_result, ratio, time_calls
from benchmarks.lib.memory import PeakMemory


def test_nothing_is_measured_while_the_gate_finds_faults():
    measured = []
    with pytest.raises(SystemExit, match=r"(?s)bench: not measured.*two rows differ"):
        measure_result("bench", lambda: ["two rows differ"], lambda: measured.append(1) or {})
    assert not measured


def test_a_result_names_command_commit_machine_and_versions(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/anywhere/kernels/bench_x.py", "--rows", "5"])
    result = measure_result("x", list, lambda: {"seconds": 1.5})
    assert result.command == "python -m benchmarks.kernels.bench_x --rows 5"
    assert result.machine == Machine.here()
    assert result.figures == {"seconds": 1.5}
    assert set(result.versions) >= {"python", "torch"}
    caption = result.caption(["torch"])
    cpu = str(result.machine)
    for part in (result.command, cpu, f"torch {result.versions['torch']}", result.commit):
        assert part in caption
    assert caption.endswith(result.date[:10])
    assert "python" not in caption.removeprefix(f"`{result.command}`"), "only versions that matter"


def test_a_caption_is_one_short_line():
    machine = Machine(
        cpu="Intel(R) Xeon(R)  Processor", cores=2, instructions="AVX512", memory_gib=23.5, gpu=None
    )
    result = Result(
        name="x",
        command="python -m benchmarks.kernels.bench_x",
        commit="0123456789ab",
        date="2026-11-28T00:50Z",
        machine=machine,
        versions={"python": "3.11.7", "torch": "2.13.0", "vllm": "0.32.0"},
        figures={},
    )
    assert result.caption(["torch", "vllm"]) == (
        "`python -m benchmarks.kernels.bench_x`; Intel Xeon Processor, 2 cores; "
        "torch 2.13.0, vllm 0.32.0; commit 0123456789ab, 2026-11-28"
    )
    on_gpu = result.model_copy(
        update={"machine": machine.model_copy(update={"gpu": "NVIDIA H200"})}
    )
    assert "Processor, 2 cores, NVIDIA H200; torch 2.13.0; commit" in on_gpu.caption(["torch"])


def test_main_writes_what_read_result_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/anywhere/language/bench_speed.py", "--out", str(tmp_path)])
    harness.main(list, lambda: {"ratio": 0.1 + 0.2})
    (path,) = tmp_path.iterdir()
    assert harness.read_result(path).figures == {"ratio": 0.1 + 0.2}
    renamed = path.rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match="holds the result of 'speed'"):
        harness.read_result(renamed)


def test_options_reach_the_measurement_and_the_place_is_not_shown(monkeypatch, tmp_path):
    def options(parser):
        parser.add_argument("--rows", type=int, default=3)

    place = tmp_path / "made" / "here"
    argv = ["/anywhere/kernels/bench_speed.py", "--out", str(place), "--rows", "5"]
    monkeypatch.setattr(sys, "argv", argv)
    harness.main(list, lambda rows: {"rows": rows}, options)
    result = harness.read_result(place / "speed.json")
    assert result.figures == {"rows": 5}
    assert result.command == "python -m benchmarks.kernels.bench_speed --rows 5"


def test_each_part_is_written_before_the_next_is_measured(monkeypatch, tmp_path):
    def options(parser):
        parser.add_argument("--models", default="one,two")
        parser.add_argument("--rows", type=int, default=3)

    def measure(part, rows):
        return {"part": part, "rows": rows, "before": sorted(x.name for x in tmp_path.iterdir())}

    argv = ["/anywhere/kernels/bench_speed.py", "--out", str(tmp_path), "--rows", "5"]
    monkeypatch.setattr(sys, "argv", argv)

    def parts(models):
        return {name: name[0] for name in models.split(",")}

    harness.main_in_parts(list, measure, options, parts)
    first, second = (harness.read_result(tmp_path / f"speed-{part}.json") for part in "ot")
    assert first.figures == {"part": "one", "rows": 5, "before": []}
    assert second.figures == {"part": "two", "rows": 5, "before": ["speed-o.json"]}


def test_a_part_belongs_to_its_benchmark():
    assert harness.module_of("accuracy-smollm2") == "benchmarks.language.bench_accuracy"


def test_a_tree_without_history_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("BENCHMARK_COMMIT", "0123456789ab")
    assert harness.commit() == "0123456789ab"


def test_a_result_with_an_unknown_field_is_refused():
    result = measure_result("x", list, dict)
    with pytest.raises(ValidationError, match="host"):
        Result.model_validate(result.model_dump() | {"host": "somewhere"})


def test_uncommitted_code_is_marked(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    measured = tmp_path / "triton_kernels" / "dialect_kernels" / "ops.py"
    measured.parent.mkdir(parents=True)
    measured.write_text("1\n", encoding="utf-8")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    clean = harness.commit()
    assert len(clean) == 12
    (tmp_path / "README.md").write_text("not measured\n", encoding="utf-8")
    assert harness.commit() == clean
    measured.write_text("2\n", encoding="utf-8")
    assert harness.commit() == f"{clean}-dirty"


def test_a_function_runs_in_a_new_process_with_its_variables(monkeypatch):
    assert harness.in_new_process(os.getpid, {}) != os.getpid()
    capability = torch.backends.cpu.get_cpu_capability
    assert harness.in_new_process(capability, {"ATEN_CPU_CAPABILITY": "default"}) == "DEFAULT"


def test_a_function_of_the_started_module_runs_in_a_new_process(monkeypatch):
    """There it is not in `__main__`."""
    monkeypatch.setattr(sys, "argv", ["/anywhere/lib/gate.py"])
    monkeypatch.setattr(gate.golden_gate, "__module__", "__main__")
    assert harness.in_new_process(gate.golden_gate, {}) == []


def test_calls_are_timed_in_turn():
    order = []
    timings = time_calls(
        {"ours": lambda: order.append("o"), "peer": lambda: order.append("p")}, rounds=3, warmup=2
    )
    assert "".join(order) == "op" * 5
    assert [len(timing.rounds_s) for timing in timings.values()] == [3, 3]


def test_timing_and_ratio_are_taken_round_by_round():
    ours, peer = Timing.of([1.0, 2.0, 4.0]), Timing.of([2.0, 2.0, 12.0])
    assert (ours.median_s, ours.fastest_s, ours.slowest_s) == (2.0, 1.0, 4.0)
    assert ratio(peer, ours).rounds_s == [2.0, 1.0, 3.0]
    with pytest.raises(ValueError, match="argument 2"):
        ratio(peer, Timing.of([1.0]))


def test_peak_memory_counts_child_processes_and_keeps_the_peak():
    child = (
        "x = bytearray(200 << 20); print(flush=True); input(); del x; print(flush=True); input()"
    )
    parent = (
        "import subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {child!r}], stdin=sys.stdin, stdout=sys.stdout)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        with PeakMemory(process.pid, interval_s=0.01) as peak:
            while peak.samples == 0:
                time.sleep(0.01)
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
        process.communicate(b"\n")
    assert 200 << 20 < peak.anonymous < 260 << 20
    assert 200 << 20 < peak.pss < 300 << 20


def test_peak_memory_of_a_process_that_has_ended_is_zero():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    peak = PeakMemory(process.pid)
    peak.sample()
    assert (peak.pss, peak.anonymous, peak.samples) == (0, 0, 1)


def test_the_memory_of_a_gpu_counts_from_before_the_server(monkeypatch):
    """An imagined GPU of 100 bytes: 30 are in use before, at most 80 while it is watched."""
    free = iter([70, 60, 20, 50])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 100))
    watch = memory.watch(os.getpid(), memory.device_bytes())
    for _ in range(3):
        watch.sample()
    assert (watch.peak, watch.samples) == (50, 3)
