"""The demonstration: its arithmetic, its servers, and a run on the shipped model."""

import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import demo.language.run
import demo.language.serve
from demo.language import emulation
from demo.language.perplexity import model_logprobs, perplexity, predicted, windows
from demo.language.results import Demonstration, Figures, completions_table, figures_table
from demo.language.run import DemoError, check_agreement
from demo.language.serve import arguments_for
from demo.language.server import Server, ServerError
from dialect_kernels import baselines, reference
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.reader import CheckpointError, open_packed
from tests.support.processes import is_running

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "checkpoint_v1"


def test_windows_do_not_overlap_and_respect_the_limit():
    tokens = list(range(100))
    assert windows(tokens, 30, 100) == [tokens[:30], tokens[30:60], tokens[60:90], tokens[90:]]
    assert windows(tokens, 30, 61) == [tokens[:30], tokens[30:60]]  # one token predicts nothing
    assert windows(tokens, 200, 50) == [tokens[:50]]
    assert windows([], 30, 100) == []


def test_a_begin_token_takes_a_place_and_lets_every_token_be_predicted():
    tokens = list(range(100))
    parts = windows(tokens, 31, 91, begin=777)
    assert parts == [
        [777, *tokens[:30]], [777, *tokens[30:60]], [777, *tokens[60:90]], [777, 90]
    ]  # fmt: skip
    assert predicted(parts) == 91
    assert predicted(windows(tokens, 30, 91)) == 91 - 4
    assert windows([], 31, 100, begin=777) == []


