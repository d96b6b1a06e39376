"""The benchmark of servers, as far as it can be seen without one: what is read, shown and refused.

The texts are what vLLM 0.32 said on a CPU; those of a GPU follow the format strings of its source.
"""

import itertools
import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.language import bench_serve, measured_server, serve_rounds, vllm_bench
from benchmarks.language.serve_rounds import Session
from benchmarks.language.served_models import DEMO, FORMATS, SHAPES, Load, layer_bytes, prepare
from benchmarks.lib.render import markdown
from benchmarks.lib.shapes import LLAMA_8B, Llama
from demo.language.server import ServerError
from dialect_kernels import quantize
from tests.support.processes import is_running

CPU_LOG = """
(EngineCore pid=9846) INFO 11-27 20:34:18 [ompmultiprocessing.py:185] OpenMP thread binding info: 
(EngineCore pid=9846) INFO 11-27 20:34:18 [ompmultiprocessing.py:185] \tlocal_world_size=1, reserve_cpu_num=1
(EngineCore pid=9846) INFO 11-27 20:34:18 [ompmultiprocessing.py:185] \tlocal_rank=0, core ids=[0]
(EngineCore pid=9846) INFO 11-27 20:34:18 [ompmultiprocessing.py:185] \treserved_cpus=[1]
(Worker pid=9903) INFO 11-27 20:34:39 [default_loader.py:501] Loading weights took 13.80 seconds
(Worker pid=9903) INFO 11-27 20:35:25 [cpu_worker.py:260] Explicitly set (1.0/22.59) GiB for KV cache on node 0.
(EngineCore pid=9846) INFO 11-27 20:35:25 [kv_cache_utils.py:2327] CPU KV cache size: 32,768 tokens, Maximum concurrency for 512 tokens per request: 64.00x
(APIServer pid=9761) INFO 11-27 20:35:37 [loggers.py:335] Engine 000: Running: 1 reqs, Waiting: 0 reqs, CPU KV cache usage: 0.4%
"""  # noqa: E501, W291
GPU_LOG = """
(EngineCore pid=1) INFO 11-27 20:34:39 [gpu_model_runner.py:5150] Model loading took 5.7 GiB memory and 8.123456 seconds
(EngineCore pid=1) INFO 11-27 20:35:25 [gpu_worker.py:760] Available KV cache memory: 61.25 GiB
(EngineCore pid=1) INFO 11-27 20:35:25 [kv_cache_utils.py:2327] GPU KV cache size: 501,760 tokens, Maximum concurrency for 2,048 tokens per request: 245.00x
"""  # noqa: E501

CLIENT = json.loads("""{
    "num_prompts": 3, "request_rate": "inf", "max_concurrency": 1, "duration": 11.931694292999964,
    "completed": 3, "failed": 0, "total_input_tokens": 192, "total_output_tokens": 96,
    "request_throughput": 0.2514311820543397, "output_throughput": 8.04579782573887,
    "mean_ttft_ms": 682.2760830000334, "median_ttft_ms": 687.7636169999732,
    "mean_tpot_ms": 106.28093605376267, "median_tpot_ms": 105.76403809677099,
    "mean_itl_ms": 106.28093605376269, "median_itl_ms": 106.28168400012328
}""")
CLIENT["itls"] = [[0.106] * 31, [0.106] * 31, [0.106] * 28 + [2.4e-06, 2.3e-06, 9.9e-05]]
LOAD = Load(at_once=1, prompts=3, input_tokens=64, output_tokens=32)

NO_KERNEL = (
    "vllm serve ended with status 1 (ValueError: Failed to find a kernel that can implement the "
    "MXFP4 linear layer. Reasons: ); the end of bench-serve-tn7qi5x5/log:\n"
    '      File "/somewhere/vllm/v1/engine/core_client.py", line 1120, in __init__\n'
)
NO_FP8 = (
    "vllm serve ended with status 1 (RuntimeError: _C::static_scaled_fp8_quant() expected at most "
    "0 argument(s) but received 4 argument(s). Declaration: _C::static_scaled_fp8_quant() -> ()); "
    "the end of bench-serve-tn7qi5x5/log:\n    RuntimeError: Engine core initialization failed."
)


