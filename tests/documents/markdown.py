"""Reading the project's Markdown files: their links, headings, commands and Python code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

__all__ = ["ROOT", "anchors", "code_blocks", "commands", "documents", "links"]

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]*(?:\([^()]*\)[^()\s]*)*)\)")


def documents() -> list[Path]:
    """Every Markdown file that a reader meets."""
    front = sorted(ROOT.glob("*.md"))
    rooms = [path for room in ("docs", "examples") for path in sorted((ROOT / room).rglob("*.md"))]
    return [*front, *rooms, ROOT / "benchmarks" / "README.md"]


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block."""
    return _FENCE.findall(text)


def links(text: str) -> list[str]:
    """Targets of all links and pictures outside fenced code, but those of other sites."""
    found = _LINK.findall(_FENCE.sub("", text))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Anchors of the headings by GitHub's rule; a repeated one gets a number."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.*?)$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(name if count == 0 else f"{name}-{count}")
    return names


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of every shown call of `program`: in shell blocks, and in inline code."""
    shells = [code for language, code in code_blocks(text) if language in ("", "sh", "bash")]
    lines = [line for code in shells for line in re.sub(r"\\\n\s*", "", code).splitlines()]
    lines += re.findall(r"`([^`\n]+)`", _FENCE.sub("", text).replace("\n", " "))
    found = []
    for line in lines:
        words = _split(line)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]  # a variable of the environment
        if words[: len(program.split())] == program.split():
            found.append(words[len(program.split()) :])
    return found


def _split(line: str) -> list[str]:
    """The words of a command line; [] for what is none, such as a quotation in half."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    return [word.strip("[]") for word in words]
