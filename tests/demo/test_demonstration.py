"""The demonstration: its arithmetic, its servers, and a run on the shipped model."""

import io
import json
import math
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import demo.language.run
import demo.language.serve
from demo.language import emulation
from demo.language.perplexity import (
    model_differences,
    model_logprobs,
    paired_standard_error,
    perplexity,
    predicted,
    windows,
)
from demo.language.prompts import Prompts
from demo.language.results import Demonstration, Figures, completions_table, figures_table
from demo.language.run import DemoError, check_agreement, report
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
        assert torch.equal(emulated[0](x), reference.dialect_linear(x, stored, layer.bias))
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
            emulation.emulate_blockdialect(source, packed, "fp8"),
            emulation.emulate_blockdialect(source, packed, "none"),
            emulation.emulate_mxfp4(source, packed),
        )
    ]
    assert len(set(figures)) == 5


@pytest.mark.parametrize("activations", ["dialect", "fp8", "none"])
def test_every_layer_is_compared_once_with_the_reference(tiny_model, tmp_path, activations):
    """A layer whose outputs differ in one bit of one sampled token is named."""
    source, packed = tiny_model("Qwen2ForCausalLM"), tmp_path / "packed"
    convert(source, packed)
    model = emulation.emulate_blockdialect(source, packed, activations)
    parts = [list(range(10, 60)), list(range(60, 90))]
    check = emulation.LayerCheck()
    with check.watching(model):
        model_logprobs(model, parts)
    assert (check.compared, check.unequal) == (14, [])
    with check.watching(emulation.load_bf16(source)):
        pass
    model_logprobs(model, parts)  # nobody is watching
    assert check.compared == 14

    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    right = layer.forward

    def wrong(x):
        y = right(x)
        y.view(torch.int16)[..., -1, 0] ^= 1  # the last token's
        return y

    layer.forward = wrong
    check = emulation.LayerCheck()
    with check.watching(model):
        model_logprobs(model, parts)
    assert (check.compared, check.unequal) == (14, [name])


def test_the_paired_error_is_the_spread_between_windows():
    parts = windows(list(range(1000)), 101, 505)
    lengths = [len(part) - 1 for part in parts]
    assert lengths == [100] * 5
    noise = torch.tensor([0.3, -0.1, 0.2, 0.0, -0.4])
    first = torch.randn(500, dtype=torch.float64)
    second = first - noise.repeat_interleave(100) + 5.0  # what all windows share is no noise
    expected = float(noise.std()) / math.sqrt(5)
    assert paired_standard_error(first, second, parts) == pytest.approx(expected, rel=1e-5)
    # independent noise of each token: 1 / sqrt(tokens), whatever the windows
    torch.manual_seed(0)
    parts = windows(list(range(20_301)), 101, 20_301)
    first = torch.zeros(predicted(parts))
    found = paired_standard_error(first, torch.randn(len(first)), parts)
    assert found == pytest.approx(1 / math.sqrt(len(first)), rel=0.2)
    # windows that agree by chance say nothing about their tokens
    swing = torch.tensor([1.0, -1.0]).repeat(50)
    parts = windows(list(range(102)), 51, 102)
    assert paired_standard_error(torch.zeros(100), swing, parts) == pytest.approx(0.1)
    assert paired_standard_error(torch.zeros(4), torch.ones(4), [[1, 2, 3, 4, 5]]) == 0.0


def test_a_server_that_disagrees_fails_the_demonstration():
    check_agreement("x", 10.0, 10.049, 32_768)
    check_agreement("x", 10.0, 10.049, 1_000_000)
    check_agreement("x", 10.0, 10.099, 8_192)  # a quarter of the tokens, twice the noise
    for other in (10.06, 9.94, math.nan, math.inf):
        with pytest.raises(DemoError, match="differ by"):
            check_agreement("x", 10.0, other, 32_768)
    check_agreement("x", 12.38, 11.87, 4_096, noise=0.0107)  # four of them are 4.4 %
    with pytest.raises(DemoError, match=r"differ by 4\.30%; 4\.08% is allowed"):
        check_agreement("x", 12.38, 11.87, 4_096, noise=0.01)
    with pytest.raises(DemoError, match=r"^x: .* 10\.0000 .* 10\.1100 differ by 1\.09%; 0\.50%"):
        check_agreement("x", 10.0, 10.11, 32_768)