def test_a_cpu_log_tells_cores_and_room():
    assert measured_server.read_log(CPU_LOG) == {
        "cores": 1,
        "kv_cache_tokens": 32_768,
        "kv_cache_gib": 1.0,
        "model_gib": None,
    }
    two = CPU_LOG.replace("core ids=[0]", "core ids=[0, 1]")
    assert measured_server.read_log(two)["cores"] == 2


def test_a_gpu_log_tells_memory_and_room():
    assert measured_server.read_log(GPU_LOG) == {
        "cores": None,
        "kv_cache_tokens": 501_760,
        "kv_cache_gib": 61.25,
        "model_gib": 5.7,
    }


def test_the_clients_figures_are_medians_of_its_requests():
    assert vllm_bench.read_client(CLIENT, LOAD) == {
        "ttft_ms": 687.7636169999732,
        "tpot_ms": 105.76403809677099,
        "burst_share": 3 / 93,
        "output_tokens_per_s": 8.04579782573887,
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"completed": 2, "failed": 1}, "2 of 3 requests were answered, with 96 tokens instead"),
        (
            {"total_output_tokens": 95},
            "3 of 3 requests were answered, with 95 tokens instead of 96",
        ),
    ],
)
def test_an_unanswered_request_is_no_figure(change, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        vllm_bench.read_client(CLIENT | change, LOAD)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            NO_KERNEL,
            "ValueError: Failed to find a kernel that can implement the MXFP4 linear layer.",
        ),
        (
            NO_FP8,
            "RuntimeError: _C::static_scaled_fp8_quant() expected at most 0 argument(s) but "
            "received 4 argument(s). Declaration: _C::static_scaled_fp8_quant() -> ()",
        ),
        ("vllm serve ended with status -9; the end of /a:\n", "vllm serve ended with status -9"),
        (
            "vllm serve ended with status 1 (OSError: ~/m/x.json is no file); the end of /a:\n",
            "OSError: PATH is no file",
        ),
        (
            "vllm serve was not ready after 900 s; the end of /a/log:\n    INFO",
            "vllm serve was not ready after 900 s",
        ),
        ("2 of 3 requests were answered", "2 of 3 requests were answered"),
        ("see https://docs.vllm.ai/en or vllm/x", "see https://docs.vllm.ai/en or vllm/x"),
    ],
)
def test_a_refusal_is_one_sentence_without_a_path(error, reason):
    assert measured_server.refusal(error) == reason


def test_latency_is_the_median_and_throughput_counts_answers():
    latency = {"avg_latency": 3.0, "latencies": [1.0, 6.0, 2.0], "percentiles": {"50": 2.0}}
    assert vllm_bench.read_offline("latency", latency, LOAD) == 2.0
    throughput = {"elapsed_time": 2.0, "num_requests": 8, "total_num_tokens": 768}
    assert vllm_bench.read_offline("throughput", throughput, LOAD) == 8 * 32 / 2


@pytest.mark.parametrize("key", SHAPES)
def test_layers_are_counted_as_they_are_stored(key):
    """One layer with an eighth of the channels, really quantized."""
    model = SHAPES[key].model
    small = replace(
        model, hidden=model.hidden // 8, intermediate=model.intermediate // 8, head=32, layers=1
    )
    packed = [quantize(torch.ones(rows, columns)) for rows, columns in small.projections.values()]
    stored = sum(p.codes.nbytes + p.meta.nbytes + p.row_exponent.nbytes for p in packed)
    assert layer_bytes(small, FORMATS["w4a4"]) == stored


