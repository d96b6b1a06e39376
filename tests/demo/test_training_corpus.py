"""The rules that keep held-out text out of the training text, on small made-up libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.language.train.corpus import (
    HELD_OUT_BYTES,
    HELD_OUT_MODULE_BYTES,
    SourceFile,
    choose_held_out,
    module_of,
    read_sources,
    split_by_module,
)

MODULES = [f"module_{i:02}" for i in range(40)]
LINES = 1000


def source(name: str, lines: int = LINES) -> SourceFile:
    stem = name.removesuffix(".py")
    return SourceFile(name, "".join(f"{stem}_{i} = {i}  # {stem}\n" for i in range(lines)))


def library() -> list[SourceFile]:
    return [source(f"{name}.py") for name in MODULES]


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("json/decoder.py", "json"),
        ("io.py", "io"),
        ("_pyio.py", "io"),
        ("_strptime.py", "strptime"),
        ("__future__.py", "__future__"),
    ],
)
def test_module_of(path: str, module: str) -> None:
    assert module_of(path) == module


def test_a_package_goes_to_one_side_whole() -> None:
    files = [source(f"{name}/{part}.py", 100) for name in MODULES for part in "abc"]
    split = split_by_module(iter(files))
    train = {module_of(file.path) for file in split.train}
    held_out = {module_of(file.path) for file in split.held_out}
    assert train | held_out == set(MODULES)
    assert train & held_out == set()
    assert held_out


def test_held_out_limits() -> None:
    sizes = {f"m{i}.py": 20_000 + i for i in range(100)} | {"big.py": HELD_OUT_MODULE_BYTES + 1}
    chosen = choose_held_out(sizes)
    total = sum(sizes[f"{name}.py"] for name in chosen)
    assert "big" not in chosen
    assert HELD_OUT_BYTES <= total <= HELD_OUT_BYTES + HELD_OUT_MODULE_BYTES // 2


def test_seed_decides_and_order_of_files_does_not() -> None:
    sizes = {file.path: file.size for file in library()}
    backwards = dict(reversed(list(sizes.items())))
    assert choose_held_out(sizes, 1) == choose_held_out(backwards, 1) != choose_held_out(sizes, 2)


def test_a_training_file_with_held_out_text_is_dropped() -> None:
    files = library()
    split = split_by_module(iter(files))
    victim = split.train[-1]
    lines = split.held_out[0].text.splitlines(keepends=True)
    sides = {}
    for taken in (30, 100):
        # Only the indentation differs from the held-out lines.
        text = victim.text + "".join("    " + line for line in lines[:taken])
        changed = SourceFile(victim.path, text)
        again = split_by_module(iter([changed if file == victim else file for file in files]))
        assert again.held_out == split.held_out
        sides[taken] = (changed in again.train, dict(again.dropped).get(changed))
    assert sides == {30: (True, None), 100: (False, "leaks held-out text")}


def test_a_copy_is_dropped_once() -> None:
    files = library()
    original = split_by_module(iter(files)).train[0]
    copy = SourceFile(original.path.replace("module", "zmodule"), original.text)
    split = split_by_module(iter([*files, copy]))
    kept = [file for file in (*split.train, *split.held_out) if file.text == original.text]
    assert len(kept) == 1


def test_sources_leave_out_tests_tables_and_other_encodings(tmp_path: Path) -> None:
    for name in ("a.py", "pkg/b.py", "test/c.py", "pkg/tests/d.py", "site-packages/e.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\n\nx = 1\r\ny = 2\n\n")
    (tmp_path / "_sysconfigdata_linux.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes("é = 1\n".encode("latin-1"))
    (tmp_path / "empty.py").write_text("\n")
    assert list(read_sources(tmp_path)) == [
        SourceFile("a.py", "x = 1\ny = 2\n"),
        SourceFile("pkg/b.py", "x = 1\ny = 2\n"),
    ]
