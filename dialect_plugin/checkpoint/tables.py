"""Tables of layers as plain text: the total first, then projections, depths, and every layer.

The text is the same in a terminal and in a pipe, and nothing is cut off. A common prefix of the
names stands once, in the headings, so that usual tables fit into 80 columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..experts import expert_of
from ..scheme import LayerFormat

__all__ = [
    "aligned",
    "folded",
    "layer_table",
    "mixed_keys",
    "natural_order",
    "only_or_blank",
    "shape_cell",
    "without_number",
]

_NUMBER = re.compile(r"(\d+)")
_GAP = "  "
_MIXED = (("book", "book"), ("activation_format", "activations"), ("rotation", "rotation"))
"""Keys of a layer's format that have a column only where layers differ, and the columns' heads."""


class _Shaped(Protocol):
    """What every table knows of a layer."""

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


_Layer = TypeVar("_Layer", bound=_Shaped)


@dataclass(frozen=True)
class _Title:
    """A line between groups of rows, such as ``by depth``."""

    text: str


def layer_table(
    heads: Sequence[str],
    layers: Sequence[_Layer],
    cells: Callable[[Sequence[_Layer]], Sequence[str]],
    listed: Sequence[_Layer] | None = None,
    title: str = "each layer",
    first: Sequence[Sequence[str]] = (),
) -> str:
    """A table of layers, with sums over all of them, over each projection and over each depth.

    Args:
        heads: head of every column behind the name; lines of a head are separated by newlines.
        layers: the layers, in any order.
        cells: the cells behind the name for some layers together; one layer is a list of one.
        listed: the layers that get a row of their own; default: all.
        title: what stands above these rows.
        first: rows, names included, that stand above the total.
    """
    names = _FoldedNames.of([layer.name for layer in layers])
    lines: list[Sequence[str] | _Title] = [
        *first,
        (f"all {len(layers)} layers", *cells(layers)),
    ]
    for what, label in (("projection", names.projection), ("depth", names.depth)):
        groups: dict[str, list[_Layer]] = {}
        for layer in sorted(layers, key=_place):
            if (group := label(layer.name)) is not None:
                groups.setdefault(group, []).append(layer)
        if 1 < len(groups) < len(layers):
            lines.append(_Title(f"by {what}{names.below}"))
            ordered = sorted(groups, key=natural_order) if what == "depth" else groups
            lines += [(group, *cells(groups[group])) for group in ordered]
    shown = layers if listed is None else listed
    if shown:
        lines.append(_Title(f"{title}{names.below}"))
    for layer in sorted(shown, key=_place):
        lines.append((names.short(layer.name), *cells([layer])))
    return aligned(("layer", *heads), lines)


def folded(names: Iterable[str]) -> str:
    """Names in one line; those that differ in their first number only are one.

    ``model.layers.0-2,5.mlp.down_proj`` stands for four layers. The experts of a layer are one.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for name in sorted({without_number(name) for name in names}, key=natural_order):
        stack, number, inner = _split(name) or (name, "", "")
        groups.setdefault((stack, inner), []).extend([int(number)] if number else [])
    return ", ".join(
        f"{stack}{_ranges(numbers)}.{inner}" if numbers else stack
        for (stack, inner), numbers in groups.items()
    )


def without_number(layer: str) -> str:
    """The name of a layer; that of an expert's with ``*`` in the place of its number."""
    expert = expert_of(layer)
    return layer if expert is None else f"{expert.prefix}.*.{expert.part}"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, such as ``0-2,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def natural_order(name: str) -> tuple[str | int, ...]:
    """A sorting key by which ``layers.2`` comes before ``layers.10``."""
    return tuple(int(part) if part.isdecimal() else part for part in _NUMBER.split(name))


def _place(layer: _Shaped) -> tuple[bool, tuple[str | int, ...]]:
    """Decoder layers first, then layers outside of them, such as ``lm_head``."""
    return _split(layer.name) is None, natural_order(layer.name)


def shape_cell(layers: Sequence[_Shaped]) -> str:
    """The shape of the layers' weights, such as ``576 x 1536``; blank where they differ."""
    return only_or_blank(f"{layer.rows} x {layer.columns}" for layer in layers)


def only_or_blank(values: Iterable[str]) -> str:
    """The value if all are the same, else an empty cell."""
    found = set(values)
    return found.pop() if len(found) == 1 else ""


def mixed_keys(formats: Iterable[LayerFormat]) -> list[tuple[str, str]]:
    """What layers differ in, beside the block size: keys of their formats, and the heads of columns
    for them."""
    found = list(formats)
    return [(key, head) for key, head in _MIXED if len({getattr(f, key) for f in found}) > 1]


@dataclass(frozen=True)
class _FoldedNames:
    """Layer names without the prefix that all numbered ones share.

    Attributes:
        prefix: such as ``model.layers.``, or empty.
    """

    prefix: str

    @classmethod
    def of(cls, names: Sequence[str]) -> _FoldedNames:
        """Fold the names of decoder layers; others, such as ``lm_head``, stand as they are."""
        numbered = [name.split(".") for name in names if _split(name) is not None]
        shared = 0
        for parts in zip(*numbered, strict=False):
            if len(set(parts)) > 1 or parts[0].isdecimal():
                break
            shared += 1
        return cls("".join(f"{part}." for part in numbered[0][:shared]) if numbered else "")

    @property
    def below(self) -> str:
        """Where the short names begin, for a heading."""
        return f", below {self.prefix[:-1]}" if self.prefix else ""

    def short(self, name: str) -> str:
        """The name without the prefix."""
        return name.removeprefix(self.prefix)

    def projection(self, name: str) -> str:
        """The name of the same layer at every depth, such as ``self_attn.q_proj``."""
        split = _split(name)
        if split is None:
            return name
        stack, _, inner = split
        inner = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", inner)
        return self.short(stack) + ("*." if self.short(stack) else "") + inner

    def depth(self, name: str) -> str | None:
        """The decoder layer, such as ``0`` or ``encoder.layers.0``; None for others."""
        split = _split(name)
        return None if split is None else self.short(split[0]) + split[1]


def _split(name: str) -> tuple[str, str, str] | None:
    """``model.layers.``, ``0`` and ``self_attn.q_proj``; None without a number."""
    found = re.match(r"((?:[^.]*\.)*?)(\d+)\.(.+)$", name)
    return None if found is None else (found[1], found[2], found[3])


def aligned(heads: Sequence[str], lines: Sequence[Sequence[str] | _Title]) -> str:
    """A table: the first column to the left, all others to the right.

    Args:
        heads: lines of a head are separated by newlines.
        lines: rows of as many cells, and titles, which get a blank line in front of them.
    """
    height = max(head.count("\n") for head in heads) + 1
    stacked = [[""] * (height - 1 - head.count("\n")) + head.split("\n") for head in heads]
    rows = [list(row) for row in zip(*stacked, strict=True)]
    every = [*rows, *(line for line in lines if not isinstance(line, _Title))]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    text = []
    for line in [*rows, *lines]:
        if isinstance(line, _Title):
            text += ["", line.text]
            continue
        first, *others = line
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text.append(_GAP.join(cells).rstrip())
    return "\n".join(text)
