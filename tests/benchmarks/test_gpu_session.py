"""A session on a GPU, as far as it can be seen without one: steps, parcels, kernels, rehearsal."""

import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import tune
from benchmarks.lib import kernel_cache
from benchmarks.lib.kernel_cache import CacheError, Facts, Kernel
from benchmarks.lib.shapes import LLAMA_8B
from benchmarks.session import counters, products, records, runner, small_gate, steps
from benchmarks.session.records import Lines, Work
from benchmarks.session.runner import Session, Step
from dialect_kernels.gpu.tuning import GemmPlan

ROOT = Path(steps.__file__).parents[2]


def session(tmp_path, chosen, seconds=60.0):
    return Session(chosen, tmp_path / "scratch", tmp_path / "out", "abc", seconds, time.monotonic())


def lines_of(parcel, name):
    with tarfile.open(parcel) as archive:
        file = archive.extractfile(f"{name}.jsonl")
        return [json.loads(line) for line in file.read().splitlines()]


def measure(work):
    work.lines.add(found=1)


def fail(work):
    work.lines.add(found=2)
    raise RuntimeError("a kernel failed")


def hang(work):
    work.lines.add(found=3)
    time.sleep(60)


def look(work):
    """Whether what came before has come back already."""
    out = work.results.parents[1] / "out" / records.PARCEL
    work.lines.add(before=[line["found"] for name in "abc" for line in lines_of(out, name)])


def test_a_step_neither_ends_nor_delays_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_LEAST_S", 0.5)
    chosen = [
        Step("a", "", 30, measure),
        Step("b", "", 30, fail),
        Step("c", "", 1, hang),
        Step("d", "", 30, look),
    ]
    began = time.monotonic()
    ran = session(tmp_path, chosen)
    assert ran.run(set()) == ["b", "c"]
    assert time.monotonic() - began < 30
    parcel = tmp_path / "out" / records.PARCEL
    assert lines_of(parcel, "d") == [{"step": "d", "commit": "abc", "before": [1, 2, 3]}]
    log = (ran.results / "session.log").read_text()
    assert "b: FAILED" in log
    assert "c: ended by its limit" in log
    assert "a kernel failed" in (ran.results / "b.log").read_text()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [records.PARCEL]


def test_a_session_goes_on_after_an_earlier_one(tmp_path):
    first = session(tmp_path / "first", [Step("a", "", 30, measure), Step("b", "", 30, fail)])
    first.run(set())
    second = session(tmp_path / "second", [Step("a", "", 30, fail), Step("b", "", 30, measure)])
    done = records.take_over(tmp_path / "first" / "out", second.results)
    assert done == {"a"}
    assert second.run(done) == []
    parcel = tmp_path / "second" / "out" / records.PARCEL
    assert [line["found"] for line in lines_of(parcel, "a")] == [1]
    assert [line["found"] for line in lines_of(parcel, "b")] == [2, 1]


def test_no_step_is_begun_without_time(tmp_path):
    ran = session(tmp_path, [Step("a", "", 30, measure)], seconds=8.0)
    assert ran.run(set()) == ["a"]
    assert not (ran.results / "a.jsonl").exists()


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "a.jsonl"
    Lines(file, {"step": "a"}).add(us=1.5)
    with file.open("a") as opened:
        opened.write('{"step": "a", "us": 2')
    assert records.read_lines(file) == [{"step": "a", "us": 1.5}]


def test_a_parcel_leaves_out_what_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_MOST_BYTES", 8000)
    results = tmp_path / "results"
    results.mkdir()
    (results / "a.jsonl").write_text("{}\n")
    (results / "b.log").write_bytes(bytes(9000))
    parcel = records.pack(results, tmp_path / "out", rehearsal=True)
    assert parcel.name == "rehearsal-session.tar.gz"
    with tarfile.open(parcel) as archive:
        assert sorted(archive.getnames()) == ["a.jsonl", "left_out.txt"]
        assert archive.extractfile("left_out.txt").read() == b"b.log\n"


def test_results_need_the_gate(tmp_path):
    assert small_gate.faults(tmp_path) == ["the session's gate has not run to its end"]
    lines = Lines(tmp_path / "gate.jsonl", {})
    lines.add(check="weights", passed=True, detail="")
    assert len(small_gate.faults(tmp_path)) == 1
    (tmp_path / "gate.done").touch()
    assert small_gate.faults(tmp_path) == []
    lines.add(check="splits", passed=False, detail="tensors [3] differ")
    assert small_gate.faults(tmp_path) == ["splits: tensors [3] differ"]


