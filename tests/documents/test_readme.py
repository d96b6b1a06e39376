"""The README's claims are the committed results'."""

from __future__ import annotations

import re
from statistics import mean, median

from benchmarks.language.bench_accuracy import rows_of
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
    rows = rows_of(figures("accuracy-smollm2"))
    names = (
        "semantic_32-32+rotation+gptq",
        "semantic_32-32+balance+rotation+gptq",
        "mxfp4-32+rotation+gptq",
        "nvfp4-16+rotation+gptq",
        "mxfp4-32",
        "nvfp4-16",
    )
    assert told(
        r"KL divergence of ([\d.]+) nats .*; with balanced channels, ([\d.]+)\. .* MXFP4 loses "
        r"([\d.]+) at 4\.25 bits and NVFP4 ([\d.]+) at 4\.5; rounded to nearest, ([\d.]+) and "
        r"([\d.]+)\. "
    ) == [round(rows[name, "W4A4"].mean_divergence, 2) for name in names]


def test_the_video_claim():
    psnr = {name: row.get("psnr") for name, row in figures("video_quality")["formats"].items()}
    gained = round(mean(psnr["+ 10% top"]) - mean(psnr["MXFP4-32"]), 1)
    assert told(r"Videos come ([\d.]+) dB of PSNR closer") == [gained]


def test_the_cpu_limit():
    """The speed of served decoding is the table's, and first tokens of eight do come later."""
    formats = figures("serve")["shapes"]["llama-3.2-1b"]["formats"]

    def times_faster(load, key):
        return median(formats["bf16"][load][key]) / median(formats["w4a4"][load][key])

    assert told(
        r"decodes one request ([\d.]+) times as fast as bf16, eight at once ([\d.]+) times"
    ) == [round(times_faster(load, "tpot_ms"), 2) for load in ("single", "many")]
    assert times_faster("many", "ttft_ms") < 1
