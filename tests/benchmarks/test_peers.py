"""The comparison of engines: the checkpoints that it makes, its clock, and its tables."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.language import bench_peers, peer_process
from benchmarks.language.bench_peers import PEERS, divergence, tables
from benchmarks.language.engines.protocol import timed
from benchmarks.language.peer_checkpoints import (
    GROUP,
    stored_bytes,
    write_compressed,
    write_gguf,
)
from benchmarks.language.served_models import DEMO


def _weights(model):
    from safetensors.torch import load_file

    return load_file(DEMO / "model.safetensors") if model == DEMO else load_file(model)


def test_a_gguf_file_holds_the_model(tmp_path):
    """In the order of rows that llama.cpp rotates: row i of a head beside the one half further."""
    import gguf

    write_gguf(DEMO, tmp_path / "bf16.gguf", "bf16")
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    reader = gguf.GGUFReader(tmp_path / "bf16.gguf")
    stored = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    weights = _weights(DEMO)
    for part, count in heads.items():
        own = weights[f"model.layers.1.self_attn.{part}_proj.weight"]
        found = torch.from_numpy(stored[f"blk.1.attn_{part}.weight"].copy()).view(torch.bfloat16)
        half = len(own) // count // 2
        for head in range(count):
            first = 2 * half * head
            for number in range(half):
                assert torch.equal(found[first + 2 * number], own[first + number])
                assert torch.equal(found[first + 2 * number + 1], own[first + half + number])
    assert len(stored) == len(weights)
    norms = sum(tensor.numel() for tensor in weights.values() if tensor.ndim == 1)
    assert stored_bytes(tmp_path / "bf16.gguf") == stored_bytes(DEMO) + 2 * norms  # float32 there


def test_int4_rounds_to_the_nearest(tmp_path):
    write_compressed(DEMO, tmp_path / "int4", 4)
    found, weights = _weights(tmp_path / "int4" / "model.safetensors"), _weights(DEMO)
    name = "model.layers.0.mlp.down_proj"
    # eight codes in a word, the first one lowest, and 8 more than their values
    words = found[f"{name}.weight_packed"].numpy().astype("<i4").tobytes()
    nibbles = [nibble for byte in words for nibble in (byte & 15, byte >> 4)]
    codes = torch.tensor(nibbles).view(found[f"{name}.weight_shape"].tolist()) - 8
    scale = found[f"{name}.weight_scale"].float().repeat_interleave(GROUP, dim=1)
    off = (codes.float() * scale - weights[f"{name}.weight"].float()).abs()
    assert (off <= 0.51 * scale).float().mean() > 0.98  # the rest is clamped at 7 of 7.5
    assert (off <= 1.01 * scale).all()
    assert torch.equal(found["model.norm.weight"], weights["model.norm.weight"])


def test_int8_rounds_to_the_nearest(tmp_path):
    write_compressed(DEMO, tmp_path / "int8", 8)
    found, weights = _weights(tmp_path / "int8" / "model.safetensors"), _weights(DEMO)
    name = "model.layers.0.self_attn.o_proj"
    codes, scale = found[f"{name}.weight"], found[f"{name}.weight_scale"]
    assert codes.dtype == torch.int8
    off = (codes.float() * scale - weights[f"{name}.weight"].float()).abs()
    assert (off <= 0.501 * scale).all()


def test_every_token_has_its_time():
    class Late:
        def generate(self, prompt, tokens):
            yield from range(tokens - len(prompt))

    assert len(timed(Late(), [], 3)) == 3
    assert min(timed(Late(), [], 3)) >= 0
    with pytest.raises(RuntimeError, match="2 tokens were generated instead of 3"):
        timed(Late(), [7], 3)


def test_transformers_answers_greedily():
    from transformers import AutoModelForCausalLM

    from benchmarks.language.engines.transformers_engine import TransformersEngine

    threads = torch.get_num_threads()
    engine = TransformersEngine(str(DEMO), {"threads": threads})
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    prompt = [5, 40, 300, 7]
    given = torch.tensor([prompt])
    expected = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=6, min_new_tokens=6,
        do_sample=False,
    )  # fmt: skip
    assert list(engine.generate(prompt, 6)) == expected[0, 4:].tolist()
    assert engine.logits(prompt)[-1].argmax() == expected[0, 4]


def test_divergence_of_windows():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    other = torch.tensor([[0.0, 2.0, 0.0], [0.0, 1.0, 0.0]])
    same = divergence([logits], [logits], [[0, 1, 2]])
    assert same == {"divergence": [0.0], "same_top": 1.0}
    found = divergence([logits], [other], [[0, 1, 2]])
    p = logits[0].softmax(-1)
    exact = float((p * (p.log() - other[0].log_softmax(-1))).sum()) / 2
    assert found["divergence"] == [pytest.approx(exact)]
    assert found["same_top"] == 0.5


def test_tables_compare_round_by_round():
    def peer(prompt_s, token_s, **more):
        memory = {"weight_bytes": 250_000_000, "peak_bytes": 3 << 29}
        busy_s = [4 * seconds for seconds in token_s[::-1]]
        return {
            "prompt_s": prompt_s, "token_s": token_s, "busy_token_s": busy_s, "engine": "x 1",
            **memory, **more
        }  # fmt: skip

    figures = {
        "windows": 2,
        "busy": 2,
        "peers": {
            "vllm-bf16": peer([1.0, 2.0, 4.0], [0.01, 0.02, 0.04]),
            "q4_0": peer(
                [0.5, 2.0, 8.0], [0.005, 0.005, 0.01], divergence=[0.1, 0.3], same_top=0.75
            ),
        },
        "refused": {"vllm-int8": "a | b"},
    }
    found = tables(figures)
    # in the order of PEERS
    assert [row[0] for row in found["speed"][1:]] == ["llama.cpp, Q4_0", "vLLM, bf16"]
    _, decoded, ratio, prompt, prompt_ratio, weights, memory = found["speed"][1]
    assert (decoded, ratio) == ("200.0", "4.00 x (2.00 to 4.00)")
    assert (prompt, prompt_ratio) == ("256", "1.00 x (0.50 to 2.00)")
    assert (weights, memory) == ("250 MB", "1.50 GiB")
    assert found["divergence"][1][2:] == ["0.2000 ± 0.1000", "75.0%"]
    assert found["versions"] == [["engines"], ["x 1"]]
    assert found["refused"][1] == ["vLLM, INT8 W8A8", "a \\| b"]
    assert found["busy"][0][2] == "beside 2 busy programs"
    assert found["busy"][1][1:] == ["200.0", "50.0", "0.25 x", "4.00 x (2.00 to 4.00)"]
    del figures["peers"]["vllm-bf16"]
    assert tables(figures)["speed"][1][2] == "–"


def test_a_missing_engine_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_peers, "LLAMA_PYTHON", tmp_path / "none")
    monkeypatch.setattr(bench_peers, "_source", lambda *_: DEMO)
    with ExitStack() as stack:
        session = bench_peers._Session(tmp_path, "smollm2", eager=True, stack=stack)
        session.start("q4_0")
    assert session.refused == {"q4_0": "llama-cpp-python is not installed in .cache/peers/llama"}
    assert not session.found


def test_an_engine_that_fails_is_refused_with_its_error(tmp_path, monkeypatch):
    """llama.cpp is not installed in the Python of these tests."""
    for module in (bench_peers, peer_process):
        monkeypatch.setattr(module, "LLAMA_PYTHON", Path(sys.executable))
    monkeypatch.setattr(bench_peers, "_source", lambda *_: DEMO)
    with ExitStack() as stack:
        session = bench_peers._Session(tmp_path, "smollm2", eager=True, stack=stack)
        session.start("llama-bf16")
        session.wait_until_loaded()
    assert session.refused == {"llama-bf16": "ModuleNotFoundError: No module named 'llama_cpp'"}


def test_an_engine_that_dies_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_peers, "_source", lambda *_: DEMO)

    class Dying(bench_peers.EngineProcess):
        """Says that it is ready, and ends itself at the first call."""

        def __init__(self):
            super().__init__("llama", DEMO, {"threads": 1}, tmp_path / "log")
            die = "import os; print('{}', flush=True); input(); os.kill(os.getpid(), 4)"
            self._command = [sys.executable, "-c", die]

    with ExitStack() as stack:
        session = bench_peers._Session(tmp_path, "smollm2", eager=True, stack=stack)
        session._processes["q4_0"] = stack.enter_context(Dying())
        assert session._processes["q4_0"].description() == {}
        session.measure_times([[1, 2]], rounds=1, tokens=2)
    assert session.refused == {"q4_0": "its process was ended by SIGILL"}
    assert not session.found


def test_every_peer_can_be_made():
    made = {"bf16", "q4_0", "q4_k_m", "mxfp4", "packed", "calibrated", "int8", "int4"}
    assert {peer.kind for peer in PEERS.values()} == made
    assert {peer.engine for peer in PEERS.values()} == {"llama", "transformers", "vllm"}
