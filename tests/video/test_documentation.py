"""docs/guides/video.md: its options are those of the code, and its examples run."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

from diffusers_hook import SemanticDialectConfig
from diffusers_hook.layouts.layouts import layout_named
from tests.video.support.tiny_video import wan_pipeline

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "video.md").read_text(
    encoding="utf-8"
)
NOT_SET_BY_HAND = {"quant_method", "format_version"}
TINY = {"height=480": "height=16", "width=832": "width=16", "num_frames=81": "num_frames=5"}


def test_options_are_those_of_the_configuration():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", TEXT, re.MULTILINE)
    told = {name: ast.literal_eval(default) for name, default in rows}
    fields = SemanticDialectConfig.model_fields
    assert told == {n: f.default for n, f in fields.items() if n not in NOT_SET_BY_HAND}
    assert list(told) == [name for name in fields if name not in NOT_SET_BY_HAND]
    assert all(f"`{name}`" in TEXT for name in NOT_SET_BY_HAND)


def test_examples_run(tmp_path):
    """As they stand, one after the other, on a tiny pipeline and a tiny video."""
    pipe = wan_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    space = {"MODEL": str(tmp_path / "model"), "SAVED": str(tmp_path / "saved")}
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(examples) == 3
    code = "".join(examples)
    for written, tiny in TINY.items():
        code = code.replace(written, tiny)
    (tmp_path / "examples.py").write_text(code, encoding="utf-8")
    after = runpy.run_path(str(tmp_path / "examples.py"), init_globals=space)
    assert after["video"].shape == (1, 5, 16, 16, 3)


def test_the_named_layout_is_known():
    assert layout_named(re.search(r'layout="(\w+)"', TEXT).group(1)).models


def test_links_lead_somewhere():
    folder = Path(__file__).resolve().parents[2] / "docs"
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (folder / target).exists(), target
