"""From calibration text to windows of tokens.

A plain text file is one document. A JSONL file holds one document a line: ``{"text": "..."}``, or
``{"messages": [{"role": "user", "content": "..."}, ...]}``, which the model's chat template turns
into text. The documents' tokens are put one after another and cut into windows of one length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeGuard

import torch

from ..checkpoint.reader import CheckpointError
from .options import DEFAULT_TEXT, CalibrationOptions

__all__ = ["CalibrationText", "read_text"]

_DEFAULT_FILE = "default.jsonl"
_FORMS = '{"text": "..."} or {"messages": [{"role": "...", "content": "..."}]}'


@dataclass(frozen=True)
class CalibrationText:
    """Windows of tokens to calibrate on.

    Attributes:
        name: what the text is called.
        windows: int64 [samples, sequence length].
    """

    name: str
    windows: torch.Tensor

    @property
    def sha256(self) -> str:
        """Hash of the tokens."""
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()


def read_text(
    model: Path, options: CalibrationOptions, vocabulary: int, option: str = "--calibrate"
) -> CalibrationText:
    """Read and cut the calibration text.

    Where the tokenizer has a begin token, every window begins with it. Of a text that holds more
    windows than `options.samples`, so many are taken, evenly spread.

    Args:
        model: directory of a checkpoint with its tokenizer.
        options: names the text, the number and the length of the windows.
        vocabulary: rows of the model's embedding.
        option: what named the text; error messages begin with it.

    Raises:
        CheckpointError: if the text cannot be read or is shorter than one window, there is no
            tokenizer, or its tokens are not those of the model.
    """
    tokenizer = _tokenizer(model)
    name = options.calibrate
    tokens: list[int] = []
    for document in _documents(name, option):
        tokens += _tokens(document, tokenizer, name, option)
    begin = getattr(tokenizer, "bos_token_id", None)
    head = [begin] if isinstance(begin, int) else []
    step = options.sequence_length - len(head)
    found = len(tokens) // step
    if not found:
        raise CheckpointError(
            f"{option}: {name} holds {len(tokens)} tokens, and one window takes "
            f"{options.sequence_length}; give a longer text or a smaller --sequence-length"
        )
    used = min(found, options.samples)
    starts = [index * found // used * step for index in range(used)]
    windows = torch.tensor([head + tokens[start : start + step] for start in starts])
    highest = int(windows.max())
    if highest >= vocabulary:
        raise CheckpointError(
            f"{model}: its tokenizer gives token {highest}, but the model's vocabulary has "
            f"{vocabulary} entries; give the checkpoint the tokenizer that belongs to it"
        )
    return CalibrationText(name, windows)


def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts do
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise CheckpointError(
            f"{model}: has no tokenizer that transformers can read ({reason}); put the model's "
            "tokenizer files there"
        ) from None


def _documents(name: str, option: str) -> Iterator[str | list[dict[str, str]]]:
    """Texts, and conversations as lists of messages."""
    if name == DEFAULT_TEXT:
        packaged = files(__package__).joinpath(_DEFAULT_FILE)
        yield from _lines(_DEFAULT_FILE, option, packaged.read_text(encoding="utf-8"))
        return
    path = Path(name)
    if not path.is_file():
        raise CheckpointError(
            f"{option}: {name} is not a file; give a text file, a JSONL file or {DEFAULT_TEXT!r}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{option}: {name} is not UTF-8 text ({error.reason} at byte {error.start}); give "
            "a text file or a JSONL file"
        ) from None
    if path.suffix == ".jsonl":
        yield from _lines(name, option, text)
    else:
        yield text


def _lines(name: str, option: str, contents: str) -> Iterator[str | list[dict[str, str]]]:
    for number, line in enumerate(contents.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        fields = entry if isinstance(entry, dict) else {}
        text, messages = fields.get("text"), fields.get("messages")
        if isinstance(text, str) and text:
            yield text
        elif _is_conversation(messages):
            yield messages
        else:
            raise CheckpointError(f"{option}: {name}: line {number} must be {_FORMS}")


def _is_conversation(value: Any) -> TypeGuard[list[dict[str, str]]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )


def _tokens(
    document: str | list[dict[str, str]], tokenizer: Any, name: str, option: str
) -> list[int]:
    if not isinstance(document, str):
        document = _conversation(document, tokenizer, name, option)
    found: list[int] = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
    return found


def _conversation(messages: list[dict[str, str]], tokenizer: Any, name: str, option: str) -> str:
    """A conversation as the model's template writes it."""
    if getattr(tokenizer, "chat_template", None) is None:
        if name == DEFAULT_TEXT:
            return "".join(f"{message['content']}\n\n" for message in messages)
        raise CheckpointError(
            f"{option}: {name} holds chat messages, but the model's tokenizer has no chat "
            'template; give {"text": "..."} lines or plain text'
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise whatever they like
        raise CheckpointError(
            f"{option}: {name}: the model's chat template does not take the conversation that "
            f"begins with {messages[0]['content'][:40]!r} ({error}); leave it out"
        ) from None
