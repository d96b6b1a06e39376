"""Rebuild the tables and plots of the documentation from ``benchmarks/results/*.json``.

A table stands between two comments of README.md or docs/**/*.md, and is replaced as a whole::

    <!-- benchmark: NAME.TABLE -->
    <!-- /benchmark -->

    python -m benchmarks.lib.render

The plots of ``bench_NAME.py`` become ``docs/plots/NAME-PLOT.png``; each carries a digest of the
result that it shows, so that a stale one is found without comparing pixels.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from .harness import RESULTS, ROOT, Result, Table, module_of, read_result

PLOTS = ROOT / "docs" / "plots"
_MARKED = re.compile(
    r"(?P<open><!-- benchmark: (?P<name>[\w-]+)\.(?P<table>\w+) -->\n)"
    r".*?"
    r"(?P<close><!-- /benchmark -->)",
    re.DOTALL,
)
_NUMBER = re.compile(r"^[-+~≤≥]*[\d.,]+(?:\s?[%x×]|\s[A-Za-zµ/]+)*$")
_DIGEST_KEY = "Source"


def names() -> list[str]:
    """The names of all committed results."""
    return sorted(path.stem for path in RESULTS.glob("*.json"))


def documents() -> list[Path]:
    """The Markdown files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def render_text(text: str) -> str:
    """`text` with every marked table rebuilt.

    Raises:
        ValueError: if a marker names a result or a table that does not exist.
    """
    return _MARKED.sub(
        lambda found: found["open"] + _table(found["name"], found["table"]) + found["close"], text
    )


def markdown(table: Table) -> str:
    """A Markdown table; columns whose cells are all numbers are set flush right.

    Raises:
        ValueError: if the rows are not equally long.
    """
    head, *rows = table
    if any(len(row) != len(head) for row in rows):
        raise ValueError(f"a row of the table with the head {list(head)} has another length")
    columns = range(len(head))
    right = [bool(rows) and all(_NUMBER.match(row[i]) for row in rows) for i in columns]
    lines = [head, ["---:" if right[i] else "---" for i in columns], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot_digest(name: str) -> str:
    """SHA-256 of the result that a plot shows."""
    return hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()


def render_plots(name: str) -> list[Path]:
    """Write the plots of a result and return their files."""
    plots = getattr(_module(name), "plots", None)
    if plots is None:
        return []
    PLOTS.mkdir(parents=True, exist_ok=True)
    written = []
    for plot, figure in plots(_result(name).figures).items():
        path = PLOTS / f"{name}-{plot}.png"
        figure.savefig(path, dpi=120, metadata={_DIGEST_KEY: plot_digest(name), "Software": None})
        written.append(path)
    return written


def _table(name: str, table: str) -> str:
    result = _result(name)
    module = _module(name)
    tables = module.tables(result.figures)
    if table not in tables:
        raise ValueError(f"bench_{name}: has no table {table!r}; it has {', '.join(tables)}")
    caption = result.caption(getattr(module, "PACKAGES", ("torch",)))
    return f"{markdown(tables[table])}\n<sub>{caption}</sub>\n"


@cache
def _result(name: str) -> Result:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        known = ", ".join(names())
        raise ValueError(f"results/{name}.json: does not exist; there are {known}")
    return read_result(path)


def _module(name: str) -> ModuleType:
    return import_module(module_of(name))


def main() -> None:
    """Rebuild everything."""
    for path in documents():
        text = path.read_text(encoding="utf-8")
        rendered = render_text(text)
        if rendered != text:
            path.write_text(rendered, encoding="utf-8")
            print(f"rebuilt the tables of {path.relative_to(ROOT)}")
    for name in names():
        for path in render_plots(name):
            print(f"drew {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