@torch.inference_mode()
def test_perplexity_is_the_mean_over_predicted_tokens(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()
    parts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    expected = []
    for part in parts:
        for i in range(1, len(part)):  # one prediction at a time, without the others in view
            logits = model(torch.tensor([part[:i]])).logits[0, -1]
            expected.append(float(logits.double().log_softmax(0)[part[i]]))
    found = model_logprobs(model, parts)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert perplexity(found) == pytest.approx(math.exp(-sum(expected) / 6), rel=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_emulations_replace_the_packed_layers_and_no_others(tiny_model, tmp_path, architecture):
    source, packed = tiny_model(architecture), tmp_path / "packed"
    convert(source, packed)
    plain = emulation.load_bf16(source)
    checkpoint = open_packed(packed)
    dialect = emulation.emulate_blockdialect(source, packed)
    mxfp4 = emulation.emulate_mxfp4(source, packed)
    replaced = 0
    for name, layer in plain.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        emulated = [model.get_submodule(name) for model in (dialect, mxfp4)]
        if name not in checkpoint.layers:
            assert all(isinstance(e, torch.nn.Linear) for e in emulated), name
            continue
        replaced += 1
        x = torch.randn(2, 3, layer.in_features).to(torch.bfloat16)
        bias = 0 if layer.bias is None else layer.bias.double()
        stored = checkpoint.read(name)
        expected = reference.dialect_linear(x, stored, layer.bias, accumulation="exact")
        close_to(emulated[0](x), expected)
        rounded, weight = (
            baselines.quantize_mxfp4(values).double() for values in (x.view(6, -1), layer.weight)
        )
        close_to(emulated[1](x), (rounded @ weight.T + bias).view(2, 3, -1))
    assert replaced == len(checkpoint.layers) == 14


def close_to(found, expected):
    """One bfloat16 rounding apart: the order of float32 sums decides which way a tie goes."""
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected.double(), rtol=2**-8, atol=1e-5)


@torch.inference_mode()
def test_emulations_are_different_models(tiny_model, tmp_path):
    source, packed = tiny_model(), tmp_path / "packed"
    convert(source, packed)
    parts = [list(range(10, 60))]
    figures = [
        perplexity(model_logprobs(model, parts))
        for model in (
            emulation.load_bf16(source),
            emulation.emulate_blockdialect(source, packed),
            emulation.emulate_mxfp4(source, packed),
        )
    ]
    assert len(set(figures)) == 3


def test_a_server_that_disagrees_fails_the_demonstration():
    check_agreement("x", 10.0, 10.049, 32_768)
    check_agreement("x", 10.0, 10.049, 1_000_000)
    check_agreement("x", 10.0, 10.099, 8_192)  # a quarter of the tokens, twice the noise
    for other in (10.06, 9.94, math.nan, math.inf):
        with pytest.raises(DemoError, match="differ by"):
            check_agreement("x", 10.0, other, 32_768)
    with pytest.raises(DemoError, match=r"^x: .* 10\.0000 .* 10\.1100 differ by 1\.09%; 0\.50%"):
        check_agreement("x", 10.0, 10.11, 32_768)


def shown(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_tables_show_what_was_found():
    rows = [
        Figures("bf16", 2_000_000, 10.0, "server", ["[red]x\n", "b"], 10.01),
        Figures("MXFP4-32 W4A4", 1_000_000, 11.0, "emulation", []),
        Figures("BlockDialect W4A8", 1_060_000, 10.5, "server", ["y", "d"]),
    ]
    result = Demonstration("m", "t.txt", 1234, 511, ["p [1]", "q"], rows)
    lines = [" ".join(line.split()) for line in shown(figures_table(result)).splitlines()]
    assert "m, 1,234 tokens of t.txt" in lines
    assert "│ bf16 │ 2.00 │ 10.000 │ +0.00% │ server │ 10.010 │" in lines
    assert "│ MXFP4-32 W4A4 │ 1.00 │ 11.000 │ +10.00% │ emulation │ │" in lines
    assert "│ BlockDialect W4A8 │ 1.06 │ 10.500 │ +5.00% │ server │ │" in lines
    text = shown(completions_table(result, 0))
    assert "prompt 'p [1]'" in text
    assert "│ [red]x " in text  # a model's text is no markup
    assert "MXFP4" not in text
    without_base = Demonstration("m", "t.txt", 1234, 511, [], rows[1:])
    assert "%" not in shown(figures_table(without_base))


PACKED = {"quantization_config": {"quant_method": "blockdialect"}}


def write_config(directory, config):
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("config", "further", "arguments"),
    [
        ({}, [], ["--quantization", "blockdialect"]),
        ({}, ["--port", "1"], ["--quantization", "blockdialect", "--port", "1"]),
        ({}, ["-q", "blockdialect_w4a8"], ["-q", "blockdialect_w4a8"]),
        ({}, ["--quantization=blockdialect_w4a8"], ["--quantization=blockdialect_w4a8"]),
        (PACKED, ["--port", "1"], ["--port", "1"]),
    ],
)
def test_serve_asks_for_quantization_where_it_must(tmp_path, config, further, arguments):
    assert arguments_for(write_config(tmp_path, config), further) == arguments


def test_serve_refuses_other_quantized_models(tmp_path):
    write_config(tmp_path, {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(CheckpointError, match=r"is quantized already \(gptq\)"):
        arguments_for(tmp_path, [])


@pytest.fixture
def command():
    """Runs the `main` of a demonstration with arguments, as `python -m` does."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(main, *arguments):
        app = typer.Typer()
        app.command()(main)
        return CliRunner().invoke(app, arguments)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("main", "arguments", "sentence"),
    [
        (demo.language.run.main, ["--model", "nowhere"], "demo: nowhere/config.json: is missing"),
        (
            demo.language.run.main,
            ["--formats", "w5"],
            "--formats: 'w5'; it must be some of bf16, w4a4",
        ),
        (demo.language.run.main, ["--formats", "bf16,bf16"], "each once"),
        (demo.language.run.main, ["--text", "nothing.txt"], "nothing.txt"),
        (demo.language.run.main, ["--model", str(GOLDEN)], "is quantized already (blockdialect)"),
        (demo.language.serve.main, ["--model", "nowhere"], "serve: nowhere: is not a directory"),
    ],
)
def test_bad_input_is_one_sentence(command, main, arguments, sentence):
    done = command(main, *arguments)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_model_without_a_tokenizer_is_one_sentence(command, tiny_model, tmp_path):
    for file in tiny_model().iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    done = command(demo.language.run.main, "--model", str(tmp_path))
    assert done.exit_code == 1
    assert f"demo: {tmp_path}: the tokenizer cannot be loaded (" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


class Script(Server):
    """A server process that runs a short Python program instead of vLLM."""

    def __init__(self, log, program):
        super().__init__(Path("model"), log)
        self._command = [sys.executable, "-c", program, str(self.port)]


def test_a_server_that_ends_says_why(tmp_path):
    program = (
        "print('(EngineCore pid=1) ERROR [core.py:9] ValueError: the model is too long');"
        "print('RuntimeError: Engine core initialization failed. See root cause above.');"
        "raise SystemExit(3)"
    )
    log = tmp_path / "logs" / "server.log"
    with pytest.raises(ServerError) as caught, Script(log, program) as server:
        server.wait_until_ready()
    text = str(caught.value)
    assert text.startswith("vllm serve ended with status 3 (ValueError: the model is too long);")
    assert text.endswith("See root cause above.")


STUBBORN = """
import http.server, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("child", "w").write(str(child.pid))
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        self.send_response(400); self.end_headers(); self.wfile.write(b"no such model")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def test_a_server_is_gone_whatever_happens(tmp_path, monkeypatch):
    """It ignores SIGTERM and has a child; the block ends in an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("demo.language.server._STOP_SECONDS", 1)
    server = Script(tmp_path / "log", STUBBORN)
    with pytest.raises(ServerError, match="answered 400: no such model"):
        ask(server)
    child = int((tmp_path / "child").read_text())
    assert server._process.returncode == -signal.SIGKILL
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    assert not is_running(child)


def ask(server):
    with server:
        server.wait_until_ready()
        server.complete("x")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demonstration_on_the_shipped_model():
    """Servers start, answer and are gone; figures agree; the model is not converted again."""
    done = subprocess.run(
        [sys.executable, "-m", "demo.language.run", "--formats", "bf16,w4a4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((ROOT / ".cache" / "demo" / "result.json").read_text())
    assert result["tokens"] == 32_768
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["bf16", "MXFP4-32 W4A4", "BlockDialect W4A4"]
    bf16, mxfp4, dialect = rows.values()
    assert bf16["perplexity"] < dialect["perplexity"] < mxfp4["perplexity"]
    assert dialect["bytes"] < 0.6 * bf16["bytes"]
    for row in (bf16, dialect):
        assert row["source"] == "server"
        assert row["emulated_perplexity"] == pytest.approx(row["perplexity"], rel=0.005)
        assert len(row["completions"]) == 3
        assert all(row["completions"])
    left = subprocess.run(["pgrep", "-f", "vllm serve demo/model"], capture_output=True, text=True)
    assert left.stdout == ""


@pytest.mark.slow
def test_make_serve_streams_and_stops(tiny_model, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "demo.language.serve", "--model", str(tiny_model()), "--"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "64"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--enforce-eager"],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            start_new_session=True,
        )
    try:
        base = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=base, trust_env=False, timeout=60) as client:
            wait_until_healthy(client, server, log)
            body = {"prompt": "def hello", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
            whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                lines = [
                    line.removeprefix("data: ") for line in answer.iter_lines() if line.strip()
                ]
        server.terminate()
        assert server.wait(timeout=60) == 0, log.read_text()[-3000:]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    assert lines[-1] == "[DONE]"
    streamed = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
    assert streamed == whole
    started = log.read_text().partition("starting: ")[2].splitlines()[0]
    assert "--quantization blockdialect" in started
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def wait_until_healthy(client, server, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        with suppress(httpx.HTTPError):
            if client.get("/health").status_code == httpx.codes.OK:
                return
        time.sleep(0.5)
    raise AssertionError(f"the server was not ready in time: {log.read_text()[-3000:]}")
