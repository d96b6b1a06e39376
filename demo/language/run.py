"""What `make demo` runs: quantize a model, serve it, compare it with bf16 and MXFP4.

    python -m demo.language.run [--model MODEL] [--tokens N] [--formats bf16,w4a4,...] [--text FILE]

MODEL is the directory of a 16-bit checkpoint, or a name in `real_models`, which is then fetched.
The perplexities of bf16 and BlockDialect come from running servers, that of MXFP4 from an
emulation, because no engine serves it on a CPU. The divergence of a format from bf16 is that of its
emulation: a server sends no distributions. Two checks stand behind them:

* Every quantized layer gives the reference's bits on real activations.
* A server's perplexity is that of its emulation: within 0.5 % for the shipped model. Other models
  may amplify the noise of bfloat16, so there four standard errors of the paired difference of
  log-probabilities are allowed too; beyond that, the tables come with a warning.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer

import dialect_kernels
import dialect_plugin
from dialect_plugin.calibration.options import DEFAULT_TEXT, CalibrationOptions
from dialect_plugin.checkpoint.reader import Checkpoint, open_checkpoint, open_packed
from dialect_plugin.scheme import METHODS, QUANT_METHOD

from ..terminal import interrupt_on_signals, shown
from . import emulation
from .perplexity import (
    Emulated,
    model_differences,
    model_logprobs,
    paired_standard_error,
    perplexity,
    predicted,
    server_logprobs,
    windows,
)
from .prompts import Prompts
from .real_models import ORIGIN, REAL_MODELS, RealModelError, prepare
from .results import Demonstration, Figures, completions_table, figures_table
from .server import Server, ServerError

__all__ = ["FORMATS", "DemoError", "demonstrate"]

DEMO = Path(__file__).resolve().parents[1]
SHIPPED = DEMO / "model"
CACHE = DEMO.parent / ".cache" / "demo"
FORMATS: dict[str, tuple[str, str | None]] = {"bf16": ("bf16", None)} | {
    method.bits.lower(): (f"BlockDialect {method.bits}", method.quantization)
    for method in METHODS.values()
}
"""Key -> name in the tables, vLLM's quantization method."""
CALIBRATED = "calibrated"
FORMATS[CALIBRATED] = (f"{FORMATS['w4a4'][0]} calibrated", QUANT_METHOD)
EMULATED = {method.bits.lower(): activations for activations, method in METHODS.items()}
EMULATED[CALIBRATED] = EMULATED["w4a4"]
"""Key -> activation format of the emulation that the server is compared with."""

TOLERANCE = 0.005
TOLERANCE_TOKENS = 32_768
STANDARD_ERRORS = 4  # of a difference between windows, of which there may be as few as eight
SMALL_MODEL_BYTES = 100_000_000
FEW_TOKENS = 4_096  # for larger models, which would take hours on a CPU
MAX_WINDOW = 512


class DemoError(RuntimeError):
    """Why the demonstration failed, in one sentence."""


_Found = TypeVar("_Found")


@dataclass
class _Task:
    """The inputs of every step, and what they found beside the figures.

    Attributes:
        model: directory of the 16-bit checkpoint.
        packed: directory of the packed one.
        context: for ``--max-model-len``.
        parts: windows of held-out tokens.
        prompts: for the servers.
        console: for progress messages.
        calibrated: directory of the one that was calibrated, if it is wanted.
        check: of the layers of the emulations.
        doubts: sentences about figures that a check does not bear out.
    """

    model: Path
    packed: Path
    context: int
    parts: list[list[int]]
    prompts: Prompts
    console: Console
    calibrated: Path | None = None
    check: emulation.LayerCheck = field(default_factory=emulation.LayerCheck)
    doubts: list[str] = field(default_factory=list)

    @property
    def shipped(self) -> bool:
        """Whether this is the model that ships, whose noise is known."""
        return _ships(self.model)

    @cached_property
    def bf16(self) -> Any:
        """The bf16 model in this process, which emulations are compared with."""
        return emulation.load_bf16(self.model)

    def directory(self, key: str) -> Path:
        """The checkpoint of a format."""
        if key == "bf16":
            return self.model
        return self.calibrated if key == CALIBRATED and self.calibrated else self.packed

    def measure(self, what: str, function: Callable[..., _Found], *sources: object) -> _Found:
        """What a function finds on the windows by `sources`, with a progress bar."""
        console = self.console
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"  {what}", total=len(self.parts))
            return function(*sources, self.parts, lambda: bar.advance(task))


