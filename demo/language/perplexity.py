"""Log-probabilities of a text's tokens, by a running server or by a model in this process.

The text is cut into windows that do not overlap. In each, every token but the first is predicted
from those before it; where the tokenizer has a begin token, that is the first of every window.
Perplexity is ``exp`` of the mean negative log-probability. A model in this process is compared with
the 16-bit model too: by the KL divergence of what the two predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dialect_plugin.evaluation.divergence import compare

from .server import Server

__all__ = [
    "Emulated",
    "model_differences",
    "model_logprobs",
    "paired_standard_error",
    "perplexity",
    "predicted",
    "server_logprobs",
    "windows",
]

Windows = Sequence[list[int]]


class Emulated(NamedTuple):
    """What a model in this process predicts."""

    logprobs: torch.Tensor
    """float64 [number of predicted tokens]."""
    divergence: float | None = None
    """Mean KL(bf16 || model), nats; None for the bf16 model itself."""
    standard_error: float | None = None
    """Of the mean divergence, over the windows."""
    same_top: float | None = None
    """Share of positions at which both hold the same token most probable."""


def windows(
    tokens: list[int], length: int, limit: int, begin: int | None = None
) -> list[list[int]]:
    """Cut the first `limit` tokens into windows; a window that predicts nothing is dropped.

    Args:
        tokens: token ids of the text.
        length: most tokens in a window, `begin` included.
        limit: how many of `tokens` to use.
        begin: token id to begin every window with, or None.
    """
    head = [] if begin is None else [begin]
    step = length - len(head)
    used = tokens[:limit]
    parts = [head + used[i : i + step] for i in range(0, len(used), step)]
    return [part for part in parts if len(part) > 1]


def predicted(parts: Windows) -> int:
    """How many tokens of the windows are predicted."""
    return sum(len(part) - 1 for part in parts)


def perplexity(logprobs: torch.Tensor) -> float:
    """``exp`` of the mean of ``-logprobs``."""
    return math.exp(-float(logprobs.double().mean()))


def paired_standard_error(first: torch.Tensor, second: torch.Tensor, parts: Windows) -> float:
    """Standard error of the mean difference of two models' log-probabilities of the same tokens.

    The differences inside a window are not independent (a token's error stays in the attention of
    all later ones), so the windows are the sample: the error is that of a ratio of sums over them.
    A few windows can agree by chance, so it is never less than that of independent tokens.

    Args:
        first: [number of predicted tokens].
        second: the same shape.
        parts: the windows of these tokens.

    Returns:
        In nats per token.
    """
    lengths = [len(part) - 1 for part in parts]
    difference = first.double() - second.double()
    excess = difference - difference.mean()
    independent = float(excess.square().sum())
    sums = torch.stack([window.sum() for window in excess.split_with_sizes(lengths)])
    between = float(sums.square().sum()) * len(parts) / max(1, len(parts) - 1)
    return math.sqrt(max(independent, between)) / len(difference)


def server_logprobs(
    server: Server, parts: Windows, done: Callable[[], object] = lambda: None
) -> torch.Tensor:
    """Natural log-probabilities of the predicted tokens, from a running server over HTTP.

    Args:
        server: the server.
        parts: windows of token ids.
        done: called after each window.

    Returns:
        float64 [number of predicted tokens].
    """
    found: list[float] = []
    for part in parts:
        choice = server.completion(part, max_tokens=1, prompt_logprobs=0)
        scored = zip(part[1:], choice["prompt_logprobs"][1:], strict=True)
        found += [by_token[str(token)]["logprob"] for token, by_token in scored]
        done()
    return torch.tensor(found, dtype=torch.float64)


@torch.inference_mode()
def model_logprobs(
    model: torch.nn.Module, parts: Windows, done: Callable[[], object] = lambda: None
) -> torch.Tensor:
    """The same log-probabilities, from a transformers model in this process."""
    found: list[torch.Tensor] = []
    for part in parts:
        tokens = torch.tensor([part])
        logits = model(tokens).logits[0, :-1].float()
        found.append(logits.log_softmax(dim=-1).gather(1, tokens[0, 1:, None])[:, 0].double())
        done()
    return torch.cat(found)


@torch.inference_mode()
def model_differences(
    model: torch.nn.Module,
    reference: torch.nn.Module,
    parts: Windows,
    done: Callable[[], object] = lambda: None,
) -> Emulated:
    """Log-probabilities of a transformers model, and how it differs from the bf16 model.

    Args:
        model: the emulation of a format.
        reference: the bf16 model.
        parts: windows of token ids.
        done: called after each window.
    """
    logprobs, divergence, same = [], [], []
    for part in parts:
        tokens = torch.tensor([part])
        logits = [m(tokens, use_cache=False).logits[0, :-1] for m in (reference, model)]
        found = compare(*logits, tokens[0, 1:])
        logprobs.append(-found.nll)
        divergence.append(found.divergence)
        same.append(found.expected == found.top)
        done()
    everywhere = torch.cat(divergence)
    error = paired_standard_error(everywhere, torch.zeros_like(everywhere), parts)
    agreement = float(torch.cat(same).double().mean())
    return Emulated(torch.cat(logprobs), float(everywhere.mean()), error, agreement)
