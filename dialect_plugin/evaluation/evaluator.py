"""Comparing packed checkpoints and other formats with a 16-bit model, window by window.

Every format is emulated in the same layers and experts of transformers' model. For each window the
16-bit model runs again beside the format, so that no predictions have to be kept: at 262,144
entries of a vocabulary and 8,000 tokens they would take 8 GB.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dialect_kernels.formatbook import ActivationFormat

from ..calibration.calibrator import check_device
from ..calibration.options import CalibrationOptions
from ..calibration.text import CalibrationText, read_text
from ..checkpoint.layer_choice import choose_layers
from ..checkpoint.options import ConvertOptions
from ..checkpoint.reader import (
    PACKED_SUFFIXES,
    Checkpoint,
    CheckpointError,
    PackedCheckpoint,
    find_checkpoint,
    open_checkpoint,
    open_packed,
)
from ..checkpoint.tables import natural_order
from ..experts import expert_of
from .calibrated_peers import CalibratedPeers
from .divergence import Predictions, compare, negative_log_likelihood
from .formats import Format, format_of, packed_format
from .layers import Weights
from .model import EvaluatedModel, projection_of
from .options import EvaluationOptions
from .progress import Progress, Silent
from .result import Evaluation, Position, Row

__all__ = ["evaluate"]

_CONTEXT_TOKENS = 8
_CONTEXT_CHARACTERS = 32


def evaluate(
    packed: Sequence[str | Path],
    source: str | Path,
    options: EvaluationOptions,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate packed checkpoints, and formats in the layers that these have packed.

    Args:
        packed: directories; without any, the formats are emulated in the layers that a conversion
            without options would quantize.
        source: directory or hub id of the 16-bit checkpoint that they were made from.
        options: text, formats and activations.
        progress: receives calibration and windows.

    Raises:
        CheckpointError, SchemeError, ValueError: one sentence, before the model is loaded, if
            checkpoints, text or options do not fit together; after it, if transformers cannot run
            the model or a format gives NaN.
    """
    if find_spec("transformers") is None:
        raise CheckpointError(
            "evaluate: needs transformers; install it with pip install 'blockdialect[calibrate]'"
        )
    progress = progress or Silent()
    check_device(options.device)
    checkpoint = open_checkpoint(find_checkpoint(source))
    opened = _opened(packed)
    layers = _layers(checkpoint, opened)
    _check_ratio(options, opened)
    text = _text(checkpoint, options)
    with ExitStack() as stack:
        peers = _peers(checkpoint, layers, options)
        if peers is not None:
            stack.enter_context(peers)
        formats = [packed_format(name, one, options.scope) for name, one in opened.items()]
        formats += [format_of(name, peers) for name in options.formats]
        if peers is not None:
            peers.run(progress)
        model = EvaluatedModel(checkpoint, layers, options.device)
        pass_ = _Pass(model, text.windows, options, _tokenizer(checkpoint))
        steps = sum(len(entry.rows(options.activations)) for entry in formats)
        progress.begin("evaluating", steps * len(text.windows))
        rows = [row for entry in formats for row in pass_.rows(entry, progress)]
    return Evaluation(
        source=checkpoint.path.resolve().name,
        dtype=model.dtype,
        text=Path(text.name).name if Path(text.name).is_file() else text.name,
        tokens_sha256=text.sha256,
        windows=len(text.windows),
        sequence_length=options.sequence_length,
        scope=options.scope,
        layers=len(layers),
        reference=tuple(pass_.reference),
        rows=tuple(rows),
        ratio_to=options.ratio_to,
    )


@dataclass
class _RowInProgress:
    """The figures of a row, a window at a time."""

    label: str
    modules: dict[str, torch.nn.Module]
    nll: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    worst: list[Position] = field(default_factory=list)


