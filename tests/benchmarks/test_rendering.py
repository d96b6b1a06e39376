"""The committed tables and plots are what the committed results give, and say where from."""

import re
import struct
import zlib

import pytest

from benchmarks.lib import render
from benchmarks.lib.harness import RESULTS, ROOT, read_result

NAMES = render.names()


@pytest.mark.parametrize("path", render.documents(), ids=lambda path: path.name)
def test_committed_tables_are_what_the_results_give(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("<!-- benchmark:") == text.count("<!-- /benchmark -->")
    assert render.render_text(text) == text, "run python -m benchmarks.lib.render"


@pytest.mark.parametrize("name", NAMES)
def test_every_result_is_shown(name):
    shown = "".join(path.read_text(encoding="utf-8") for path in render.documents())
    assert f"<!-- benchmark: {name}." in shown


@pytest.mark.parametrize("name", NAMES)
def test_every_result_was_measured_on_committed_code(name):
    result = read_result(RESULTS / f"{name}.json")
    assert re.fullmatch(r"[0-9a-f]{12}", result.commit), "commit first, then measure"


@pytest.mark.parametrize("name", NAMES)
def test_a_result_holds_no_path(name):
    text = (RESULTS / f"{name}.json").read_text(encoding="utf-8")
    assert not re.search(r"(^|[\s\"'=:])(~|/[A-Za-z])", text)


def test_plots_are_drawn_from_the_committed_results():
    plots = sorted((ROOT / "docs" / "plots").glob("*.png"))
    digests = {name: render.plot_digest(name) for name in NAMES}
    for path in plots:
        name = path.stem.partition("-")[0]
        assert _png_text(path)["Source"] == digests[name], "run python -m benchmarks.lib.render"


def test_a_changed_cell_is_found_and_rebuilt():
    name = NAMES[0]
    table = next(iter(render._module(name).tables(read_result(RESULTS / f"{name}.json").figures)))
    empty = f"before\n<!-- benchmark: {name}.{table} -->\n<!-- /benchmark -->\nafter\n"
    rendered = render.render_text(empty)
    assert rendered.startswith("before\n")
    assert rendered.endswith("<!-- /benchmark -->\nafter\n")
    assert render.render_text(rendered) == rendered
    marker, end, shown = rendered.partition("-->\n")
    shown = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), shown, count=1)
    changed = marker + end + shown
    assert changed != rendered
    assert render.render_text(changed) == rendered


@pytest.mark.parametrize(
    ("marker", "sentence"),
    [
        ("no_such_result.figures", "results/no_such_result.json: does not exist"),
        (f"{NAMES[0]}.no_such_table", "has no table 'no_such_table'"),
    ],
)
def test_a_marker_of_something_unknown_is_an_error(marker, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        render.render_text(f"<!-- benchmark: {marker} -->\n<!-- /benchmark -->\n")


def test_markdown_sets_numbers_flush_right():
    table = [["format", "bits", "loss"], ["A", "4.25", "19.1 dB"], ["B", "4.5", "-3 %"]]
    assert render.markdown(table) == (
        "| format | bits | loss |\n| --- | ---: | ---: |\n| A | 4.25 | 19.1 dB |\n"
        "| B | 4.5 | -3 % |\n"
    )


def test_markdown_refuses_a_short_row():
    with pytest.raises(ValueError, match="another length"):
        render.markdown([["a", "b"], ["1"]])


def _png_text(path):
    """The uncompressed text fields of a PNG file, read by the standard's own layout."""
    data, at, fields = path.read_bytes(), 8, {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        (crc,) = struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        assert crc == zlib.crc32(kind + body)
        if kind == b"tEXt":
            key, _, value = body.partition(b"\0")
            fields[key.decode("latin-1")] = value.decode("latin-1")
        at += 12 + size
    return fields
