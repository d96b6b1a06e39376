"""The README's claims are the committed results'."""

from __future__ import annotations

import re
from statistics import mean

from benchmarks.lib.harness import RESULTS, read_result
from tests.documents.markdown import ROOT

TEXT = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def figures(name):
    return read_result(RESULTS / f"{name}.json").figures


def told(pattern):
    """The numbers of a sentence of the README."""
    found = re.search(pattern, TEXT)
    assert found, pattern
    return [float(number) for number in found.groups()]


def test_the_language_claim():
    perplexity = {row["name"]: row["perplexity"] for row in figures("demo")["rows"]}
    losses = [
        round(100 * (perplexity[name] / perplexity["bf16"] - 1), 1)
        for name in ("BlockDialect W4A4", "MXFP4-32 W4A4")
    ]
    assert told(r"perplexity rises by ([\d.]+) % over bf16 \(MXFP4: ([\d.]+) %\)") == losses


def test_the_video_claim():
    psnr = {name: row.get("psnr") for name, row in figures("video_quality")["formats"].items()}
    gained = round(mean(psnr["+ 10% top"]) - mean(psnr["MXFP4-32"]), 1)
    assert told(r"videos come ([\d.]+) dB of PSNR closer") == [gained]
