"""The benchmark of thread bindings, as far as it can be seen without a server."""

import os

from benchmarks.language.bench_threads import BINDINGS, _environment, tables


def _taken(token_ms, rates):
    return {"single": {"tpot_ms": token_ms}, "many": {"output_tokens_per_s": rates}}


def test_a_binding_names_the_cores_of_this_process():
    cores = sorted(os.sched_getaffinity(0))
    assert BINDINGS == ("auto", "all", "nobind")
    assert _environment("auto") == {"VLLM_CPU_OMP_THREADS_BIND": "auto"}
    assert _environment("all") == {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    assert _environment("nobind")["OMP_NUM_THREADS"] == str(len(cores))


def test_ratios_are_taken_round_by_round():
    bindings = {
        "auto": _taken([100.0, 200.0, 100.0], [10.0, 20.0, 10.0]),
        "all": _taken([50.0, 50.0, 80.0], [15.0, 20.0, 30.0]),
    }
    found = tables({"cores": 2, "formats": {"w4a4": bindings}})["bindings"]
    assert found[1][1:] == ["`auto`", "100 ms", "–", "10.0", "–"]
    assert found[2][1:] == [
        "all 2", "50 ms", "2.00 x (1.25 to 4.00)", "20.0", "1.50 x (1.00 to 3.00)",
    ]  # fmt: skip