def demonstrate(
    model: Path, text: Path, formats: list[str], token_limit: int | None, console: Console
) -> Demonstration:
    """Run the demonstration.

    Args:
        model: directory of a 16-bit checkpoint.
        text: file with held-out text.
        formats: keys of `FORMATS` to serve, in this order.
        token_limit: how many tokens of the text to use; None: 32,768, or 4,096 for a model above
            100 MB.
        console: for progress messages.

    Returns:
        The figures; `doubts` says what the checks do not bear out.

    Raises:
        DemoError: if a step fails.
        ServerError: if a server does not start or answer.
        ValueError: if the model or the text cannot be used.
    """
    checkpoint = open_checkpoint(model)
    _refuse_quantized(checkpoint)
    parts, prompts = _questions(checkpoint, text, token_limit)
    steps = 2 + len(formats)
    console.print(f"1/{steps} quantizing the model")
    context = _context(checkpoint)
    task = _Task(model, _quantize(model, console), context, parts, prompts, console)
    if CALIBRATED in formats:
        formats = _calibrate(task, formats)
    rows = []
    for number, key in enumerate(formats, start=2):
        console.print(f"{number}/{steps} serving {FORMATS[key][0]}")
        rows.append(_serve(key, task))
    console.print(f"{steps}/{steps} emulating MXFP4-32, which no engine serves on a CPU")
    emulated = _emulated("mxfp4", task)
    if emulated is not None:
        nbytes = _mxfp4_bytes(checkpoint, task.packed)
        row = Figures("MXFP4-32 W4A4", nbytes, perplexity(emulated.logprobs), "emulation", [])
        _add_differences(row, emulated)
        console.print(f"  perplexity {row.perplexity:.3f}")
        rows.insert(int(formats[0] == "bf16"), row)
    return Demonstration(
        model.resolve().name,
        text.name,
        predicted(parts),
        context - 1,
        list(prompts.texts),
        rows,
        _origin(model),
        task.doubts,
        bool(task.check.unequal),
    )


def check_agreement(
    name: str, served: float, emulated: float, tokens: int, noise: float = 0.0
) -> None:
    """Compare two perplexities of one model, the server's and the emulation's.

    They differ because bfloat16 is rounded in other places, and rounding to 4 bits makes some of
    these differences large. Such noise averages out: with fewer than 32,768 tokens the allowed
    0.5 % grows as one over the square root of their number.

    Args:
        name: the format.
        served: the server's perplexity.
        emulated: the emulation's.
        tokens: how many tokens were predicted.
        noise: standard error of the mean difference of log-probabilities, in nats; four of them
            are allowed, if that is more.

    Raises:
        DemoError: if they differ by more than that.
    """
    allowed = TOLERANCE * max(1, math.sqrt(TOLERANCE_TOKENS / tokens))
    allowed = max(allowed, math.expm1(STANDARD_ERRORS * noise))
    difference = abs(served / emulated - 1)
    if not difference <= allowed:
        raise DemoError(
            f"{name}: the server's perplexity {served:.4f} and the emulation's {emulated:.4f} "
            f"differ by {difference:.2%}; {allowed:.2%} is allowed"
        )


def _directory(model: str) -> Path:
    """The directory that ``--model`` names; a real model is fetched if it is not there yet."""
    if Path(model).is_dir():
        return Path(model)
    if model in REAL_MODELS:
        return prepare(model)
    raise DemoError(
        f"--model: {model!r}; it must be the directory of a 16-bit checkpoint, or one of "
        f"{', '.join(REAL_MODELS)}"
    )


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    existing = checkpoint.config.get("quantization_config")
    if existing is not None:
        method = existing.get("quant_method") if isinstance(existing, dict) else existing
        raise DemoError(
            f"{checkpoint.path}: is quantized already ({method}); give its 16-bit original, or "
            "serve a packed one with make serve MODEL=DIR"
        )


def _context(checkpoint: Checkpoint) -> int:
    """How many tokens a server has to take."""
    config = checkpoint.config.get("text_config", checkpoint.config)
    return min(MAX_WINDOW, int(config.get("max_position_embeddings", MAX_WINDOW)))


