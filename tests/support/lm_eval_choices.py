"""lm-eval on a task of committed data, and what transformers computes for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dialect_plugin.transformers  # noqa: F401 - adds the method to transformers' tables

ROOT = Path(__file__).resolve().parents[2]
TASK = "tests/support/lm_eval_task"
CHOICES = [json.loads(line) for line in (ROOT / TASK / "choices.jsonl").open(encoding="utf-8")]


def evaluated(
    output: Path, module: str, kind: str, **arguments: object
) -> tuple[torch.Tensor, float]:
    """Log-probabilities of every choice of every question, and the accuracy, by lm-eval."""
    shown = ",".join(f"{key}={value}" for key, value in arguments.items())
    command = [sys.executable, "-m", module, "run", "--model", kind, "--model_args", shown]
    command += ["--tasks", "blockdialect_choices", "--include_path", TASK, "--device", "cpu"]
    command += ["--output_path", str(output), "--log_samples"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = output.rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, file.open(encoding="utf-8")), key=lambda s: s["doc_id"])
    found = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    (summary,) = output.rglob("results_*.json")
    results = json.loads(summary.read_text())["results"]["blockdialect_choices"]
    return torch.tensor(found), results["acc,none"]


@torch.no_grad()
def expected(directory: Path) -> tuple[torch.Tensor, float]:
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
