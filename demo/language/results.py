"""The figures of a demonstration, and their tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table
from rich.text import Text

__all__ = ["Demonstration", "Figures", "completions_table", "figures_table"]


@dataclass
class Figures:
    """One format's row.

    Attributes:
        name: the format.
        bytes: of the tensors on disk; computed for MXFP4, which is not stored.
        perplexity: on the held-out text.
        source: ``"server"`` or ``"emulation"``, which measured `perplexity`.
        completions: greedy answers to the prompts, by the server.
        emulated_perplexity: of the emulation, where it was compared with the server's.
        divergence: mean KL(bf16 || format) of the emulation, nats; None for bf16.
        divergence_error: its standard error over the windows.
        same_top: share of positions with bf16's most probable token.
    """

    name: str
    bytes: int
    perplexity: float
    source: str
    completions: list[str]
    emulated_perplexity: float | None = None
    divergence: float | None = None
    divergence_error: float | None = None
    same_top: float | None = None


@dataclass
class Demonstration:
    """The result of one run.

    Attributes:
        model: the model's name.
        text: name of the held-out text.
        tokens: how many tokens were predicted.
        window: most tokens in a window.
        prompts: the beginnings that the servers completed.
        rows: one for each format.
        origin: where the model comes from, if its directory says so.
        doubts: sentences about figures that the checks do not bear out.
        layers_differ: whether a layer's outputs differ from the reference.
    """

    model: str
    text: str
    tokens: int
    window: int
    prompts: list[str]
    rows: list[Figures]
    origin: str | None = None
    doubts: list[str] = field(default_factory=list)
    layers_differ: bool = False


def completions_table(result: Demonstration, prompt: int) -> Table:
    """The answers to one prompt, one under the other."""
    table = Table(title=f"prompt {escape(repr(result.prompts[prompt]))}", title_justify="left")
    table.add_column("served as", no_wrap=True)
    table.add_column("answer")
    for row in result.rows:
        if row.completions:
            table.add_row(row.name, Text(row.completions[prompt]), end_section=True)
    return table


def figures_table(result: Demonstration) -> Table:
    """Size and perplexity of every format, and how much its answers differ from those of bf16."""
    table = Table(
        title=f"{escape(result.model)}, perplexity of {result.tokens:,} tokens of "
        f"{escape(result.text)}",
        title_justify="left",
        caption=None if result.origin is None else escape(result.origin),
        caption_justify="left",
    )
    for column in ("format", "MB", "served", "emulated", "KL to bf16", "same top"):
        name = column == "format"
        table.add_column(column, justify="left" if name else "right", no_wrap=not name)
    for row in result.rows:
        served = row.perplexity if row.source == "server" else None
        emulated = row.emulated_perplexity if row.source == "server" else row.perplexity
        table.add_row(
            row.name,
            f"{row.bytes / 1e6:.2f}",
            "" if served is None else f"{served:.3f}",
            "" if emulated is None else f"{emulated:.3f}",
            "" if row.divergence is None else f"{row.divergence:.3f} ± {row.divergence_error:.3f}",
            "" if row.same_top is None else f"{row.same_top:.1%}",
        )
    return table