@pytest.mark.slow
def test_the_gate_judges(tmp_path, monkeypatch):
    """On the CPU, whose back end it can judge too; what names Triton's kernels fails there."""
    monkeypatch.setattr(small_gate, "_DEVICE", "cpu")
    monkeypatch.setattr(small_gate, "_REPEATS", 2)
    monkeypatch.setattr(small_gate, "LLAMA_8B", LLAMA_8B.from_config("small", SMALL))
    work = Work(tmp_path, Lines(tmp_path / "gate.jsonl", {}), False, time.monotonic() + 100)
    only_gpu = {"decoded, dialect_fp4", "decoded, semantic_32", "tokens, dialect"}
    with pytest.raises(SystemExit):
        small_gate.check(work)
    found = {line["check"]: line for line in records.read_lines(tmp_path / "gate.jsonl")}
    assert {name for name, line in found.items() if not line["passed"]} == only_gpu
    assert len(found) == 42

    right = small_gate.dialect_linear
    monkeypatch.setattr(
        small_gate, "dialect_linear", lambda *given, **named: 1.05 * right(*given, **named)
    )
    again = Work(tmp_path, Lines(tmp_path / "again.jsonl", {}), False, time.monotonic() + 100)
    with pytest.raises(SystemExit):
        small_gate.check(again)
    wrong = {
        line["check"] for line in records.read_lines(tmp_path / "again.jsonl") if not line["passed"]
    }
    products_ = {name for name in found if name.startswith(("exact", "default"))}
    assert wrong == only_gpu | products_


SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}


def test_the_profilers_table_is_found_in_its_output():
    output = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","eight_bit_kernel(int)","dram__bytes_read.sum","Mbyte","62.3"
"1","_quantize_activation_kernel","dram__bytes_read.sum","byte","8,192"
"""
    assert counters.parsed(output) == [
        ("eight_bit_kernel #0", "dram__bytes_read.sum", "Mbyte", "62.3"),
        ("_quantize_activation_kernel #1", "dram__bytes_read.sum", "byte", "8,192"),
    ]


@pytest.mark.parametrize("tokens", products.TOKENS)
def test_variants_differ_from_todays_plan_in_one_way(tokens):
    today = GemmPlan("fused", 16, 64, 256, splits=2, num_stages=6)
    plans = list(products.variants(today, tokens, 4096))
    assert plans[0] == today
    assert {plan.num_stages for plan in plans} >= {3, 4, 6, 7, 8}
    assert ({plan.splits for plan in plans} >= {1, 2, 3, 4, 6, 8}) == (tokens <= 16)
    assert any(plan.tokens >= min(tokens, 128) for plan in plans[2:])


@pytest.mark.parametrize("tokens", [1, 48, 256])
def test_few_candidates_are_few(tokens):
    for features, columns in LLAMA_8B.fused_projections.values():
        derived = GemmPlan("fused", 16 if tokens == 1 else 64, 64, 256, splits=2, num_stages=4)
        few = tune.few_candidates(derived, tokens, features, columns, processors=132)
        assert few[0] == derived
        assert GemmPlan("scratch") in {GemmPlan(plan.kind) for plan in few}
        assert 5 <= len(few) == len(set(few)) <= 19


def test_what_was_tuned_is_not_tuned_again(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert tune.missing(tmp_path, (64, 128), "dialect", [1, 16]) == [1, 16]
    plan = {"dialect": {"16": {"kind": "scratch"}}}
    tune.write(tmp_path, 64, 128, "NVIDIA H200", plan)
    assert tune.missing(tmp_path, (64, 128), "dialect", [1, 16]) == [1]
    assert tune.missing(tmp_path, (64, 128), "none", [16]) == [16]


FACTS = Facts(key="k", triton="3.6.0", sources="s", kernels=1)
KERNELS = [Kernel("dialect_kernels.gpu.gemm", "eight_bit_kernel", "{}")]


@pytest.fixture
def compiled(tmp_path):
    """A folder as Triton's cache."""
    entry = tmp_path / "cache" / "ABC"
    entry.mkdir(parents=True)
    names = ("kernel.cubin", "kernel.json", "kernel.ttir")
    for name in names:
        (entry / name).write_text(name)
    group = {"child_paths": {name: str(entry / name) for name in names}}
    (entry / "__grp__kernel.json").write_text(json.dumps(group))
    return tmp_path / "cache"


