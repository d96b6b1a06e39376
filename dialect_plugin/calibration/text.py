"""From calibration text to windows of tokens.

The documents' tokens are put one after another and cut into windows of one length. The model's chat
template turns conversations into text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.reader import CheckpointError
from .documents import Document, is_long, read_documents
from .options import DEFAULT_TEXT, CalibrationOptions

__all__ = ["CalibrationText", "read_text"]


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

    Where the tokenizer has a begin token, every window begins with it. Of a file that holds more
    windows than `options.samples`, so many are taken, evenly spread; of a data set, the first ones.

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
    begin = getattr(tokenizer, "bos_token_id", None)
    head = [begin] if isinstance(begin, int) else []
    step = options.sequence_length - len(head)
    tokens: list[int] = []
    for document in read_documents(name, option):
        tokens += _tokens(document, tokenizer, name, option)
        if is_long(name) and len(tokens) >= step * options.samples:
            break
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


def _tokens(document: Document, tokenizer: Any, name: str, option: str) -> list[int]:
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