def test_layers_by_hand():
    """LLaMA-3-8B: 218,103,808 weights and 43,008 rows a layer, 32 layers."""
    weights, rows = 32 * 218_103_808, 32 * 43_008
    assert layer_bytes(LLAMA_8B, FORMATS["bf16"]) == 2 * weights
    assert layer_bytes(LLAMA_8B, FORMATS["fp8"]) == weights
    assert layer_bytes(LLAMA_8B, FORMATS["mxfp4"]) == weights // 2 + weights // 32
    assert layer_bytes(LLAMA_8B, FORMATS["w4a16"]) == weights // 2 + weights // 32 + rows
    assert LLAMA_8B.linear_weights == weights


def test_a_shape_is_what_its_config_says():
    for shape in SHAPES.values():
        again = type(shape.model).from_config(shape.model.name, shape.model.config)
        assert again == shape.model
        fused = sum(n * k for n, k in shape.model.fused_projections.values())
        assert shape.model.layers * fused == shape.model.linear_weights


def test_quantized_layers_meet_the_goal():
    for shape in SHAPES.values():
        sizes = [layer_bytes(shape.model, FORMATS[key]) for key in ("w4a4", "bf16")]
        assert sizes[0] <= 0.28 * sizes[1]


def test_commands_differ_in_the_format_only_and_stay_on_this_machine():
    for key, shape in SHAPES.items():
        lines = bench_serve.commands(key, list(FORMATS), eager=True, offline=True)
        assert not re.search(r"(^|[\s\"'=:])(~|/[A-Za-z])", "\n".join(lines)), "a path"
        servers = [line for line in lines if "vllm serve MODEL" in line]
        assert len(servers) == len(FORMATS)
        common = servers[0]
        for line, form in zip(servers, FORMATS.values(), strict=True):
            variables = "".join(f"{name}={value} " for name, value in form.environment.items())
            quantization = f" --quantization {form.method}" if form.method else ""
            options = json.dumps({"embeddings": True, "lm_head": True})
            overrides = shlex.quote(json.dumps({"quantization_config_dict_json": options}))
            asked = f" --hf-overrides {overrides}" if form.vocabulary else ""
            assert line == variables + common + quantization + asked
        clients = [line for line in lines if "vllm bench serve" in line]
        assert len(clients) == len(shape.loads) + 1, "the slow format's is another one"
        for line in clients:
            assert "--host 127.0.0.1 --port PORT --model MODEL" in line
        assert [line.split()[2] for line in lines[-2:]] == ["latency", "throughput"]


def test_dummy_weights_are_asked_for_where_no_checkpoint_is_written(tmp_path):
    form = FORMATS["w4a4"]
    dummy = " ".join(measured_server.server_arguments(SHAPES["llama-3-8b"], form, eager=False))
    assert "--load-format dummy" in dummy
    assert "--enforce-eager" not in dummy
    shipped = measured_server.server_arguments(SHAPES["demo"], form, eager=True)
    assert "--load-format" not in shipped
    assert "--enforce-eager" in shipped
    assert prepare(SHAPES["demo"], tmp_path / "demo") == DEMO
    assert not (tmp_path / "demo").exists()


def test_the_warm_up_asks_once_for_each_place():
    assert vllm_bench.warmup(Load(8, 48, 64, 64)) == Load(8, 8, 64, 2)


def run(ttft, tpot, rate):
    return {
        "ttft_ms": list(ttft),
        "tpot_ms": list(tpot),
        "burst_share": [0.0, 0.04, 0.0],
        "output_tokens_per_s": list(rate),
    }


def served(single, many=None, **said):
    found = {
        "start_s": [40.0, 60.0, 50.0],
        "peak_start_bytes": [2 << 30, 3 << 30, 2 << 30],
        "peak_answering_bytes": [1 << 30, 1 << 30, 2 << 30],
        "cores": [1, 1, 1],
        "kv_cache_tokens": [32_768] * 3,
        "kv_cache_gib": [1.0] * 3,
        "model_gib": [None] * 3,
        "single": single,
    }
    return found | ({"many": many} if many else {}) | said


