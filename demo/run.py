"""What `make demo` runs: quantize a model, serve it, compare it with bf16 and MXFP4.

    python -m demo.run [--model DIR] [--tokens N] [--formats bf16,w4a4,...]

The bf16 and BlockDialect figures come from running servers, MXFP4 from the emulation, which no CPU
engine serves. On bf16 and W4A4 the emulation is compared with the server: a difference of more than
0.5 % ends the demonstration with an error.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dialect_plugin.checkpoint import Checkpoint, open_checkpoint, open_packed

from . import emulation
from .perplexity import model_perplexity, server_perplexity, windows
from .server import Server, ServerError

__all__ = ["Figures", "demonstrate", "main"]

ROOT = Path(__file__).resolve().parent
CACHE = ROOT.parent / ".cache" / "demo"
PROMPTS = ("def read_", "import os\n\nclass ", "    for name in sorted(")
TOLERANCE = 0.005
FORMATS = {
    "bf16": ("bf16", None),
    "w4a4": ("BlockDialect W4A4", "blockdialect"),
    "w4a8": ("BlockDialect W4A8", "blockdialect_w4a8"),
    "w4a16": ("BlockDialect W4A16", "blockdialect_w4a16"),
}
_WINDOW = 256
_COMPLETION_TOKENS = 40


class DemoError(RuntimeError):
    """Why the demonstration failed, in one sentence."""


@dataclass
class Figures:
    """One row of the result.

    Attributes:
        name: the format.
        bytes_on_disk: size of the tensors; computed, not stored, for MXFP4.
        perplexity: on the held-out text.
        source: ``"server"`` or ``"emulation"``.
        completions: greedy continuations of the prompts (servers only).
        emulated_perplexity: the emulation's figure, where it was compared with the server's.
    """

    name: str
    bytes_on_disk: int
    perplexity: float
    source: str
    completions: list[str]
    emulated_perplexity: float | None = None


def demonstrate(
    model: Path, text: str, formats: list[str], token_limit: int, console: Console
) -> list[Figures]:
    """Run the demonstration.

    Args:
        model: directory of a 16-bit checkpoint.
        text: held-out text.
        formats: keys of `FORMATS` to serve.
        token_limit: number of tokens to measure perplexity on.
        console: where to say what is happening.

    Raises:
        DemoError: if a server and its emulation disagree.
        ServerError: if a server does not start or answer.
        ValueError: if the model cannot be converted.
    """
    checkpoint = open_checkpoint(model)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    packed = _quantize(model, console)
    length = min(_WINDOW, _context(checkpoint) - 1)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = windows(tokens, length, token_limit)
    console.print(
        f"perplexity: {sum(map(len, parts)):,} tokens of held-out text, {len(parts)} windows of "
        f"{length}"
    )
    rows = []
    for key in formats:
        name, method = FORMATS[key]
        directory = model if method is None else packed
        row = _serve_and_measure(name, key, directory, method, tokenizer, parts, length, console)
        if key in {"bf16", "w4a4"}:
            emulated = _emulated(key, model, packed, parts, console)
            _check_agreement(row, emulated)
        rows.append(row)
    console.print("measuring MXFP4-32 by emulation (no engine serves it on a CPU)")
    mxfp4 = _measure(emulation.emulate_mxfp4(model, packed), parts, console)
    rows.insert(
        1, Figures("MXFP4-32 W4A4", _mxfp4_bytes(checkpoint, packed), mxfp4, "emulation", [])
    )
    return rows


def _quantize(model: Path, console: Console) -> Path:
    """The packed checkpoint of `model`, made by the command a user would give."""
    from dialect_plugin.cli import app

    destination = CACHE / f"{model.resolve().name}-blockdialect"
    newest = max(f.stat().st_mtime_ns for f in model.iterdir() if f.is_file())
    config = destination / "config.json"
    if config.exists() and config.stat().st_mtime_ns > newest:
        console.print(f"quantized already: {_shown(destination)}")
        return destination
    console.print(f"blockdialect quantize {_shown(model)} {_shown(destination)}")
    try:
        app(["quantize", str(model), str(destination), "--overwrite"], standalone_mode=False)
    except typer.Exit as stop:
        raise DemoError("blockdialect quantize failed, see above") from stop
    return destination


def _serve_and_measure(
    name: str,
    key: str,
    directory: Path,
    method: str | None,
    tokenizer: PreTrainedTokenizerBase,
    parts: list[list[int]],
    length: int,
    console: Console,
) -> Figures:
    arguments = ["--max-model-len", str(length + _COMPLETION_TOKENS), "--enforce-eager"]
    # the scheme answers to plain `blockdialect` by itself, as a user would serve it
    if method is not None and method != "blockdialect":
        arguments += ["--quantization", method]
    shown = " ".join(["vllm serve", _shown(directory), *arguments])
    console.print(f"starting: {shown}", soft_wrap=True, highlight=False)
    began = time.monotonic()
    with Server(directory, CACHE / "logs" / f"{key}.log", *arguments) as server:
        console.print(f"  ready after {time.monotonic() - began:.0f} s, asking for completions")
        completions = [
            str(server.complete(prompt, max_tokens=_COMPLETION_TOKENS)["text"])
            for prompt in PROMPTS
        ]
        with _bar(console) as bar:
            task = bar.add_task("  perplexity from the server", total=len(parts))
            perplexity = server_perplexity(server, parts, lambda: bar.advance(task))
    console.print(f"  perplexity {perplexity:.3f}; server stopped")
    return Figures(name, _bytes_on_disk(directory), perplexity, "server", completions)


def _emulated(
    key: str, model: Path, packed: Path, parts: list[list[int]], console: Console
) -> float:
    console.print("  checking the server against the emulation")
    if key == "bf16":
        return _measure(emulation.load_bf16(model), parts, console)
    return _measure(emulation.emulate_blockdialect(model, packed, "dialect"), parts, console)


def _measure(model: Any, parts: list[list[int]], console: Console) -> float:
    with _bar(console) as bar:
        task = bar.add_task("  perplexity by emulation", total=len(parts))
        return model_perplexity(model, parts, lambda: bar.advance(task))


def _check_agreement(row: Figures, emulated: float) -> None:
    row.emulated_perplexity = emulated
    difference = abs(row.perplexity / emulated - 1)
    if not difference <= TOLERANCE:
        raise DemoError(
            f"{row.name}: the server's perplexity {row.perplexity:.4f} and the emulation's "
            f"{emulated:.4f} differ by {difference:.2%}; {TOLERANCE:.1%} is allowed"
        )


def _context(checkpoint: Checkpoint) -> int:
    text = checkpoint.config.get("text_config", checkpoint.config)
    return int(text.get("max_position_embeddings", 2048)) - _COMPLETION_TOKENS


def _bytes_on_disk(directory: Path) -> int:
    return sum(info.nbytes for info in open_checkpoint(directory).tensors.values())


def _mxfp4_bytes(checkpoint: Checkpoint, packed: Path) -> int:
    """What the checkpoint would take with the same layers in MXFP4-32: 4 + 8/32 bits a weight."""
    quantized = {f"{name}.weight" for name in open_packed(packed).layers}
    total = 0
    for name, info in checkpoint.tensors.items():
        rows, columns = info.shape if name in quantized else (0, 0)
        total += rows * (columns // 2 + columns // 32) if name in quantized else info.nbytes
    return total


def _show_completions(rows: list[Figures], console: Console) -> None:
    served = [row for row in rows if row.completions]
    for i, prompt in enumerate(PROMPTS):
        table = Table("format", "continuation", title=f"prompt: {escape(repr(prompt))}")
        for row in served:
            table.add_row(row.name, escape(repr(row.completions[i])), end_section=True)
        console.print(table)


def _show_figures(rows: list[Figures], console: Console) -> None:
    base = rows[0].perplexity
    table = Table(caption="MXFP4: no file, its size is computed and its perplexity emulated")
    for column in ("format", "MB", "perplexity", "to bf16", "measured by", "emulated"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bytes_on_disk / 1e6:.2f}",
            f"{row.perplexity:.3f}",
            f"{row.perplexity / base - 1:+.2%}",
            row.source,
            f"{row.emulated_perplexity:.3f}" if row.emulated_perplexity else "",
        )
    console.print(table)


def _bar(console: Console) -> Progress:
    return Progress(console=console, transient=True)


def _shown(path: Path) -> str:
    """A path as a user would type it: relative where it lies below the current directory."""
    absolute = path.resolve()
    return (
        str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)
    )


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(
    model: Annotated[Path, typer.Option(help="Directory of a 16-bit checkpoint.")] = ROOT / "model",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure perplexity on.")] = 16_384,
    formats: Annotated[str, typer.Option(help="What to serve, separated by commas.")] = ",".join(
        FORMATS
    ),
    text: Annotated[Path, typer.Option(help="Held-out text.")] = ROOT / "heldout.txt",
) -> None:
    """Quantize a model, serve it, compare it with bf16 and MXFP4."""
    console = Console()
    signal.signal(signal.SIGTERM, _interrupt)
    chosen = formats.split(",")
    if unknown := [key for key in chosen if key not in FORMATS]:
        print(f"demo: --formats: {unknown[0]!r}; allowed are {', '.join(FORMATS)}", file=sys.stderr)
        raise typer.Exit(1)
    try:
        rows = demonstrate(model, text.read_text(encoding="utf-8"), chosen, tokens, console)
    except (DemoError, ServerError, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("demo: interrupted; the server is stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    _show_completions(rows, console)
    _show_figures(rows, console)
    result = CACHE / "result.json"
    result.write_text(json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8")
    console.print(f"written to {_shown(result)}")


if __name__ == "__main__":
    typer.run(main)
