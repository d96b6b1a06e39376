"""`vllm serve` as a user starts it: three processes, HTTP, and an end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dialect_kernels import cpu
from dialect_plugin.checkpoint.convert import convert
from tests.support.served_models import build

pytestmark = pytest.mark.slow

CPUS = set(os.sched_getaffinity(0))
START_LIMIT = 240  # seconds; about 40 on an idle machine with two cores


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    source = build("LlamaForCausalLM", directory / "source")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(source)
    convert(source, directory / "packed")
    return directory / "packed"


@contextmanager
def server(model, log, *arguments):
    """A running ``vllm serve``: (its process, its address)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vllm = Path(sys.executable).parent / "vllm"
    command = [vllm, "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "64", "--enforce-eager", *arguments]
    environment = dict(os.environ, PATH=f"{vllm.parent}{os.pathsep}{os.environ['PATH']}")
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    # by itself vLLM keeps one CPU for its scheduler, which may leave the worker a single one
    environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, CPUS))
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent
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
        if process.poll() is None:
            process.kill()
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


def test_serve_complete_stream_and_stop(packed, tmp_path):
    log = tmp_path / "server.log"
    with server(packed, log, "--served-model-name", "tiny") as (process, address):
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

        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        assert not answers(f"{address}/health")
    text = log.read_text()
    if cpu.available():  # measured by the worker, on the thread that calls the kernel
        assert f"{len(CPUS)} threads (PyTorch's OpenMP) on {len(CPUS)} CPUs" in text
    assert "quantization=blockdialect" in text
    assert "blockdialect is not available" not in text