def example():
    bf16 = served(run([300, 320, 280], [200, 190, 210], [5, 5.2, 4.8]), run([1500], [210], [31]))
    w4a4 = served(run([600, 640, 620], [100, 100, 70], [8, 8.2, 8.4]), run([4700], [170], [25]))
    torch_path = served(run([16_000], [8000], [0.12]))
    shape = SHAPES["llama-3.2-1b"]
    return {
        "device": "cpu",
        "rounds": 3,
        "repeats": 1,
        "environment": {},
        "commands": {},
        "refused": {"mxfp4": "ValueError: no kernel | none", "fp8": "no op"},
        "shapes": {
            "llama-3.2-1b": {
                "name": shape.name,
                "weights": shape.weights,
                "loads": {},
                "layer_bytes": {k: layer_bytes(shape.model, f) for k, f in FORMATS.items()},
                "formats": {"bf16": bf16, "w4a4": w4a4, "w4a4-torch": torch_path},
            }
        },
    }


def rows_of(figures, table):
    return {row[1]: row[2:] for row in bench_serve.tables(figures)[table][1:]}


def test_times_are_medians_and_ratios_are_taken_run_by_run():
    rows = rows_of(example(), "single")
    assert rows["bf16"] == ["300 ms", "200 ms", "–", "5", "–"]
    assert rows["BlockDialect W4A4"][:3] == ["620 ms", "100 ms", "2.00 x (1.90 to 3.00)"]
    assert rows["BlockDialect W4A4"][3:] == ["8.2", "1.60 x (1.58 to 1.75)"]
    rows = rows_of(example(), "many")
    assert rows["BlockDialect W4A4"] == [
        "4700 ms", "170 ms", "1.24 x (1.24 to 1.24)", "25", "0.81 x (0.81 to 0.81)",
    ]  # fmt: skip
    assert "BlockDialect W4A4, torch path" not in rows


def test_a_round_that_was_cut_short_does_not_count():
    figures = example()
    bf16 = figures["shapes"]["llama-3.2-1b"]["formats"]["bf16"]
    for figure, value in (("ttft_ms", 9e9), ("tpot_ms", 9e9), ("output_tokens_per_s", 9e9)):
        bf16["single"][figure].append(value)
        bf16["many"][figure].append(value)
    for table in ("single", "many"):
        assert rows_of(figures, table) == rows_of(example(), table)


def test_the_slow_path_is_compared_by_the_time_of_a_token_alone():
    """Its request is a shorter one, so that output tokens per second are not to be compared."""
    row = rows_of(example(), "single")["BlockDialect W4A4, torch path"]
    assert row == ["16000 ms", "8000 ms", "0.03 x (0.03 to 0.03)", "0.12", "–"]


def test_refused_formats_stand_in_every_table_with_their_reason():
    found = bench_serve.tables(example())
    for table in ("single", "many"):
        rows = rows_of(example(), table)
        assert rows["MXFP4"] == rows["FP8"] == ["not served", "–", "–", "–", "–"]
    assert rows_of(example(), "memory")["MXFP4"][2:] == ["not served", "–", "–", "–"]
    assert found["refused"][1:] == [["MXFP4", "ValueError: no kernel \\| none"], ["FP8", "no op"]]
    for table in found.values():
        markdown(table)


def test_tokens_that_arrive_in_bursts_have_no_times_of_their_own():
    figures = example()
    forms = figures["shapes"]["llama-3.2-1b"]["formats"]
    forms["w4a4"]["single"]["burst_share"] = [0.0, 0.9, 0.0]
    row = rows_of(figures, "single")["BlockDialect W4A4"]
    assert row == ["–", "–", "–", "8.2", "1.60 x (1.58 to 1.75)"]
    forms["bf16"], forms["w4a4"] = forms["w4a4"], forms["bf16"]
    row = rows_of(figures, "single")["BlockDialect W4A4"]
    assert row[:3] == ["300 ms", "200 ms", "–"], "nothing to compare it with"