class _Pass:
    """Runs formats over the windows.

    Attributes:
        reference: the 16-bit model's mean negative log-probability, for each window.
    """

    def __init__(
        self,
        model: EvaluatedModel,
        windows: torch.Tensor,
        options: EvaluationOptions,
        tokenizer: Any,
    ) -> None:
        self._model, self._windows, self._options = model, windows, options
        self._tokenizer = tokenizer
        self.reference: list[float] = []

    def rows(self, entry: Format, progress: Progress) -> list[Row]:
        """The rows of a format."""
        weights = entry.weights(self._model.layers)
        found = [
            _RowInProgress(label, self._modules(entry, weights, activations))
            for label, activations in entry.rows(self._options.activations).items()
        ]
        attention = (
            entry.attention(self._options.query_key_block_size)
            if self._options.scope == "all"
            else None
        )
        first = not self.reference
        for number, window in enumerate(self._windows):
            reference, tokens = self._model.logits(window), window[1:]
            if first:
                nll = negative_log_likelihood(reference, tokens)
                self.reference.append(float(nll.mean()))
            for row in found:
                with self._model.replaced(row.modules, attention, weights.tensors):
                    logits = self._model.logits(window)
                self._add(entry.name, row, number, compare(reference, logits, tokens))
                progress.advance()
        return [
            Row(
                entry.name,
                row.label,
                entry.ours,
                weights.bits,
                tuple(row.nll),
                tuple(row.divergence),
                tuple(row.agreement),
                tuple(row.worst),
            )
            for row in found
        ]

    def _modules(
        self, entry: Format, weights: Weights, activations: ActivationFormat | None
    ) -> dict[str, torch.nn.Module]:
        modules = {
            layer: weights.embeddings(layer, original)
            if isinstance(original, torch.nn.Embedding)
            else weights.layer(layer, original, activations)
            for layer, original in self._model.layers.items()
            if expert_of(layer) is None
        }
        for name, place in self._model.experts.items():
            modules[name] = weights.experts(name, place, activations)
        for layer, projection in self._model.projections.items():
            given = entry.activations_of_tied(activations)
            modules[projection_of(layer)] = weights.layer(layer, projection, given)
        return modules

    def _add(self, name: str, row: _RowInProgress, number: int, found: Predictions) -> None:
        """Add a window to a row."""
        if not bool(found.divergence.isfinite().all()):
            raise CheckpointError(
                f"{name} {row.label}: its predictions hold NaN or Inf in window {number} of the "
                "text; leave this format out, or find out which layer overflows"
            )
        row.nll.append(float(found.nll.mean()))
        row.divergence.append(float(found.divergence.mean()))
        row.agreement.append(float((found.expected == found.top).double().mean()))
        largest = found.divergence.topk(min(self._options.worst, len(found.divergence))).indices
        row.worst += [self._position(number, place, found) for place in largest.tolist()]
        row.worst.sort(key=lambda position: -position.divergence)
        del row.worst[self._options.worst :]

    def _position(self, number: int, place: int, found: Predictions) -> Position:
        window = self._windows[number]
        context = self._text(window[max(0, place + 1 - _CONTEXT_TOKENS) : place + 1])
        return Position(
            window=number,
            position=place + 1,
            divergence=float(found.divergence[place]),
            context=context[-_CONTEXT_CHARACTERS:],
            token=self._text(window[place + 1]),
            expected=self._text(found.expected[place]),
            found=self._text(found.top[place]),
        )

    def _text(self, tokens: torch.Tensor) -> str:
        return str(self._tokenizer.decode(tokens.reshape(-1).tolist()))


def _opened(packed: Sequence[str | Path]) -> dict[str, PackedCheckpoint]:
    """Name in the table -> packed checkpoint."""
    opened: dict[str, PackedCheckpoint] = {}
    for path in packed:
        name = Path(path).resolve().name
        if name in opened:
            raise CheckpointError(
                f"{path}: another checkpoint has the name {name}, too, under which it would stand "
                "in the table; rename one of the directories"
            )
        opened[name] = open_packed(path)
    return opened


def _layers(checkpoint: Checkpoint, opened: Mapping[str, PackedCheckpoint]) -> list[str]:
    """The layers to emulate, which all packed checkpoints have packed.

    Raises:
        CheckpointError: if they have packed different ones, or the 16-bit model has others.
    """
    if not opened:
        return sorted(choose_layers(checkpoint, ConvertOptions()).formats, key=natural_order)
    first, *others = opened.values()
    for other in others:
        differing = sorted(set(first.layers) ^ set(other.layers), key=natural_order)
        if differing:
            raise CheckpointError(
                f"{other.checkpoint.path}: {differing[0]} is packed in one of the checkpoints "
                "alone; evaluate them one after the other"
            )
    for layer in first.layers:
        info = checkpoint.weights.get(layer)
        codes = first.checkpoint.tensors.get(layer + PACKED_SUFFIXES[0])
        if codes is None or len(codes.shape) != 2:
            shape = first.read(layer).shape  # says what is wrong
        else:
            shape = (codes.shape[0], 2 * codes.shape[1])
        if info is None or info.shape != shape:
            there = "no such layer" if info is None else f"{list(info.shape)}"
            raise CheckpointError(
                f"{layer}: is {list(shape)} in {first.checkpoint.path}, and {checkpoint.path} has "
                f"{there}; give the 16-bit checkpoint that it was made from"
            )
    return sorted(first.layers, key=natural_order)


def _check_ratio(options: EvaluationOptions, opened: Collection[str]) -> None:
    names = [*opened, *map(str, options.formats)]
    if options.ratio_to is not None and options.ratio_to not in names:
        raise ValueError(
            f"--ratio-to: {options.ratio_to!r}; it must be a row of the table: {', '.join(names)}"
        )


def _text(checkpoint: Checkpoint, options: EvaluationOptions) -> CalibrationText:
    """The windows of the text."""
    nested = checkpoint.config.get("text_config")
    config = nested if isinstance(nested, dict) else checkpoint.config
    longest, vocabulary = config.get("max_position_embeddings"), config.get("vocab_size")
    if isinstance(longest, int) and options.sequence_length > longest:
        raise CheckpointError(
            f"--sequence-length: {options.sequence_length}; the model takes at most {longest} "
            "tokens: give fewer"
        )
    windows = CalibrationOptions(
        calibrate=options.text, samples=options.windows, sequence_length=options.sequence_length
    )
    known = vocabulary if isinstance(vocabulary, int) else torch.iinfo(torch.int64).max
    return read_text(checkpoint.path, windows, known, option="--text")


def _peers(
    checkpoint: Checkpoint, layers: Sequence[str], options: EvaluationOptions
) -> CalibratedPeers | None:
    """The formats that are calibrated here; None if there are none."""
    calibrated = [name for name in options.formats if name.gptq]
    if not calibrated:
        return None
    return CalibratedPeers(checkpoint, layers, calibrated, options.calibration)


def _tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        checkpoint.path, local_files_only=True, trust_remote_code=False
    )
