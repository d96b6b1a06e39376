"""The model of times: what it says of simple products, reckoned by hand, and its limits."""

import pytest

from benchmarks.kernels import bench_predicted_time as predicted
from benchmarks.lib.harness import RESULTS, read_result
from benchmarks.lib.shapes import LLAMA_8B

WAYS = predicted.WAYS
FIGURES = read_result(RESULTS / "predicted_time.json").figures


def test_the_library_by_hand():
    few, many = predicted.Product(1, 4096, 4096), predicted.Product(16384, 4096, 4096)
    read = 2 * 4096 * 4096 + 2 * 4096 + 2 * 4096
    assert predicted.bfloat16(few) == pytest.approx(2.3e-6 + read / 4.3e12)
    assert predicted.bfloat16(many) == pytest.approx(2.3e-6 + 2 * 16384 * 4096**2 / 790e12)


def test_a_quantizer_by_hand():
    product = predicted.Product(4096, 4096, 4096)
    elements = 4096 * 4096
    memory = 3 * elements / 4.3e12
    lookups = elements / 32 * 8 / 132 / 1.755e9
    assert predicted.quantizing(product, "fp8", 1) == pytest.approx(2.3e-6 + memory)
    assert predicted.quantizing(product, "dialect", 1) == pytest.approx(2.3e-6 + lookups)
    one = predicted.Product(1, 4096, 14336)
    assert predicted.quantizing(one, "dialect", 21) == pytest.approx(2.3e-6 + 2.5e-6)


def test_decoding_by_hand():
    product = predicted.Product(4096, 4096, 4096)
    weights = 4096 * 4096
    decoding = weights * (17 / 32 + 1) / 4.3e12
    for fast, rate in ((False, 1175e12), (True, 1500e12)):
        want = 2 * 2.3e-6 + decoding + 2 * 4096 * weights / rate
        assert predicted.decoded(product, "dialect", fast) == pytest.approx(want)


def test_what_is_kept_decoded_by_hand():
    product = predicted.Product(128, 4096, 4096)
    read = 4096 * 4096 + 128 * (4096 + 2 * 4096)
    assert predicted.multiplied(product, "fp8", False) == pytest.approx(2.3e-6 + read / 4.3e12)
    large = predicted.Product(16384, 4096, 4096)
    want = 2.3e-6 + 2 * 16384 * 4096**2 / 790e12
    assert predicted.multiplied(large, "none", False) == pytest.approx(want)
    assert want == predicted.bfloat16(large), "16-bit activations gain nothing and lose nothing"


def test_the_slowest_number_of_tokens_is_no_faster_than_those_shown():
    for kind in predicted.FORMATS:
        for how in ("", ", kept"):
            slowest, _ = FIGURES["least"][f"{kind}{how}"]
            for tokens in predicted.TOKENS:
                rows = [row for row in FIGURES["rows"] if row["tokens"] == tokens]
                ours = sum(row[f"{kind}{how}"] for row in rows)
                shown = sum(row["bfloat16"] for row in rows) / ours
                assert slowest <= shown * 1.01, (kind, how, tokens)


def test_no_time_is_below_what_memory_takes():
    for row in FIGURES["rows"]:
        assert all(row[kind + how] > row["floor"] for kind in predicted.FORMATS for how in WAYS)


def test_every_goal_is_judged():
    head, *rows = predicted.tables(FIGURES)["layer"]
    assert [int(row[0]) for row in rows] == list(predicted.GOALS) == list(predicted.TOKENS)
    for row in rows:
        best = float(row[head.index("W4A4, times as fast as bfloat16")].split()[-1])
        reached = row[head.index("goal")].endswith(": reached")
        assert best >= predicted.GOALS[int(row[0])] or not reached
    assert len(FIGURES["rows"]) == len(rows) * len(LLAMA_8B.fused_projections)