def test_memory_shows_bytes_of_layers_and_the_largest_peaks():
    row = rows_of(example(), "memory")["BlockDialect W4A4"]
    assert row == [
        "517.3 MB", "0.266 x", "50 s", "3.00 GiB", "2.00 GiB", "1 GiB, 32,768 tokens",
    ]  # fmt: skip


def test_goals_stand_beside_what_was_measured():
    goals = bench_serve.tables(example())["goals"]
    assert [row[1:] for row in goals[1:]] == [
        ["≥ 1.5 x", "2.00 x"],
        ["≥ 3 x", "80.00 x"],
        ["≥ 1.3 x", "0.81 x"],
        ["≤ 0.28 x", "0.266 x"],
    ]
    assert "goals" not in bench_serve.tables(example() | {"device": "cuda"})


def test_engines_of_their_own_have_a_table_if_they_were_run():
    figures = example()
    assert "offline" not in bench_serve.tables(figures)
    bf16 = figures["shapes"]["llama-3.2-1b"]["formats"]["bf16"]
    bf16["offline"] = {"latency": [6.0, 7.0, 6.5], "throughput": [30.0, 31.0, 32.0]}
    assert rows_of(figures, "offline") == {"bf16": ["6.50 s", "31.0 tokens/s"]}


def test_answers_must_be_equal():
    tokens, logprobs = ["def", " read"], [-0.5, -0.25]
    answers = {"packed": (tokens, logprobs), "online": (["def", " write"], logprobs)}
    assert bench_serve.different(answers) == ["online answers 'def write', packed 'def read'"]
    assert bench_serve.different(answers | {"online": (tokens, logprobs)}) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may add in another order")
def test_on_a_cpu_log_probabilities_must_be_equal_too():
    answers = {"packed": (["a"], [-0.5]), "online": (["a"], [-0.5000001])}
    (fault,) = bench_serve.different(answers)
    assert "other log-probabilities" in fault


@pytest.fixture
def measured(monkeypatch):
    """What a session starts, in order: (format, seeds); nothing is started."""
    started = []

    def measure_server(shape, model, form, eager, seeds, folder):
        started.append((form.name, list(seeds)))
        if form.method in ("mxfp4", "fp8"):
            raise ServerError(NO_KERNEL)
        taken = seeds[:1] if form.slow else seeds
        return {"model_gib": [None], "single": {"tpot_ms": [float(seed) for seed in taken]}}

    monkeypatch.setattr(serve_rounds, "measure_server", measure_server)
    return started


def session(formats, **options):
    given = {"rounds": 2, "repeats": 2, "eager": True, "offline": False, "minutes": 600} | options
    return Session(formats, **given)


def test_formats_take_turns_and_what_is_refused_or_slow_is_started_once(measured, tmp_path):
    given = session(["bf16", "mxfp4", "w4a4", "w4a4-torch"])
    found = given.measure_shape(SHAPES["demo"], tmp_path / "a")
    given.measure_shape(SHAPES["demo"], tmp_path / "a")
    names = [FORMATS[key].name for key in ("bf16", "mxfp4", "w4a4", "w4a4-torch")]
    assert [name for name, _ in measured[:6]] == [*names, names[0], names[2]]
    assert [name for name, _ in measured].count("MXFP4") == 1, "not tried for the other shape"
    assert measured[0][1] == [1, 2]
    assert measured[4][1] == [3, 4], "other prompts in every run"
    assert found["formats"]["w4a4"]["single"]["tpot_ms"] == [1, 2, 3, 4]
    assert found["formats"]["w4a4-torch"]["single"]["tpot_ms"] == [1]
    assert given.refused == {
        "mxfp4": "ValueError: Failed to find a kernel that can implement the MXFP4 linear layer."
    }


