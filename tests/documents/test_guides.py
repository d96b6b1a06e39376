"""The Python code of the guides and of the quickstart runs as it stands."""

from __future__ import annotations

import re
import runpy

import pytest

from dialect_plugin import open_packed
from dialect_plugin.checkpoint.convert import convert
from diffusers_hook.layouts import layout_named
from tests.documents.markdown import ROOT, code_blocks
from tests.video.support.tiny_video import wan_pipeline

VIDEO = (ROOT / "docs" / "guides" / "video.md").read_text(encoding="utf-8")
TINY = {
    "height=480": "height=16",
    "width=832": "width=16",
    "num_frames=81": "num_frames=5",
    '"cuda"': '"cpu"',
}


def run(path, code, **space):
    path.write_text(code, encoding="utf-8")
    return runpy.run_path(str(path), init_globals=space)


def python_of(text):
    return "".join(code for language, code in code_blocks(text) if language == "python")


def test_the_video_guide_runs_on_a_tiny_pipeline_and_a_tiny_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it writes into the working directory
    wan_pipeline().save_pretrained(tmp_path / "model")
    code = python_of(VIDEO)
    for written, tiny in TINY.items():
        assert written in code
        code = code.replace(written, tiny)
    places = {name: str(tmp_path / name.lower()) for name in ("MODEL", "SAVED", "LORA")}
    after = run(tmp_path / "guide.py", code, **places)
    assert after["video"].shape == (1, 5, 16, 16, 3)
    assert (tmp_path / "losses.json").is_file()
    assert list((tmp_path / "lora").glob("*.safetensors"))


def test_the_named_layout_is_known():
    assert layout_named(re.search(r'layout="(\w+)"', VIDEO).group(1)).models


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_the_lines_of_python_at_the_door_run(tmp_path, name):
    code = python_of((ROOT / name).read_text(encoding="utf-8"))
    start = code.index("import torch\nfrom dialect_kernels")
    assert run(tmp_path / "lines.py", code[start:])["y"].shape == (8, 512)


@pytest.mark.filterwarnings("ignore:You passed .quantization_config")  # transformers' own
def test_the_guide_of_transformers_runs(tmp_path, tiny_model):
    convert(tiny_model(), tmp_path / "DST")
    code = python_of((ROOT / "docs" / "guides" / "transformers.md").read_text(encoding="utf-8"))
    for name, path in {
        "SRC": tiny_model(),
        "DST": tmp_path / "DST",
        "SAVED": tmp_path / "s",
    }.items():
        code = code.replace(f'"{name}"', repr(str(path)))
    adapted = run(tmp_path / "guide.py", code)["adapted"]
    assert any("lora" in name for name, _ in adapted.named_parameters())
    assert open_packed(tmp_path / "s").scheme.rotation == "hadamard_32"


def test_the_conversion_guide_runs(tmp_path, tiny_model):
    code = python_of((ROOT / "docs" / "guides" / "convert.md").read_text(encoding="utf-8"))
    code = code.replace('"SRC"', repr(str(tiny_model()))).replace(
        '"DST"', repr(str(tmp_path / "d"))
    )
    assert run(tmp_path / "convert.py", code)["result"].layers
    assert (tmp_path / "d" / "config.json").is_file()
