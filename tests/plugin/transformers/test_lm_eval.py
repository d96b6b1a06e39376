"""lm-eval on a task of committed data: transformers' packed model, and a server that vLLM runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dialect_plugin.transformers  # noqa: F401 - adds the method to transformers' tables
from demo.language.server import Server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
TASK = "tests/support/lm_eval_task"
CHOICES = [json.loads(line) for line in (ROOT / TASK / "choices.jsonl").open(encoding="utf-8")]


def evaluated(output, module, kind, **arguments):
    """Log-probabilities of every choice of every question, and the accuracy, by lm-eval."""
    shown = ",".join(f"{key}={value}" for key, value in arguments.items())
    command = [sys.executable, "-m", module, "run", "--model", kind, "--model_args", shown]
    command += ["--tasks", "blockdialect_choices", "--include_path", TASK, "--device", "cpu"]
    command += ["--output_path", output, "--log_samples"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = output.rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, file.open(encoding="utf-8")), key=lambda s: s["doc_id"])
    found = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    (summary,) = output.rglob("results_*.json")
    results = json.loads(summary.read_text())["results"]["blockdialect_choices"]
    return torch.tensor(found), results["acc,none"]


@torch.no_grad()
def expected(directory):
    """The same by transformers, one choice after another."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = []
    for entry in CHOICES:
        row = []
        for choice in entry["choices"]:
            front = tokenizer(entry["question"]).input_ids
            tokens = torch.tensor(tokenizer(f"{entry['question']} {choice}").input_ids)
            logits = model(tokens[None, :-1]).logits[0, len(front) - 1 :]
            scores = logits.log_softmax(-1).gather(1, tokens[len(front) :, None])
            row.append(float(scores.sum()))
        rows.append(row)
    found = torch.tensor(rows)
    right = found.argmax(1) == torch.tensor([entry["answer"] for entry in CHOICES])
    return found, float(right.double().mean())


def test_a_packed_checkpoint_in_transformers(packed, tiny_model, tmp_path):
    found, accuracy = evaluated(
        tmp_path, "dialect_plugin.lm_eval", "hf", pretrained=packed(), dtype="float32"
    )
    scores, right = expected(packed())
    torch.testing.assert_close(found, scores, rtol=0, atol=1e-3)
    assert accuracy == pytest.approx(right)
    assert (found - expected(tiny_model())[0]).abs().max() > 0.2  # the 16-bit model's are others


def test_a_served_checkpoint(packed, tmp_path):
    arguments = ("--max-model-len", "64", "--enforce-eager", "--served-model-name", "tiny")
    arguments += ("--dtype", "float32")
    with Server(packed(), tmp_path / "log", *arguments) as server:
        server.wait_until_ready()
        found, _ = evaluated(
            tmp_path / "out",
            "lm_eval",
            "local-completions",
            model="tiny",
            tokenizer=packed(),
            base_url=f"http://127.0.0.1:{server.port}/v1/completions",
            max_length=64,
        )
    scores, _ = expected(packed())
    # the same up to the order of additions, unless that moves an activation to another code
    torch.testing.assert_close(found, scores, rtol=0, atol=0.05)


def test_the_command_without_lm_eval():
    """One sentence where it is not installed; here a finder hides it."""
    code = (
        "import runpy, sys\n"
        "sys.modules['lm_eval'] = None\n"
        "runpy.run_module('dialect_plugin.lm_eval', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "lm-eval is not installed; install it with pip install 'blockdialect[lm-eval]'"
    )
