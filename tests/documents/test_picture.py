"""The picture of a block shows what the code computes."""

from __future__ import annotations

import re
import runpy

from dialect_kernels import quantize
from tests.documents.markdown import ROOT

PICTURES = ROOT / "docs" / "pictures"
SCRIPT = runpy.run_path(str(PICTURES / "block_and_dialects.py"))


def test_the_committed_picture_is_of_this_block_and_these_dialects():
    drawn = (PICTURES / "block-and-dialects.svg").read_text(encoding="utf-8")
    texts = re.findall(r"<text [^>]*>(.*?)</text>", drawn)
    packed = quantize(SCRIPT["BLOCK"][None])
    chosen = int(packed.ids()[0, 0])
    errors = SCRIPT["errors"](SCRIPT["BLOCK"] / (2 * packed.block_scale()[0, 0]))
    assert errors.index(min(errors)) == chosen
    assert f"on dialect {chosen}" in texts
    assert [text for text in texts if re.fullmatch(r"\d\.\d\d", text)] == [
        f"{error:.2f}" for error in errors
    ]
