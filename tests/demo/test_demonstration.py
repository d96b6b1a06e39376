"""The demonstration's arithmetic, and the demonstration itself on the shipped model."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from demo import emulation
from demo.perplexity import model_perplexity, windows
from demo.run import DemoError, Figures, _check_agreement
from dialect_kernels import reference
from dialect_plugin.checkpoint import open_packed
from dialect_plugin.convert import convert

ROOT = Path(__file__).resolve().parents[2]


def test_windows_do_not_overlap_and_respect_the_limit():
    tokens = list(range(100))
    assert windows(tokens, 30, 100) == [
        tokens[:30],
        tokens[30:60],
        tokens[60:90],
        tokens[90:],
    ]
    assert windows(tokens, 30, 61) == [tokens[:30], tokens[30:60]]  # one token predicts nothing
    assert windows(tokens, 200, 50) == [tokens[:50]]
    assert windows([], 30, 100) == []


@torch.inference_mode()
def test_perplexity_is_the_mean_over_predicted_tokens(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()
    parts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    losses = []
    for part in parts:
        for i in range(1, len(part)):  # one prediction at a time, without the others in view
            logits = model(torch.tensor([part[:i]])).logits[0, -1]
            losses.append(-float(logits.double().log_softmax(0)[part[i]]))
    expected = math.exp(sum(losses) / 6)
    assert model_perplexity(model, parts) == pytest.approx(expected, rel=1e-5)


@torch.inference_mode()
def test_emulations_replace_the_packed_layers_and_no_others(tiny_model, tmp_path):
    source, packed = tiny_model(), tmp_path / "packed"
    convert(source, packed)
    plain = emulation.load_bf16(source)
    checkpoint = open_packed(packed)
    dialect = emulation.emulate_blockdialect(source, packed, "fp8")
    mxfp4 = emulation.emulate_mxfp4(source, packed)
    for name, layer in plain.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        emulated = [model.get_submodule(name) for model in (dialect, mxfp4)]
        if name not in checkpoint.layers:
            assert all(isinstance(e, torch.nn.Linear) for e in emulated), name
            continue
        x = torch.randn(3, layer.in_features).to(torch.bfloat16)
        expected = reference.dialect_linear(x, checkpoint.read(name), None, "fp8")
        torch.testing.assert_close(emulated[0](x), expected, rtol=2**-7, atol=1e-4)
        exact = (
            reference.quantize_mxfp4(x).double() @ reference.quantize_mxfp4(layer.weight).double().T
        )
        torch.testing.assert_close(emulated[1](x).double(), exact, rtol=2**-8, atol=1e-4)


def test_a_server_that_disagrees_fails_the_demonstration():
    row = Figures("x", 1, 10.0, "server", [])
    _check_agreement(row, 10.04)
    for other in (10.06, 9.94, math.nan):
        with pytest.raises(DemoError, match="differ by"):
            _check_agreement(row, other)


def run_module(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo.run", "--model", "nowhere"], "nowhere/config.json: is missing"),
        (["demo.run", "--formats", "w5"], "--formats: 'w5'; allowed are bf16, w4a4"),
        (["demo.serve", "--model", "nowhere"], "name the model with make serve MODEL=DIR"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    done = run_module(*arguments)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_demonstration_on_the_shipped_model(tmp_path):
    """Servers start, answer and are gone; figures agree; a second run does not convert again."""
    done = run_module("demo.run", "--formats", "bf16,w4a4", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((ROOT / ".cache" / "demo" / "result.json").read_text())
    by_name = {row["name"]: row for row in rows}
    assert set(by_name) == {"bf16", "MXFP4-32 W4A4", "BlockDialect W4A4"}
    dialect = by_name["BlockDialect W4A4"]
    assert by_name["bf16"]["perplexity"] < dialect["perplexity"]
    assert dialect["perplexity"] < by_name["MXFP4-32 W4A4"]["perplexity"]
    assert dialect["bytes_on_disk"] < 0.6 * by_name["bf16"]["bytes_on_disk"]
    assert all(len(row["completions"]) == 3 for row in rows if row["source"] == "server")
    left = subprocess.run(["pgrep", "-f", "vllm serve demo/model"], capture_output=True, text=True)
    assert left.stdout == ""


@pytest.mark.slow
def test_make_serve_streams_and_stops(tiny_model):
    command = ["demo.serve", "--model", str(tiny_model()), "--", "--port", "18923"]
    command += ["--host", "127.0.0.1", "--max-model-len", "64", "--enforce-eager"]
    server = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    try:
        first = server.stdout.readline()
        assert "--quantization blockdialect" in first
        with httpx.Client(base_url="http://127.0.0.1:18923", trust_env=False, timeout=60) as client:
            wait_until_healthy(client, server)
            body = {"prompt": "def hello", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
            whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                lines = [
                    line.removeprefix("data: ") for line in answer.iter_lines() if line.strip()
                ]
        assert lines[-1] == "[DONE]"
        streamed = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
        assert streamed == whole
    finally:
        server.send_signal(signal.SIGTERM)
        output, _ = server.communicate(timeout=60)
    assert "Traceback" not in output, output[-3000:]


def wait_until_healthy(client, server):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, server.stdout.read()[-3000:]
        try:
            if client.get("/health").status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError("the server was not ready in time")
