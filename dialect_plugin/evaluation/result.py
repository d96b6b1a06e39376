"""The result of an evaluation: its figures with their standard errors, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoint.tables import aligned

__all__ = ["Evaluation", "Position", "Row", "render"]


@dataclass(frozen=True)
class Position:
    """A place in the text where a model differs much from the 16-bit one.

    Attributes:
        window: number of the window.
        position: number of the predicted token in the window.
        divergence: KL(16-bit model || model) there, nats.
        context: end of the text before the token.
        token: the token in the text.
        expected: what the 16-bit model holds most probable.
        found: what the model holds most probable.
    """

    window: int
    position: int
    divergence: float
    context: str
    token: str
    expected: str
    found: str


@dataclass(frozen=True)
class Row:
    """One format with one kind of activations.

    Attributes:
        name: of the format, or of the directory of a packed checkpoint.
        activations: such as ``"W4A4"``; empty for the 16-bit model.
        ours: whether it is a format of this project.
        bits: stored bits per weight of the emulated layers.
        nll: mean negative log-probability of a token, nats, for each window.
        divergence: mean KL(16-bit model || model) of a position, nats, for each window.
        agreement: share of positions with the 16-bit model's most probable token, for each window.
        worst: positions of the largest divergence, largest first.
    """

    name: str
    activations: str
    ours: bool
    bits: float
    nll: tuple[float, ...]
    divergence: tuple[float, ...]
    agreement: tuple[float, ...]
    worst: tuple[Position, ...] = ()

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-probability."""
        return math.exp(_mean(self.nll))

    @property
    def mean_divergence(self) -> float:
        """Mean divergence in nats."""
        return _mean(self.divergence)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean divergence over the windows; None with a single window."""
        count = len(self.divergence)
        if count < 2:
            return None
        squares = sum((value - self.mean_divergence) ** 2 for value in self.divergence)
        return math.sqrt(squares / (count - 1) / count)

    @property
    def same_top(self) -> float:
        """Share of positions with the 16-bit model's most probable token."""
        return _mean(self.agreement)

    def ratio(self, other: Row) -> tuple[float, float | None]:
        """This row's divergence divided by another's on the same windows, and its standard error.

        The error is the jackknife's: the ratio without one window, for each window in turn. It is
        that of paired windows: what makes a window hard for both formats is no noise.
        """
        whole = sum(self.divergence) / sum(other.divergence)
        count = len(self.divergence)
        if count < 2:
            return whole, None
        without = [
            (sum(self.divergence) - own) / (sum(other.divergence) - its)
            for own, its in zip(self.divergence, other.divergence, strict=True)
        ]
        squares = sum((value - _mean(without)) ** 2 for value in without)
        return whole, math.sqrt(squares * (count - 1) / count)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        source: name of the 16-bit checkpoint.
        dtype: of the 16-bit model, such as ``"bfloat16"``.
        text: name of the text.
        tokens_sha256: hash of the windows.
        windows: how many.
        sequence_length: tokens in each, of which all but the first are predicted.
        scope: ``"linear"`` or ``"all"``.
        layers: how many layers are emulated.
        reference: the 16-bit model's mean negative log-probability, for each window.
        rows: the formats.
        ratio_to: name of the rows that the others are divided by.
    """

    source: str
    dtype: str
    text: str
    tokens_sha256: str
    windows: int
    sequence_length: int
    scope: str
    layers: int
    reference: tuple[float, ...]
    rows: tuple[Row, ...]
    ratio_to: str | None = None

    @property
    def perplexity(self) -> float:
        """Of the 16-bit model."""
        return math.exp(_mean(self.reference))

    def row(self, name: str, activations: str) -> Row | None:
        """The row of a name and activations, if there is one."""
        found = (r for r in self.rows if (r.name, r.activations) == (name, activations))
        return next(found, None)

    def base_of(self, row: Row) -> Row | None:
        """What a row's divergence is divided by."""
        base = None if self.ratio_to is None else self.row(self.ratio_to, row.activations)
        return None if base is None or not base.mean_divergence else base

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON data."""
        rows = []
        for row in self.rows:
            base = self.base_of(row)
            figures = {
                "perplexity": row.perplexity,
                "mean_divergence": row.mean_divergence,
                "standard_error": row.standard_error,
                "same_top": row.same_top,
                "ratio": None if base is None else row.ratio(base)[0],
                "ratio_standard_error": None if base is None else row.ratio(base)[1],
            }
            rows.append(asdict(row) | figures)
        return asdict(self) | {"perplexity": self.perplexity, "rows": rows}


def render(found: Evaluation) -> str:
    """The table, and the worst positions of the first row."""
    tokens = found.windows * (found.sequence_length - 1)
    scope = "linear layers" if found.scope == "linear" else "linear layers and attention"
    title = (
        f"{found.source} on {found.text}: {tokens:,} tokens in {found.windows} windows of "
        f"{found.sequence_length}; {found.layers} {scope} emulated"
    )
    heads = ["format", "activations", "bits", "perplexity", "KL, nats", "same top"]
    heads += [] if found.ratio_to is None else [f"KL to\n{found.ratio_to}"]
    lines = [[found.dtype, "", "", f"{found.perplexity:.3f}"]]
    lines[0] += [""] * (len(heads) - len(lines[0]))
    for row in found.rows:
        line = [row.name, row.activations, f"{row.bits:.3f}", f"{row.perplexity:.3f}"]
        line += [_with_error(row.mean_divergence, row.standard_error), f"{row.same_top:.1%}"]
        if found.ratio_to is not None:
            base = found.base_of(row)
            line.append("" if base is None else _with_error(*row.ratio(base), digits=3))
        lines.append(line)
    return f"{title}\n\n{aligned(heads, lines)}{_worst(found)}"


def _worst(found: Evaluation) -> str:
    """The positions where the first row differs most."""
    if not found.rows or not found.rows[0].worst:
        return ""
    row = found.rows[0]
    heads = ["text before", "token", "16-bit", "found", "KL, nats"]
    lines = [
        [f"{p.context!r}", f"{p.token!r}", f"{p.expected!r}", f"{p.found!r}", f"{p.divergence:.2f}"]
        for p in row.worst
    ]
    title = f"where {row.name} {row.activations} differs most, and what each holds most probable"
    return f"\n\n{title}\n\n{aligned(heads, lines)}"


def _with_error(value: float, error: float | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
