"""The command line: exit codes, one sentence, no traceback."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dialect_kernels import __version__
from dialect_plugin.checkpoint.reader import open_packed
from dialect_plugin.cli import app


def run(*arguments):
    wide = {"COLUMNS": "160"}  # so that tables and help texts are not wrapped
    return CliRunner(env=wide).invoke(app, [str(a) for a in arguments])


def test_quantize_and_inspect(tiny_model, tmp_path):
    override = ["--override", "re:.*down_proj=16"]
    done = run("quantize", tiny_model(), tmp_path / "packed", *override)
    assert done.exit_code == 0, done.output
    assert "14 layers at" in done.output
    seen = run("inspect", tmp_path / "packed")
    assert seen.exit_code == 0, seen.output
    assert "valid: format version 1" in seen.output


def test_a_checkpoint_may_ask_for_attention_in_4_bits(tiny_model, tmp_path):
    wanted = ["--kv-cache", "dialect", "--attention", "dialect"]
    done = run("quantize", tiny_model(), tmp_path / "packed", *wanted)
    assert done.exit_code == 0, done.output
    assert open_packed(tmp_path / "packed").scheme.attention == "dialect"
    seen = run("inspect", tmp_path / "packed")
    assert "valid: format version 2" in seen.output
    assert (
        "KV cache in 4 bits, no means; queries and probabilities of attention, too" in seen.output
    )


def test_an_overrides_file(tiny_model, tmp_path):
    file = tmp_path / "overrides.json"
    file.write_text('{"model.layers.0.mlp.down_proj": {"block_size": 16}}')
    done = run("quantize", tiny_model(), tmp_path / "packed", "--overrides", file)
    assert done.exit_code == 0, done.output
    assert open_packed(tmp_path / "packed").read("model.layers.0.mlp.down_proj").block_size == 16


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--block-size", "48"], "--block-size: '48'; it must be 16, 32 or 64"),
        (["--book", "x"], "--book: 'x'; it must be dialect_fp4 or semantic_32"),
        (["--override", "down_proj"], "--override: 'down_proj'; it must be PATTERN=BLOCK_SIZE"),
        (
            ["--override", "re:x=48"],
            "'re:x=48'; it must be PATTERN=BLOCK_SIZE with a block size",
        ),
        (["--activation-format", "W4A4"], "'W4A4'; it must be dialect, fp8 or none"),
        (["--attention", "dialect"], "which needs keys and values in 4 bits: set kv_cache to"),
        (["--attention", "fp8"], "--attention: 'fp8'; it must be none or dialect"),
        (["--ignore", "re:("], "--ignore: 're:(' is not a regular expression"),
        (["--targets", "re:("], "--targets: 're:(' is not a regular expression"),
    ],
)
def test_bad_options(tiny_model, tmp_path, arguments, sentence):
    done = run("quantize", tiny_model(), tmp_path / "packed", *arguments)
    assert done.exit_code == 1
    assert sentence in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.output
    assert not (tmp_path / "packed").exists()


def test_a_hub_id_without_a_network(tmp_path):
    done = run("quantize", "organisation/model", tmp_path / "packed")
    assert done.exit_code == 1
    assert done.stderr.startswith("blockdialect: organisation/model: is not a local directory")
    assert done.stderr.count("\n") == 1


def test_usage():
    assert run("quantize").exit_code == 2


def test_help_lists_the_values_that_an_option_takes():
    shown = {
        command: " ".join(run(command, "--help").output.replace("│", " ").split())
        for command in ("quantize", "plan", "export")
    }
    for values in ("16|32|64", "dialect_fp4|semantic_32", "dialect|fp8|none"):
        assert values in shown["quantize"]
    assert "error|relative" in shown["plan"]
    assert "--to fp8" in shown["export"]


def test_a_faulty_overrides_file_is_named(tiny_model, tmp_path):
    file = tmp_path / "overrides.json"
    file.write_text('{"model.layers.0.mlp.down_proj": {"block_size": 48}}')
    refused = run("quantize", tiny_model(), tmp_path / "packed", "--overrides", file)
    assert refused.exit_code == 1
    sentence = f"blockdialect: {file}: overrides.model.layers.0.mlp.down_proj.block_size is 48"
    assert refused.stderr.startswith(sentence)
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "packed").exists()


def test_a_bad_expression_in_an_overrides_file_is_named_alone(tiny_model, tmp_path):
    file = tmp_path / "overrides.json"
    file.write_text('{"re:.*down_proj": {"block_size": 16}, "re:(": {"block_size": 16}}')
    refused = run("quantize", tiny_model(), tmp_path / "packed", "--overrides", file)
    assert refused.exit_code == 1
    sentence = f"blockdialect: {file}: overrides: 're:(' is not a regular expression"
    assert refused.stderr.startswith(sentence)
    assert "down_proj" not in refused.stderr
    assert refused.stderr.count("\n") == 1


WITHOUT_TORCH = """
import sys
from dialect_plugin.cli import app
try:
    app(sys.argv[1:])
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--help"], None),
        (["quantize", "--help"], None),
        (["--version"], None),
        (["quantize", "S", "D", "--block-size", "48"], "--block-size: '48'; it must be 16, 32"),
        (["quantize", "S", "D", "--ignore", "re:("], "--ignore: 're:(' is not a regular"),
        (["quantize", "S", "D", "--override", "x=48"], "--override: 'x=48'; it must be PATTERN"),
        (["plan", "S", "--bits", "4.0"], "--bits: 4; blocks of 64 need more than 4.125 bits"),
        (["plan", "S", "--bits", "nan"], "--bits: nan; blocks of 64 need more than 4.125 bits"),
        (["plan", "S", "--bits", "6"], "--bits: 6; blocks of 16 never need more than 5 bits"),
        (["plan", "S", "--bits", "4.3", "--output", "no/x"], "--output: no/x lies in a directory"),
        (["report", "S", "--max-rows", "8", "--all-rows"], "--max-rows: 8 has no effect"),
    ],
)
def test_help_and_wrong_options_do_not_wait_for_torch(arguments, sentence):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True
    )
    assert done.returncode == (0 if sentence is None else 1), done.stderr
    assert done.stdout.endswith("False\n")
    if sentence is not None:
        assert done.stderr.startswith(f"blockdialect: {sentence}")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "{file}: is not valid JSON (Expecting property name"),
        (
            '{"down_proj": {"block_size": 48}}',
            "{file}: overrides.down_proj.block_size is 48; it must be 16",
        ),
        ('{"a": {"block_size": 16}, "a": {"block_size": 32}}', "the key 'a' is given 2"),
        (None, "--overrides: {file} is not there; give a file such as `plan` writes"),
    ],
)
def test_a_faulty_overrides_file_does_not_wait_for_torch(text, sentence, tmp_path):
    file = tmp_path / "overrides.json"
    if text is not None:
        file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "quantize", "S", "D", "--overrides", str(file)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith("False\n")
    assert sentence.replace("{file}", str(file)) in done.stderr
    assert done.stderr.count("\n") == 1