def shown(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@torch.inference_mode()
def test_an_emulation_is_compared_with_bf16_at_every_position(tiny_model, tmp_path):
    source, packed = tiny_model(), tmp_path / "packed"
    convert(source, packed)
    reference, model = emulation.load_bf16(source), emulation.emulate_blockdialect(source, packed)
    parts = [list(range(10, 60)), list(range(60, 90)), list(range(90, 140))]
    found = model_differences(model, reference, parts)
    divergence, same = [], 0
    for part in parts:
        p, q = (
            m(torch.tensor([part])).logits[0, :-1].double().log_softmax(dim=-1)
            for m in (reference, model)
        )
        divergence += (p.exp() * (p - q)).sum(dim=-1).tolist()
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    assert found.logprobs.tolist() == pytest.approx(model_logprobs(model, parts).tolist(), abs=1e-5)
    assert found.divergence == pytest.approx(sum(divergence) / predicted(parts), rel=1e-4)
    assert found.same_top == pytest.approx(same / predicted(parts))
    assert 0 < found.standard_error < found.divergence
    assert model_differences(reference, reference, parts)[1:] == (0.0, 0.0, 1.0)


def test_a_model_is_asked_what_it_can_answer():
    with_template = SimpleNamespace(chat_template="{{ messages }}")
    without = SimpleNamespace()
    assert Prompts.of(with_template, shipped=True).texts[0] == "def read_"
    assert Prompts.of(with_template, shipped=False).chat
    assert not Prompts.of(without, shipped=False).chat
    texts = {Prompts.of(without, shipped=shipped).texts for shipped in (True, False)}
    assert len(texts) == 2


def test_tables_show_what_was_found():
    rows = [
        Figures("bf16", 2_000_000, 10.0, "server", ["[red]x\n", "b"], 10.01),
        Figures("MXFP4-32 W4A4", 1_000_000, 11.0, "emulation", [], None, 0.25, 0.0125, 0.5),
        Figures("BlockDialect W4A8", 1_060_000, 10.5, "server", ["y", "d"]),
    ]
    result = Demonstration("m", "t.txt", 1234, 511, ["p [1]", "q"], rows)
    lines = [" ".join(line.split()) for line in shown(figures_table(result)).splitlines()]
    assert "m, perplexity of 1,234 tokens of t.txt" in lines
    assert "│ bf16 │ 2.00 │ 10.000 │ 10.010 │ │ │" in lines
    assert "│ MXFP4-32 W4A4 │ 1.00 │ │ 11.000 │ 0.250 ± 0.013 │ 50.0% │" in lines
    assert "│ BlockDialect W4A8 │ 1.06 │ 10.500 │ │ │ │" in lines
    text = shown(completions_table(result, 0))
    assert "prompt 'p [1]'" in text
    assert "│ [red]x " in text  # a model's text is no markup
    assert "MXFP4" not in text
    long = Figures("BlockDialect W4A4 calibrated", 113e6, 9.5, "server", [], 9.5, 0.2, 0.01, 0.77)
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(figures_table(Demonstration("m", "t.txt", 1234, 511, [], [*rows, long])))
    assert "…" not in narrow.file.getvalue()


@pytest.mark.parametrize(
    ("doubts", "layers_differ", "strict", "success", "said"),
    [
        ([], False, True, True, ""),
        (["a differs"], False, False, True, "demo: warning: a differs\n"),
        (["a differs"], False, True, False, "demo: a differs\n"),
        (["a differs", "b"], True, False, False, "demo: a differs\ndemo: b\n"),
    ],
)
def test_a_doubt_never_costs_the_tables(
    tmp_path, monkeypatch, capsys, doubts, layers_differ, strict, success, said
):
    """The shipped model's doubts are failures; a user's model gets a warning, and both tables."""
    monkeypatch.setattr("demo.language.run.CACHE", tmp_path / "cache")
    console = Console(width=120, file=io.StringIO())
    row = Figures("bf16", 2_000_000, 10.0, "server", ["an answer"], 10.01)
    origin = "Tiny [0] from a package"
    result = Demonstration("m", "t", 9, 511, ["p"], [row], origin, doubts, layers_differ)
    assert report(result, strict, console) is success
    assert capsys.readouterr().err == said
    text = console.file.getvalue()
    assert "an answer" in text
    assert "10.000" in text
    assert origin in text
    stored = json.loads((tmp_path / "cache" / "result.json").read_text())
    assert stored["doubts"] == doubts
    assert stored["origin"] == origin


@pytest.fixture
def task(tiny_model, tmp_path):
    """What the steps of a demonstration share, for a tiny model."""

    def make(**of_the_packed):
        source, packed = tiny_model(), tmp_path / "packed"
        convert(tiny_model(**of_the_packed), packed)
        parts = windows(list(range(3, 300)), 60, 300)
        console = Console(width=120, file=io.StringIO())
        return demo.language.run._Task(source, packed, 128, parts, Prompts(()), console)

    return make


def test_noise_between_windows_is_allowed_and_a_bias_is_not(task):
    """The same mean difference, once from two windows that went elsewhere and once from all."""
    made = task()
    assert not made.shipped
    tokens = predicted(made.parts)
    emulated = torch.full((tokens,), -2.0, dtype=torch.float64)
    row = Figures("W4A4", 1, 0.0, "server", [])

    def compare(server):
        made.doubts.clear()
        row.perplexity = perplexity(server)
        demo.language.run._compare(row, server, emulated, made)
        return made.doubts

    noisy = emulated.clone()
    noisy[:118] -= 0.5  # the first two of five windows
    biased = emulated + float((noisy - emulated).mean())
    assert compare(noisy) == []
    assert compare(biased) == [
        "W4A4: the server's perplexity 9.0436 and the emulation's 7.3891 differ by 22.39%; "
        "5.30% is allowed"
    ]
    assert compare(torch.full_like(emulated, math.nan)) != []


def test_a_model_that_transformers_builds_otherwise_is_not_emulated_and_not_lost(task):
    """A packed layer that transformers' model lacks: no figure, one doubt, and the rest goes on."""
    made = task(num_hidden_layers=3)
    assert demo.language.run._emulated("w4a4", made) is None
    assert demo.language.run._emulated("mxfp4", made) is None
    [doubt] = made.doubts
    assert "transformers has no linear layer model.layers.2." in doubt
    assert len(demo.language.run._emulated("bf16", made).logprobs) == predicted(made.parts)


def test_a_model_that_cannot_be_calibrated_keeps_its_other_rows(task, monkeypatch, tmp_path):
    made = task()
    monkeypatch.setattr("demo.language.run.CACHE", tmp_path / "cache")
    (made.model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        assert demo.language.run._calibrate(made, ["bf16", "calibrated"]) == ["bf16"]
    finally:
        (tmp_path / "tokenizer.json").rename(made.model / "tokenizer.json")
    [doubt] = made.doubts
    assert doubt.startswith("BlockDialect W4A4 calibrated: blockdialect quantize ended with status")
    assert demo.language.run._calibrate(made, ["bf16", "calibrated"]) == ["bf16", "calibrated"]
    assert (
        made.directory("calibrated")
        == tmp_path / "cache" / f"{made.model.name}-blockdialect-calibrated"
    )
    emulated = demo.language.run._emulated("calibrated", made)
    assert emulated.divergence > 0
    assert (made.check.compared, made.check.unequal) == (14, [])


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
        (
            demo.language.run.main,
            ["--model", "gemma3"],
            "demo: --model: 'gemma3'; it must be the directory of a 16-bit checkpoint, or one of "
            "smollm2, gemma3-270m",
        ),
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
        [
            *(sys.executable, "-m", "demo.language.run"),
            *("--formats", "bf16,w4a4", "--tokens", "8192"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((ROOT / ".cache" / "demo" / "result.json").read_text())
    assert result["tokens"] == 8192
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["bf16", "MXFP4-32 W4A4", "BlockDialect W4A4"]
    bf16, mxfp4, dialect = rows.values()
    assert bf16["perplexity"] < dialect["perplexity"] < mxfp4["perplexity"]
    assert dialect["bytes"] < 0.6 * bf16["bytes"]
    assert 0.02 < dialect["divergence"] < 0.5 * mxfp4["divergence"]
    assert 0 < dialect["divergence_error"] < 0.1 * dialect["divergence"]
    assert mxfp4["same_top"] < dialect["same_top"] < 1
    for row in (bf16, dialect):
        assert row["source"] == "server"
        assert row["emulated_perplexity"] == pytest.approx(row["perplexity"], rel=0.005)
        assert len(row["completions"]) == 3
        assert all(row["completions"])
    assert result["prompts"][0] == "def read_"
    left = subprocess.run(["pgrep", "-f", "vllm serve demo/model"], capture_output=True, text=True)
    assert left.stdout == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demonstration_on_another_model(tiny_model, tmp_path):
    """A user's model ends with its tables; the directory's origin stands below them."""
    model = tmp_path / "mine"
    shutil.copytree(tiny_model(), model)
    (model / "ORIGIN.txt").write_text("Mine: made of noise\n")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }} is answered: ")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "demo.language.run", "--model", str(model)),
            *("--formats", "w4a4", "--tokens", "2000"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 of 14 layers give the reference's bits" in done.stdout
    assert "Mine: made of noise" in done.stdout
    result = json.loads((ROOT / ".cache" / "demo" / "result.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["MXFP4-32 W4A4", "BlockDialect W4A4"]
    assert result["origin"] == "Mine: made of noise"
    assert result["layers_differ"] is False
    assert result["prompts"][1] == "What is 7 + 5?"  # a model with a chat template is asked
    assert len(result["rows"][1]["completions"]) == 3