def _questions(
    checkpoint: Checkpoint, text: Path, token_limit: int | None
) -> tuple[list[list[int]], Prompts]:
    """Windows of the text's tokens, and prompts."""
    size = sum(info.nbytes for info in checkpoint.tensors.values())
    limit = token_limit or (TOLERANCE_TOKENS if size <= SMALL_MODEL_BYTES else FEW_TOKENS)
    tokenizer = _tokenizer(checkpoint.path)
    tokens = tokenizer(
        text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
    ).input_ids
    # a server adds at least one token
    parts = windows(tokens, _context(checkpoint) - 1, limit, tokenizer.bos_token_id)
    if not parts:
        raise DemoError(f"{text}: holds too little text to predict anything; give a longer one")
    return parts, Prompts.of(tokenizer, _ships(checkpoint.path))


def _ships(model: Path) -> bool:
    return model.resolve() == SHIPPED


def _tokenizer(model: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DemoError(
            f"{model}: the tokenizer cannot be loaded ({reason}); put the model's tokenizer files "
            "into the directory"
        ) from None


def _calibrate(task: _Task, formats: list[str]) -> list[str]:
    """Make the calibrated checkpoint; if that is not possible, the formats without its row."""
    length = min(task.context, CalibrationOptions().sequence_length)
    options = ["--calibrate", DEFAULT_TEXT, "--sequence-length", str(length)]
    try:
        task.calibrated = _quantize(task.model, task.console, f"-{CALIBRATED}", options)
    except DemoError as error:
        task.doubts.append(f"{FORMATS[CALIBRATED][0]}: {error}; its row is left out")
    return formats if task.calibrated else [key for key in formats if key != CALIBRATED]


def _quantize(model: Path, console: Console, suffix: str = "", options: Sequence[str] = ()) -> Path:
    """A packed checkpoint of `model`, made by the command that a user would type."""
    destination = CACHE / f"{model.resolve().name}-blockdialect{suffix}"
    stamp = destination.with_name(f"{destination.name}.stamp")
    wanted = _fingerprint(model)
    if (destination / "config.json").exists() and stamp.exists() and stamp.read_text() == wanted:
        console.print(f"  {shown(destination)} was made from this model by this code before")
        return destination
    stamp.unlink(missing_ok=True)
    command = ["blockdialect", "quantize", str(model), str(destination), "--overwrite", *options]
    _say_command([*command[:2], shown(model), shown(destination), *command[4:]], console)
    destination.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]])
    if done.returncode != 0:
        raise DemoError(f"blockdialect quantize ended with status {done.returncode}, see above")
    stamp.write_text(wanted)
    return destination


def _fingerprint(model: Path) -> str:
    """A hash over what decides the packed bytes: size and date of the model's files, our code."""
    digest = hashlib.sha256(str(model.resolve()).encode())
    for file in sorted(model.iterdir()):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for package in (dialect_kernels, dialect_plugin):
        for source in sorted(Path(package.__path__[0]).rglob("*")):
            if source.suffix in {".py", ".cpp", ".jsonl"}:
                digest.update(source.read_bytes())
    return digest.hexdigest()


def _serve(key: str, task: _Task) -> Figures:
    """Start a server, get completions and log-probabilities, stop it, check its perplexity."""
    name, method = FORMATS[key]
    directory = task.directory(key)
    # --dtype: the same for all; --enforce-eager: compiling takes longer than all requests together
    arguments = ["--dtype", "bfloat16", "--max-model-len", str(task.context), "--enforce-eager"]
    # vLLM recognizes a packed checkpoint by itself, and a user would rely on that
    if method not in {None, QUANT_METHOD}:
        arguments += ["--quantization", str(method)]
    _say_command(["vllm", "serve", shown(directory), *arguments], task.console)
    began = time.monotonic()
    with Server(directory, CACHE / "logs" / f"{key}.log", *arguments) as server:
        with task.console.status(f"  waiting for the server; its log is {shown(server.log)}"):
            server.wait_until_ready()
        task.console.print(f"  ready after {time.monotonic() - began:.0f} s")
        completions = task.prompts.answers(server)
        served = task.measure("perplexity from the server", server_logprobs, server)
    nbytes = sum(info.nbytes for info in open_checkpoint(directory).tensors.values())
    row = Figures(name, nbytes, perplexity(served), "server", completions)
    task.console.print(f"  perplexity {row.perplexity:.3f}; the server is stopped")
    emulated = _emulated(key, task)
    if emulated is not None:
        row.emulated_perplexity = perplexity(emulated.logprobs)
        _add_differences(row, emulated)
        _compare(row, served, emulated.logprobs, task)
    return row


def _add_differences(row: Figures, emulated: Emulated) -> None:
    row.divergence, row.divergence_error = emulated.divergence, emulated.standard_error
    row.same_top = emulated.same_top


