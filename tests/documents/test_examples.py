"""Every example runs as it stands."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest

from examples import quantize, video
from tests.documents.markdown import ROOT

EXAMPLES = ROOT / "examples"


def test_quantize(tmp_path, capsys):
    quantize.main(quantize.MODEL, tmp_path / "packed")
    printed = capsys.readouterr().out
    assert "4.266 bits per weight" in printed
    errors = [float(line.rpartition(" ")[2]) for line in printed.splitlines()[-3:]]
    assert errors == sorted(errors, reverse=True)
    assert 0.05 < errors[-1] < errors[0] < 0.2


def test_video(capsys):
    video.main(steps=2)
    printed = capsys.readouterr().out
    assert "dB against 16 bit" in printed
    assert "layers in 4 bit" in printed


@pytest.mark.slow
def test_serve():
    done = subprocess.run(
        [sys.executable, "-m", "examples.serve"],
        cwd=ROOT,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, prompt, completion = done.stdout.rpartition("import os\n\nclass ")
    assert prompt
    assert len(completion.strip()) > 20


def cells():
    """(source, printed text) of every code cell of the notebook."""
    notebook = json.loads((EXAMPLES / "dialects.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            streams = [o for o in cell["outputs"] if o["output_type"] == "stream"]
            yield "".join(cell["source"]), "".join("".join(o["text"]) for o in streams)


def test_the_notebook_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = "\n\n".join(source for source, _ in cells())
    (tmp_path / "dialects.py").write_text(code, encoding="utf-8")
    runpy.run_path(str(tmp_path / "dialects.py"))
    assert capsys.readouterr().out == "".join(printed for _, printed in cells())


def test_the_notebook_shows_its_picture():
    text = (EXAMPLES / "dialects.ipynb").read_text(encoding="utf-8")
    assert text.count("image/png") == 1


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert files
    assert all(f"[{name}]({name})" in listed for name in files)