def test_quantize_says_what_it_did_and_how_to_go_on(tiny_model, tmp_path):
    done = run("quantize", tiny_model(intermediate_size=208), tmp_path / "packed")
    said = done.stdout.splitlines()
    assert said[0].startswith("14 layers at 4.3")
    assert said[1].endswith("which have another one: model.layers.0-1.mlp.down_proj (16)")
    assert said[-1] == f"serve it with: vllm serve {tmp_path / 'packed'}"
    done = run("quantize", tiny_model(intermediate_size=200), tmp_path / "odd")
    assert "which stay in 16 bit: model.layers.0-1.mlp.down_proj\n" in done.stdout
    mixture = tiny_model("MixtralForCausalLM")
    done = run("quantize", mixture, tmp_path / "mixture")
    assert done.stdout.startswith("32 layers at ")
    assert "experts" not in done.stdout
    done = run("quantize", mixture, tmp_path / "plain", "--no-experts")
    assert done.stdout.startswith("8 layers at ")
    assert "experts stay in 16 bit\n" in done.stdout


def test_verify():
    done = run("verify")
    assert done.exit_code == 0, done.output
    assert "agree with the golden vectors" in done.output


def test_the_version():
    shown = run("--version")
    assert shown.exit_code == 0
    assert shown.stdout == f"blockdialect {__version__}\n"


@pytest.mark.parametrize("columns", ["80", "20"])
def test_tables_are_plain_and_whole_whatever_the_width(tiny_model, tmp_path, columns):
    source, packed = tiny_model(), tmp_path / "packed"
    assert run("quantize", source, packed).exit_code == 0
    for arguments in (
        ["inspect", packed],
        ["report", source, "--max-rows", 8],
        ["plan", source, "--bits", "4.35", "--max-rows", 8],
    ):
        shown = CliRunner(env={"COLUMNS": columns}).invoke(app, [str(a) for a in arguments])
        assert shown.exit_code == 0, shown.stderr
        lines = shown.stdout.splitlines()
        assert max(map(len, lines)) <= 80
        assert "…" not in shown.stdout
        total = next(i for i, line in enumerate(lines) if line.startswith("all 14 layers"))
        assert total < lines.index("by projection, below model.layers")
        assert lines.index("by projection, below model.layers") < lines.index(
            "by depth, below model.layers"
        )
        assert any(line.startswith("mlp.down_proj ") for line in lines)