def _compare(row: Figures, served: torch.Tensor, emulated: torch.Tensor, task: _Task) -> None:
    """Say whether the emulation agrees with the server; if not, note the doubt."""
    noise = 0.0 if task.shipped else paired_standard_error(served, emulated, task.parts)
    figures = (row.perplexity, perplexity(emulated), predicted(task.parts))
    try:
        check_agreement(row.name, *figures, noise)
    except DemoError as error:
        task.doubts.append(str(error))
        task.console.print(f"  {error}", markup=False)
    else:
        task.console.print(f"  the emulation agrees: {figures[1]:.3f}")


def _emulated(key: str, task: _Task) -> Emulated | None:
    """What the emulation predicts; None, and a doubt, if transformers has other layers."""
    what = "perplexity by emulation"
    try:
        if key == "bf16":
            return Emulated(task.measure(what, model_logprobs, task.bf16))
        if key == "mxfp4":
            model = emulation.emulate_mxfp4(task.model, task.packed)
        else:
            model = emulation.emulate_blockdialect(task.model, task.directory(key), EMULATED[key])
    except ValueError as error:
        if str(error) not in task.doubts:
            task.doubts.append(str(error))
        return None
    before, known = task.check.compared, len(task.check.unequal)
    with task.check.watching(model):
        found = task.measure(what, model_differences, model, task.bf16)
    if task.check.compared > before:
        unequal = task.check.unequal[known:]
        count = task.check.compared - before
        task.console.print(f"  {count - len(unequal)} of {count} layers give the reference's bits")
        if unequal:
            task.doubts.append(
                f"{FORMATS[key][0]}: {len(unequal)} of {count} layers, the first is {unequal[0]}, "
                "do not give the reference's bits on real activations; run python -m "
                "dialect_kernels.verify and report what it prints"
            )
    return found


def _origin(model: Path) -> str | None:
    file = model / ORIGIN
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _mxfp4_bytes(checkpoint: Checkpoint, packed: Path) -> int:
    """Size of the checkpoint with the same layers in MXFP4-32: 4 + 8/32 bits a weight."""
    quantized = {f"{name}.weight" for name in open_packed(packed).layers}
    total = 0
    for name, info in checkpoint.tensors.items():
        weights = math.prod(info.shape)
        total += weights // 2 + weights // 32 if name in quantized else info.nbytes
    return total


def _say_command(command: list[str], console: Console) -> None:
    console.print(f"  {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)


def _formats(value: str) -> list[str]:
    keys = value.split(",")
    for key in keys:
        if key not in FORMATS or keys.count(key) > 1:
            raise DemoError(
                f"--formats: {value!r}; it must be some of {', '.join(FORMATS)}, each once, "
                "separated by commas"
            )
    return keys


def report(result: Demonstration, strict: bool, console: Console) -> bool:
    """Show and store the figures, then what casts doubt on them.

    Args:
        result: the figures.
        strict: whether any doubt is a failure.
        console: for the tables.

    Returns:
        Whether the demonstration succeeded. Layers that differ from the reference are a failure
        with any model, a server that differs from its emulation is one if `strict`.
    """
    for prompt in range(len(result.prompts)):
        console.print(completions_table(result, prompt))
    console.print(figures_table(result))
    file = CACHE / "result.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    console.print(f"the figures are in {shown(file)}")
    failed = bool(result.doubts) and (strict or result.layers_differ)
    for doubt in result.doubts:
        print(f"demo: {doubt}" if failed else f"demo: warning: {doubt}", file=sys.stderr)
    return not failed


def main(
    model: Annotated[
        str,
        typer.Option(help=f"Directory of a 16-bit checkpoint, or one of {', '.join(REAL_MODELS)}."),
    ] = str(SHIPPED),
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of the text; 32768, or 4096 for models above 100 MB."),
    ] = None,
    formats: Annotated[str, typer.Option(help="Formats to serve, separated by commas.")] = ",".join(
        FORMATS
    ),
    text: Annotated[Path, typer.Option(help="Held-out text.")] = DEMO / "heldout.txt",
) -> None:
    """Quantize a model, serve it, compare it with bf16 and MXFP4."""
    console = Console()
    interrupt_on_signals()
    try:
        directory = _directory(model)
        result = demonstrate(directory, text, _formats(formats), tokens, console)
    except (DemoError, RealModelError, ServerError, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("demo: interrupted; no server is left running", file=sys.stderr)
        raise typer.Exit(130) from None
    if not report(result, directory.resolve() == SHIPPED, console):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
