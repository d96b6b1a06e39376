"""The comparison of a server with its emulation, token by token."""

import math

import pytest
import torch

from benchmarks.language.bench_agreement import compare, tables


def test_tokens_are_equal_until_a_window_parts():
    parts = [[0] * 5, [0] * 4, [0] * 3]  # 4, 3 and 2 predicted tokens
    emulated = torch.full((9,), -1.0, dtype=torch.float64)
    difference = torch.tensor([1e-5, -2e-5, 0.5, 1e-6, 0, 0, 3e-5, 0.1, -0.3])
    found = compare(emulated + difference, emulated, parts)
    assert found["agreed"] == [2, 3, 0]
    assert found["tokens"] == 9
    assert found["largest_before"] == pytest.approx(3e-5)
    others = torch.tensor([0.5, 1e-6, 0.1, -0.3])
    assert found["deviation_after"] == pytest.approx(float(others.std()))
    assert found["mean"] == pytest.approx(float(difference.mean()))
    assert found["emulated_perplexity"] == pytest.approx(math.e)
    assert found["served_perplexity"] == pytest.approx(math.exp(1 - float(difference.mean())))


def test_the_table_has_a_dash_where_there_is_nothing_to_say():
    same = torch.full((3,), -1.0, dtype=torch.float64)
    rows = [
        {"weights": "packed", "format": "W4A16", "dtype": "float32"},
        {"weights": "calibrated", "format": "W4A4", "dtype": "bfloat16"},
    ]
    rows[0] |= compare(same, same, [[0] * 4])
    rows[1] |= compare(same + 0.5, same, [[0] * 4])
    _, first, second = tables({"rows": rows})["formats"]
    assert (first[0], second[0]) == ("W4A16", "W4A4, calibrated")
    assert first[5:] == ["3 of 3", "0e+00", "–"]
    assert second[4].startswith("+0.5000 ±")
    assert second[5:] == ["0 of 3", "–", "0.00"]