def test_a_packed_cache_holds_no_paths_and_gets_those_of_its_place(compiled, tmp_path):
    archive, place = tmp_path / "kernels.tar.gz", tmp_path / "elsewhere"
    kernel_cache.pack(compiled, KERNELS, FACTS, archive, 1 << 20)
    with tarfile.open(archive) as packed:
        for member in packed:
            assert str(tmp_path).encode() not in packed.extractfile(member).read()
    assert kernel_cache.unpack(archive, place) == (FACTS, KERNELS)
    group = json.loads((place / "ABC" / "__grp__kernel.json").read_text())["child_paths"]
    assert group == {name: str(place / "ABC" / name) for name in ("kernel.cubin", "kernel.json")}
    assert all(Path(path).is_file() for path in group.values())


def test_a_cache_that_is_too_large_is_refused(compiled, tmp_path):
    with pytest.raises(CacheError, match="bytes; allowed are 100"):
        kernel_cache.pack(compiled, KERNELS, FACTS, tmp_path / "kernels.tar.gz", 100)
    assert not (tmp_path / "kernels.tar.gz").exists()


def test_an_archive_that_is_no_cache_is_refused(compiled, tmp_path):
    archive = tmp_path / "kernels.tar.gz"
    archive.write_bytes(b"nothing")
    with pytest.raises(CacheError, match="is no kernel cache"):
        kernel_cache.unpack(archive, tmp_path / "elsewhere")
    kernel_cache.pack(compiled, KERNELS, FACTS, archive, 1 << 20)
    with tarfile.open(archive) as packed:
        kept = {member.name: packed.extractfile(member).read() for member in packed}
    with tarfile.open(archive, "w:gz") as packed:
        for name, content in (kept | {"cache/../outside": b"x"}).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    with pytest.raises(CacheError, match="does not belong into a cache"):
        kernel_cache.unpack(archive, tmp_path / "elsewhere")
    assert not (tmp_path / "outside").exists()


def test_the_other_triton_has_to_be_one_of_this_version(tmp_path):
    with pytest.raises(CacheError, match="holds no Triton"):
        kernel_cache.key_of(tmp_path)
    package = tmp_path / "triton"
    (package / "runtime").mkdir(parents=True)
    (package / "runtime" / "cache.py").write_text("")
    (package / "__init__.py").write_text("__version__ = '0.1.0'\n")
    with pytest.raises(CacheError, match="unpack a wheel of this version"):
        kernel_cache.key_of(tmp_path)


def started(*command, **environment):
    return subprocess.run(
        command,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_sentence_without_a_gpu(tmp_path):
    done = started("benchmarks/gpu_session.sh", "--kernels", "none.tar.gz", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "this benchmark measures a GPU, and there is no CUDA device" in done.stderr
    assert "device:" not in done.stdout


WITHOUT_CUDA = """
import torch
for name in ("is_available", "device_count", "current_device", "get_device_name", "_lazy_init"):
    setattr(torch.cuda, name, None)
torch._C._cuda_getDeviceCount = None
import benchmarks.session.__main__
from benchmarks.lib.kernel_cache import settle_names
settle_names()
"""


@pytest.mark.slow
def test_the_process_that_forks_steps_does_not_use_cuda():
    done = started(sys.executable, "-c", WITHOUT_CUDA, PYTHONPATH="triton_kernels")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_rehearsal_runs_steps_and_lists_their_kernels(tmp_path):
    """The list's kernels are compiled once, found again, and by a process that sorts otherwise."""
    scratch = tmp_path / "scratch"
    chosen = ("--steps", "device", "probes", "--", str(tmp_path / "out"))
    done = started("benchmarks/gpu_session.sh", "--rehearse", "--scratch", str(scratch), *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "estimates on the card, in seconds; not measured" in done.stdout
    assert "unfinished: nothing" in done.stdout
    parcel = tmp_path / "out" / "rehearsal-session.tar.gz"
    assert all(line["rehearsal"] for line in lines_of(parcel, "probes"))
    assert not (tmp_path / "out" / records.PARCEL).exists()
    list_ = scratch / "rehearsed" / "probes.kernels"
    kernels = kernel_cache.read_list(list_)
    assert {kernel.name for kernel in kernels} == {"one_step_kernel"}
    assert len(kernels) == 2

    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": "triton_kernels"}
    for order in (kernels, kernels[::-1]):
        kernel_cache.write_list(list_, order)
        command = (sys.executable, "-m", "benchmarks.lib.kernel_cache", "compile", str(list_))
        compiled = started(*command, "--workers", "1", **cache)
        assert compiled.stdout == "2 of 2 kernels are compiled\n", compiled.stderr
        assert len(list((tmp_path / "cache").iterdir())) == 2
