"""The benchmark of starts, as far as it can be seen without a server."""

from benchmarks.language.bench_start import loading_seconds, tables

LOG = """\
(EngineCore pid=7) INFO 11-27 20:34:18 [default_loader.py:501] Loading weights took 2.71 seconds
(APIServer pid=5) INFO:     Application startup complete.
"""


def _way(ready_s, loading_s):
    return {"ready_s": ready_s, "loading_s": loading_s, "peak_bytes": [1 << 30, 3 << 29, 1 << 30]}


def test_the_log_states_how_long_loading_took():
    assert loading_seconds(LOG) == 2.71
    assert loading_seconds("nothing of it") is None


def test_differences_are_taken_round_by_round():
    ways = {
        "bf16": _way([30.0, 40.0, 35.0], [2.0, 3.0, 2.5]),
        "online": _way([34.0, 42.0, 41.0], [5.0, 7.0, 6.0]),
        "packed": _way([29.0, 38.0, 36.0], [None, None, None]),
    }
    found = tables({"ways": ways})
    assert [row[1:] for row in found["ready"][1:]] == [
        ["35.0 s (30.0 to 40.0)", "–", "2.5 s", "1.50 GiB"],
        ["41.0 s (34.0 to 42.0)", "+4.0 s", "6.0 s", "1.50 GiB"],
        ["36.0 s (29.0 to 38.0)", "-1.0 s", "–", "1.50 GiB"],
    ]
    assert [row[1:] for row in found["goals"][1:]] == [["≤ 5 s", "+4.0 s"], ["< 0 s", "-1.0 s"]]


def test_without_bf16_there_is_nothing_to_compare_with():
    found = tables({"ways": {"packed": _way([29.0], [1.0])}})
    assert found["ready"][1][2] == "–"
    assert len(found["goals"]) == 1
