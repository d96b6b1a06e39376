"""The command line: exit codes, one sentence, no traceback."""

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
        (["--ignore", "re:("], "--ignore: ['re:(']; 're:(' is not a regular expression"),
        (["--targets", "re:("], "--targets: ['re:(']; 're:(' is not a regular expression"),
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


def test_quantize_says_what_it_did_and_how_to_go_on(tiny_model, tmp_path):
    done = run("quantize", tiny_model(intermediate_size=208), tmp_path / "packed")
    said = done.stdout.splitlines()
    assert said[0].startswith("14 layers at 4.3")
    adapted = ", ".join(f"model.layers.{i}.mlp.down_proj (16)" for i in range(2))
    assert said[1].endswith(f"which have another one: {adapted}")
    assert said[-1] == f"serve it with: vllm serve {tmp_path / 'packed'}"
    done = run("quantize", tiny_model(intermediate_size=200), tmp_path / "odd")
    left = ", ".join(f"model.layers.{i}.mlp.down_proj" for i in range(2))
    assert f"which stay in 16 bit: {left}" in done.stdout
    done = run("quantize", tiny_model("MixtralForCausalLM"), tmp_path / "mixture")
    assert "the experts stay in 16 bit" in done.stdout


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