def test_no_server_is_started_when_time_is_over(measured, tmp_path, monkeypatch):
    clock = itertools.count(start=0, step=60)
    monkeypatch.setattr(serve_rounds.psutil.Process, "create_time", lambda _: 0)
    monkeypatch.setattr(serve_rounds.time, "time", lambda: next(clock))
    given = session(["bf16", "w4a4", "fp8"], minutes=2)
    found = given.measure_shape(SHAPES["demo"], tmp_path / "a")
    assert [name for name, _ in measured] == ["bf16", "BlockDialect W4A4"]
    assert found["formats"]["bf16"]["single"]["tpot_ms"] == [1, 2], "the second round is left out"
    assert given.refused == {"fp8": "not started: the 2 minutes allowed were over"}


def test_a_method_that_quantizes_nothing_is_refused():
    bf16, form = {"model_gib": [15.0]}, FORMATS["mxfp4"]
    serve_rounds._check_quantized(form, {"model_gib": [5.7]}, bf16)
    serve_rounds._check_quantized(form, {"model_gib": [None]}, bf16)
    serve_rounds._check_quantized(FORMATS["bf16"], {"model_gib": [15.0]}, None)
    with pytest.raises(RuntimeError, match=r"quantizes nothing: loading took 14\.9 GiB"):
        serve_rounds._check_quantized(form, {"model_gib": [14.9]}, bf16)


def test_a_server_gets_its_own_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.delenv("BLOCKDIALECT_CPU_KERNEL", raising=False)
    before = dict(os.environ)
    log = tmp_path / "log"
    server = measured_server.MeasuredServer(
        Path("model"), log, ["--dtype", "bfloat16"], FORMATS["w4a4-torch"].environment
    )
    assert server._command[1:6] == ["-P", "-m", "vllm.entrypoints.cli.main", "serve", "model"]
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    server._command = [sys.executable, "-c", program]
    with server:
        assert dict(os.environ) == before
        server._process.wait()
    given = json.loads(log.read_text(encoding="utf-8"))
    assert given["BLOCKDIALECT_CPU_KERNEL"] == "0"
    assert given["VLLM_LOGGING_LEVEL"] == "INFO", "its log is read"
    assert given["HF_HUB_OFFLINE"] == "1"


FORKING = """
import json, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
open(sys.argv[sys.argv.index("--output-json") + 1], "w").write(json.dumps({"latencies": [2.5]}))
raise SystemExit(int("fp8" in sys.argv))
"""


def test_an_engine_of_its_own_is_gone_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_bench, "VLLM", [sys.executable, "-c", FORKING])
    shape = SHAPES["llama-3.2-1b"]
    arguments = ("latency", tmp_path, shape, FORMATS["w4a4"], True, tmp_path)
    assert vllm_bench.run_offline(*arguments) == 2.5
    assert not is_running(int((tmp_path / "latency.log").read_text()))
    failing = ("latency", tmp_path, shape, FORMATS["fp8"], True, tmp_path)
    with pytest.raises(RuntimeError, match="vllm bench latency ended with status 1"):
        vllm_bench.run_offline(*failing)
    assert not is_running(int((tmp_path / "latency.log").read_text()))


@pytest.mark.slow
def test_a_model_of_dummy_weights_is_served_and_measured(tmp_path, monkeypatch):
    """A real server and client: few prompts, a tiny model that exists as a config.json alone."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model = Llama("tiny", 256, 512, 2, 4, 2, 64, vocabulary=2000)
    load = Load(at_once=2, prompts=2, input_tokens=8, output_tokens=4)
    shape = replace(SHAPES["llama-3-8b"], model=model, context=64, loads={"many": load})
    given = session(["w4a4"], rounds=1)
    found = given.measure_shape(shape, tmp_path / "model")
    assert given.refused == {}
    w4a4 = found["formats"]["w4a4"]
    assert len(w4a4["many"]["output_tokens_per_s"]) == 2
    assert min(w4a4["many"]["output_tokens_per_s"]) > 0
    assert w4a4["kv_cache_tokens"][0] > 1000
    if not torch.cuda.is_available():
        assert 200 << 20 < w4a4["peak_answering_bytes"][0] < 8 << 30
        assert w4a4["cores"][0] >= 1
    assert not (tmp_path / "model").exists()
