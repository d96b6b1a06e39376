"""A 16-bit model served as a user starts it: three processes, HTTP, lm-eval, and an end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress

import pytest
import torch

from dialect_kernels import cpu
from dialect_plugin.checkpoint.convert import convert
from tests.support.lm_eval_choices import ROOT, evaluated, expected

pytestmark = pytest.mark.slow

CPUS = set(os.sched_getaffinity(0))
START_LIMIT = 400  # seconds; about 40 on an idle machine with two cores


@contextmanager
def server(model, log, *arguments):
    """What `make serve` runs: (its process, its address)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "demo.language.serve", "--model", model, "--"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "64", "--enforce-eager", *arguments]
    environment = dict(os.environ)
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    # by itself vLLM keeps one CPU for its scheduler, which may leave the worker a single one
    environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, CPUS))
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_LIMIT
        while not answers(f"{address}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield process, address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def post(address, **body):
    data = json.dumps({"temperature": 0, "ignore_eos": True, "max_tokens": 6} | body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", data, headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read().decode()


def complete_and_stream(address):
    with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as reply:
        assert json.load(reply)["data"][0]["id"] == "tiny"
    whole = json.loads(post(address, model="tiny", prompt="def f(x):", logprobs=1))
    assert whole["usage"]["completion_tokens"] == 6
    values = whole["choices"][0]["logprobs"]["token_logprobs"]
    assert len(values) == 6
    assert all(-20 < value <= 0 for value in values)

    streamed = post(address, model="tiny", prompt="def f(x):", stream=True)
    events = [line[6:] for line in streamed.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    texts = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    assert len(texts) > 1
    assert "".join(texts) == whole["choices"][0]["text"]


def test_serve_complete_stream_evaluate_and_stop(tiny_model, tmp_path):
    log = tmp_path / "server.log"
    convert(tiny_model(), tmp_path / "packed")  # what the server does while it loads
    options = ("--served-model-name", "tiny", "--dtype", "float32")
    with server(tiny_model(), log, *options) as (process, address):
        complete_and_stream(address)
        found, _ = evaluated(
            tmp_path / "out",
            "lm_eval",
            "local-completions",
            model="tiny",
            tokenizer=tiny_model(),
            base_url=f"{address}/v1/completions",
            max_length=64,
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()[-3000:]
        assert not answers(f"{address}/health")
    # the same up to the order of additions, unless that moves an activation to another code
    torch.testing.assert_close(found, expected(tmp_path / "packed")[0], rtol=0, atol=0.05)
    text = log.read_text()
    started = text.partition("starting: ")[2].splitlines()[0]
    assert "--quantization blockdialect" in started
    if cpu.available():  # measured by the worker, on the thread that calls the kernel
        assert f"{len(CPUS)} threads (PyTorch's OpenMP) on {len(CPUS)} CPUs" in text
    assert "quantization=blockdialect" in text
    assert "blockdialect is not available" not in text
