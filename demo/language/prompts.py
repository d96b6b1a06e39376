"""What the demonstration asks a model: code for the one that ships, else questions or sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .server import Server

__all__ = ["Prompts"]

_TOKENS = 40
_CODE = ("def read_", "import os\n\nclass ", "    for name in sorted(")
_QUESTIONS = (
    "How many legs does a spider have?",
    "What is 7 + 5?",
    "Why is the sky blue? Answer in one sentence.",
)
_BEGINNINGS = (
    "The capital of France is",
    "A spider has eight legs, an insect has",
    "Water boils when",
)


@dataclass(frozen=True)
class Prompts:
    """Prompts of one kind.

    Attributes:
        texts: the prompts.
        chat: whether they are messages of a user, for the chat template of the model.
    """

    texts: tuple[str, ...]
    chat: bool = False

    @classmethod
    def of(cls, tokenizer: Any, shipped: bool) -> Prompts:
        """Prompts that suit a model.

        Args:
            tokenizer: of the model, by transformers.
            shipped: whether it is the model that ships, which has read Python code only.
        """
        if shipped:
            return cls(_CODE)
        if getattr(tokenizer, "chat_template", None):
            return cls(_QUESTIONS, chat=True)
        return cls(_BEGINNINGS)

    def answers(self, server: Server) -> list[str]:
        """Greedy answers of a server."""
        ask = server.chat if self.chat else server.complete
        return [ask(text, max_tokens=_TOKENS) for text in self.texts]
