"""Every relative link leads to a file, and every anchor to a heading."""

from __future__ import annotations

import re

import pytest

from tests.documents.markdown import ROOT, anchors, documents, links

DOCUMENTS = documents()
CODE = (".py", ".cpp", ".h", ".sh")


def name_of(path):
    return str(path.relative_to(ROOT))


def broken(path, text):
    """The links of a document that lead nowhere."""
    for link in links(text):
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    assert list(broken(path, path.read_text(encoding="utf-8"))) == []


def test_every_document_can_be_reached_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in seen or path.suffix != ".md":
            continue
        seen.add(path)
        for link in links(path.read_text(encoding="utf-8")):
            waiting.append((path.parent / link.partition("#")[0]).resolve())
    assert [name_of(path) for path in DOCUMENTS if path not in seen] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_lines_have_at_most_a_hundred_characters(path):
    """But tables, pictures, captions and fenced code."""
    text = path.read_text(encoding="utf-8")
    fenced, long = False, []
    for number, line in enumerate(text.splitlines(), start=1):
        fenced ^= line.lstrip().startswith("```")
        if len(line) > 100 and not fenced and not line.startswith(("|", "![", "<sub>")):
            long.append(number)
    assert long == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_named_files_of_the_tree_exist(path):
    """Such as `demo/heldout.txt`: names in code that begin with a folder of the repository."""
    folders = "|".join(sorted(child.name for child in ROOT.iterdir() if child.is_dir()))
    text = path.read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", text)
    made = ("outputs/", ".cache/")  # by commands
    missing = [n for n in named if not n.startswith(made) and not (ROOT / n).exists()]
    assert missing == []


def test_documents_that_code_names_exist():
    rooms = ("triton_kernels", "dialect_plugin", "diffusers_hook", "benchmarks", "demo", "tests")
    sources = [path for room in rooms for path in (ROOT / room).rglob("*") if path.suffix in CODE]
    named = {
        name
        for path in sources
        for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8"))
    }
    assert "docs/reference/format.md" in named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("## What was measured", "what-was-measured"),
        ("### 3a. Three `formats`, (P: idea; O)", "3a-three-formats-p-idea-o"),
        ("# vLLM: `quantization_config`", "vllm-quantization_config"),
        ("## A [link](x.md)", "a-link"),
    ],
)
def test_anchors_are_github_s(heading, anchor):
    assert anchors(f"{heading}\n") == {anchor}


def test_a_broken_link_is_found(tmp_path):
    text = "# A\n[x](none.md) [y](#b) [z](#a) [w](https://example.org)\n```\n[v](none.md)\n```\n"
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert list(broken(page, text)) == ["none.md: no such file", "#b: no such heading"]
