"""The table of language models in docs/reference/support-models.md, and the record behind it.

    python -m tests.support.support_table

converts a tiny model of every architecture of the sweep, writes the record and the page. The sweep
compares the record with what the engine holds; a test compares the page with the record.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dialect_plugin.architectures import holds_experts
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.reader import open_checkpoint, open_packed
from dialect_plugin.checkpoint.tables import without_number
from dialect_plugin.experts import is_bias
from tests.support.swept_models import CONFIGS, KINDS, UNSERVED, build

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "plugin" / "vllm" / "architectures.json"
PAGE = ROOT / "docs" / "reference" / "support-models.md"
BEGIN, END = "<!-- tests.support.support_table -->", "<!-- end -->"

_BLOCK = re.compile(r"(?:^|.*?\.)(?:layers?|h|blocks)\.\d+\.")
_ORDER = ("q", "k", "v", "o", "gate", "up", "down")
_IN_A_LIST = re.compile(r"(?<=_adapter_list)\..*")
_EXPERTS = re.compile(r"(?P<module>.*?\bexperts?)\b.*")


def recorded() -> dict[str, dict[str, list[str]]]:
    """The committed record: architecture -> layers in 4 and in 16 bit."""
    record: dict[str, dict[str, list[str]]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def entry(source: Path, packed: Iterable[str]) -> dict[str, list[str]]:
    """What becomes of the matrices inside the decoder layers of the checkpoint `source`.

    Args:
        source: directory of the 16-bit checkpoint.
        packed: its layers in 4 bit.
    """
    chosen = set(packed)
    names: dict[str, dict[str, None]] = {"4 bit": {}, "16 bit": {}}
    checkpoint = open_checkpoint(source)
    for tensor, info in checkpoint.tensors.items():
        layers = checkpoint.layers_in(tensor)
        if layers and chosen.issuperset(layers):
            for layer in layers:
                names["4 bit"][_BLOCK.sub("", without_number(layer), count=1)] = None
        elif _BLOCK.match(tensor) and len(info.shape) > 1 and not is_bias(tensor):
            module = tensor.removesuffix(".weight")
            inner = _IN_A_LIST.sub("", _BLOCK.sub("", module, count=1))
            found = _EXPERTS.match(inner) if holds_experts(module) else None
            names["16 bit"][found["module"] if found else inner] = None
    return {bits: sorted(found) for bits, found in names.items()}


def table(record: Mapping[str, Mapping[str, list[str]]]) -> str:
    """The page's part about architectures."""
    lines = []
    for kind, architectures in KINDS.items():
        lines += [f"### {kind}", "", "| architecture | 4 bit | 16 bit |", "|---|---|---|"]
        for name in architectures:
            bits = record[name]
            cells = (f"`{name}`", _listed(bits["4 bit"]), _listed(bits["16 bit"]))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["### Not served here", "", "| architecture | why |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in UNSERVED.items()]
    return "\n".join(lines) + "\n"


def page(text: str, record: Mapping[str, Mapping[str, list[str]]]) -> str:
    """`text` with the table of `record` between its two comments."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: has no {BEGIN} ... {END}; put them around the table")
    return f"{head}{begin}\n\n{table(record)}\n{end}{tail}"


def _listed(names: list[str]) -> str:
    """Names in short: ``self_attn.{q,k,v,o}_proj``, ``fc1``."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names, key=_rank):
        parent, dot, leaf = name.rpartition(".")
        first, underscore, suffix = leaf.rpartition("_")
        key = (parent + dot, underscore + suffix) if suffix == "proj" else (name, "")
        groups.setdefault(key, []).append(first)
    return (
        ", ".join(
            f"`{head}{{{','.join(firsts)}}}{tail}`"
            if len(firsts) > 1
            else f"`{head}{firsts[0]}{tail}`"
            if tail
            else f"`{head}`"
            for (head, tail), firsts in groups.items()
        )
        or "–"
    )


def _rank(name: str) -> tuple[str, int, str]:
    parent, _, leaf = name.rpartition(".")
    first = leaf.removesuffix("_proj")
    return parent, _ORDER.index(first) if first in _ORDER else len(_ORDER), leaf


def main() -> None:
    """Write the record and the page."""
    record: dict[str, Any] = {}
    for architecture in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            source = build(architecture, Path(folder) / "source")
            convert(source, Path(folder) / "packed")
            record[architecture] = entry(source, open_packed(Path(folder) / "packed"))
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    main()
