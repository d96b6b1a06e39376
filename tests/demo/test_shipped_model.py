"""The shipped model's files: what they promise, measured again from the files alone."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from demo.language.train.corpus import (
    choose_held_out,
    manifest,
    module_of,
    read_sources,
    split_by_module,
)
from demo.language.train.publish import card
from demo.language.train.train import Recipe

DEMO = Path(__file__).resolve().parents[2] / "demo"
MODEL = DEMO / "model"
SIZE_LIMIT = 8_000_000
MEASURED_TOKENS = 4096
# Of the committed weights, whatever the CPU: sums in another order move it by parts in a million.
PERPLEXITY = 7.09486


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def held_out() -> str:
    return (DEMO / "heldout.txt").read_bytes().decode()


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads((DEMO / "language" / "train" / "manifest.json").read_text())


def test_weights_are_one_small_bfloat16_file() -> None:
    assert [path.name for path in MODEL.glob("*.safetensors")] == ["model.safetensors"]
    assert (MODEL / "model.safetensors").stat().st_size <= SIZE_LIMIT
    weights = load_file(MODEL / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_config_describes_the_promised_llama() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["hidden_size"] % 128 == 0
    assert config["head_dim"] == 64
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    assert config["tie_word_embeddings"] is False
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


def test_every_linear_divides_into_blocks() -> None:
    weights = load_file(MODEL / "model.safetensors")
    matrices = {name: weight.shape for name, weight in weights.items() if weight.ndim == 2}
    assert len(matrices) == 2 + 7 * 4
    assert [name for name, (n, k) in matrices.items() if n % 32 or k % 128] == []


@pytest.mark.parametrize(
    "text", ["", "\t\r\n  x ,y .\n", "naïve 中文 😀\n", "".join(map(chr, range(0x180)))]
)
def test_odd_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_held_out_text_round_trips(tokenizer: PreTrainedTokenizerBase, held_out: str) -> None:
    ids = tokenizer(held_out, verbose=False).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert max(ids) < len(tokenizer) == 2048
    assert tokenizer.decode(ids[1:]) == held_out


def test_held_out_perplexity_is_as_measured(
    tokenizer: PreTrainedTokenizerBase, held_out: str
) -> None:
    run = json.loads((DEMO / "language" / "train" / "run.json").read_text())
    window = run["held_out"]["window"]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.tensor(tokenizer(held_out, add_special_tokens=False, verbose=False).input_ids)
    assert len(ids) == run["held_out"]["tokens"]
    total = 0.0
    for piece in ids[:MEASURED_TOKENS].split(window):
        begin = torch.tensor([tokenizer.bos_token_id])
        with torch.inference_mode():
            logits = model(input_ids=torch.cat([begin, piece[:-1]])[None]).logits[0]
        picked = functional.log_softmax(logits.double(), dim=-1).gather(1, piece[:, None])
        total -= picked.sum().item()
    assert math.exp(total / MEASURED_TOKENS) == pytest.approx(PERPLEXITY, rel=1e-4)


def test_card_and_curve_tell_what_the_run_recorded() -> None:
    run = json.loads((DEMO / "language" / "train" / "run.json").read_text())
    assert (MODEL / "README.md").read_text(encoding="utf-8") == card(run)
    with (DEMO / "language" / "train" / "loss.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert int(rows[-1]["step"]) == run["steps"] == Recipe(**run["recipe"]).end
    assert int(rows[-1]["tokens"]) == run["tokens"]
    assert float(rows[-1]["train_loss"]) == run["train_loss"]


def test_held_out_text_is_the_listed_files(committed: dict[str, Any], held_out: str) -> None:
    data = held_out.encode()
    for path, (size, sha256) in committed["held_out"]["files"].items():
        piece, data = data[:size], data[size:]
        assert hashlib.sha256(piece).hexdigest() == sha256, path
    assert data == b""


def test_no_module_is_on_both_sides(committed: dict[str, Any]) -> None:
    train, held_out = committed["train"]["files"], committed["held_out"]["files"]
    sizes = {
        path: size
        for files in (train, held_out, committed["dropped"])
        for path, (size, _) in files.items()
    }
    chosen = choose_held_out(sizes, committed["seed"])
    assert {module_of(path) for path in held_out} == chosen
    assert {module_of(path) for path in train} & chosen == set()
    hashes = {sha256 for _, sha256 in train.values()}
    assert not any(sha256 in hashes for _, sha256 in held_out.values())


def test_the_same_library_splits_the_same_way(committed: dict[str, Any]) -> None:
    listed = committed["train"]["files"] | committed["held_out"]["files"]
    here = {file.path: [file.size, file.sha256] for file in read_sources()}
    if any(here.get(path) != entry for path, entry in listed.items()):
        pytest.skip(f"this Python's library is not that of {committed['source']}")
    assert manifest(split_by_module(read_sources())) == committed
