"""Perplexity of a text, by a running server or by a model in this process, counted alike.

The text is cut into windows that do not overlap; in each, every token but the first is predicted
from those before it. Perplexity is ``exp`` of the mean negative log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from .server import Server

__all__ = ["model_perplexity", "server_perplexity", "windows"]


def windows(tokens: list[int], length: int, limit: int) -> list[list[int]]:
    """Cut the first `limit` tokens into windows of `length`; a last one of one token is dropped."""
    parts = [tokens[i : min(i + length, limit)] for i in range(0, min(len(tokens), limit), length)]
    return [part for part in parts if len(part) > 1]


def server_perplexity(
    server: Server, parts: Iterable[list[int]], done: Callable[[], object] = lambda: None
) -> float:
    """Perplexity from the prompt log-probabilities of a running server.

    Args:
        server: the server.
        parts: windows of token ids.
        done: called after each window.
    """
    total, count = 0.0, 0
    for part in parts:
        choice = server.complete(part, max_tokens=1, prompt_logprobs=0)
        scored = zip(part[1:], choice["prompt_logprobs"][1:], strict=True)
        total += sum(by_token[str(token)]["logprob"] for token, by_token in scored)
        count += len(part) - 1
        done()
    return math.exp(-total / count)


@torch.inference_mode()
def model_perplexity(
    model: torch.nn.Module,
    parts: Iterable[list[int]],
    done: Callable[[], object] = lambda: None,
) -> float:
    """Perplexity of a transformers model; `done` is called after each window."""
    total, count = 0.0, 0
    for part in parts:
        tokens = torch.tensor([part])
        logits = model(tokens).logits[0, :-1].float()
        chosen = logits.log_softmax(dim=-1).gather(1, tokens[0, 1:, None])
        total += float(chosen.double().sum())
        count += len(part) - 1
        done()
    return math.exp(-total / count)
