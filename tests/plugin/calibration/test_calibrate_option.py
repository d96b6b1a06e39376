"""``blockdialect quantize --calibrate``: its defaults, and options that are refused."""

import json

import pytest
from typer.testing import CliRunner

from dialect_plugin.checkpoint.reader import open_packed
from dialect_plugin.cli import app

SMALL = ["--samples", "4", "--sequence-length", "64"]


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])


def test_the_default_text_book_and_rotation(tiny_model, tmp_path):
    packed = tmp_path / "packed"
    done = run("quantize", tiny_model(), packed, "--calibrate", "default", *SMALL)
    assert done.exit_code == 0, done.output
    assert "calibrated on 4 windows of 64 tokens of default (rule gptq)" in done.stdout
    scheme = open_packed(packed).scheme
    assert (scheme.book, scheme.rotation, scheme.block_size) == ("semantic_32", "hadamard_32", 32)
    again = run("quantize", tiny_model(), packed, "--calibrate", "default", *SMALL)
    assert "finished; nothing to do" in again.stdout


def test_book_and_rotation_can_be_chosen(tiny_model, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "some words " * 200}) + "\n")
    chosen = ["--book", "dialect_fp4", "--rotation", "none", "--damping", "0.1"]
    text = ["--calibrate", tmp_path / "text.jsonl", *SMALL]
    done = run("quantize", tiny_model(), tmp_path / "packed", *text, *chosen)
    assert done.exit_code == 0, done.output
    scheme = open_packed(tmp_path / "packed").scheme
    assert (scheme.book, scheme.rotation, scheme.format_version) == ("dialect_fp4", "none", 1)
    record = json.loads((tmp_path / "packed" / "blockdialect_calibration.json").read_text())
    assert record["damping"] == 0.1


def test_without_calibration_nothing_is_rotated(tiny_model, tmp_path):
    assert run("quantize", tiny_model(), tmp_path / "packed").exit_code == 0
    scheme = open_packed(tmp_path / "packed").scheme
    assert (scheme.book, scheme.rotation, scheme.format_version) == ("semantic_32", "none", 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--samples", "8"], "--samples: 8 has no effect without --calibrate"),
        (["--sequence-length", "8"], "--sequence-length: 8 has no effect without --calibrate"),
        (["--damping", "0.1"], "--damping: 0.1 has no effect without --calibrate"),
        (["--device", "cpu"], "--device: cpu has no effect without --calibrate"),
        (["--calibrate", "default", "--samples", "0"], "--samples: "),
        (["--calibrate", "default", "--sequence-length", "1"], "--sequence-length: 1"),
        (["--calibrate", "default", "--damping", "0"], "--damping: "),
        (["--calibrate", "default", "--damping", "2"], "--damping: 2"),
        (["--calibrate", "default", "--damping", "nan"], "--damping: nan"),
        (["--calibrate", "absent.txt", *SMALL], "--calibrate: absent.txt is not a file"),
        (["--calibrate", "default", "--device", "sofa"], "--device: 'sofa'"),
    ],
)
def test_bad_options(tiny_model, tmp_path, arguments, sentence):
    done = run("quantize", tiny_model(), tmp_path / "packed", *arguments)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "packed").exists()
