"""``blockdialect evaluate``: its table, its files, and options that are refused."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dialect_plugin.cli import app

SMALL = ["--windows", "2", "--sequence-length", "64"]


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])


def test_table_json_and_plot(tiny_model, packed, text, tmp_path):
    files = ["--json", tmp_path / "found.json", "--plot", tmp_path / "kl.png"]
    formats = ["--formats", "mxfp4-32", "--ratio-to", "mxfp4-32", "--worst", "3"]
    done = run("evaluate", packed(), "--against", tiny_model(), "--text", text, *SMALL, *files,
               *formats)  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0].endswith(
        "on text.txt: 126 tokens in 2 windows of 64; 14 linear layers emulated"
    )
    assert any(line.startswith("packed W4A4 4.") for line in lines)
    assert any(line.startswith("mxfp4-32 W4A4 4.250 ") for line in lines)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["packed", "mxfp4-32"]
    assert len(found["rows"][0]["worst"]) == 3
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--formats", "mxfp4"], "--formats: 'mxfp4'; 'mxfp4' is not a format; it must be one of"),
        (["--activations", "w4"], "--activations: 'w4'; it must be some of own, w4a4"),
        (["--scope", "x"], "--scope: 'x'; it must be 'linear' or 'all'"),
        (["--windows", "0"], "--windows: 0"),
        (["--samples", "4"], "--samples: 4 has no effect without --calibrate"),
        (["--formats", "mxfp4-32+gptq"], "--calibrate: None; mxfp4-32+gptq needs text"),
        (["--json", "no/x.json"], "--json: no/x.json lies in a directory that is not there"),
        (["--plot", "x.txt"], "--plot: x.txt; its name must end in .png, .svg or .pdf"),
        (["--device", "sofa"], "--device: 'sofa'"),
    ],
)
def test_bad_options(tiny_model, packed, text, arguments, sentence):
    done = run("evaluate", packed(), "--against", tiny_model(), "--text", text, *arguments)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_wrong_options_do_not_wait_for_torch():
    program = (
        "import sys\nfrom dialect_plugin.cli import app\n"
        "try:\n    app(sys.argv[1:])\nfinally:\n    print('torch' in sys.modules)"
    )
    arguments = ["evaluate", "D", "--against", "S", "--text", "default"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )
    assert done.stdout == "False\n"
    assert done.stderr.startswith("blockdialect: --text: 'default'; models are calibrated on that")
