"""How two models' predictions of the same tokens differ, one window of text at a time.

Nothing of the size of a vocabulary is kept: a window's two matrices of logits are reduced to three
numbers a position before the next window runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Predictions", "compare", "negative_log_likelihood"]

_CHUNK_ELEMENTS = 1 << 23
"""Float32 logits of so many elements are computed with at a time."""


class Predictions(NamedTuple):
    """How a model predicts the T tokens of a window, against the 16-bit model."""

    nll: torch.Tensor
    """float64 [T], negative log-probability of the tokens, nats."""
    divergence: torch.Tensor
    """float64 [T], KL(16-bit model || model), nats."""
    expected: torch.Tensor
    """int64 [T], what the 16-bit model holds most probable."""
    top: torch.Tensor
    """int64 [T], what the model holds most probable."""


def compare(reference: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor) -> Predictions:
    """Compare two models' logits.

    Args:
        reference: [T, V] of the 16-bit model.
        logits: [T, V] of the other one.
        tokens: int64 [T], the tokens that were to be predicted.
    """
    nll, divergence = (torch.empty(len(tokens), dtype=torch.float64) for _ in range(2))
    for part in _parts(logits):
        exact = reference[part].float().log_softmax(dim=-1)
        found = logits[part].float().log_softmax(dim=-1)
        nll[part] = _of_tokens(found, tokens[part])
        # exp(exact) * (exact - found), in the memory of the two
        difference = found.neg_().add_(exact)
        divergence[part] = exact.exp_().mul_(difference).sum(dim=-1, dtype=torch.float64).cpu()
    return Predictions(nll, divergence, reference.argmax(dim=-1).cpu(), logits.argmax(dim=-1).cpu())


def negative_log_likelihood(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-probability of tokens, nats.

    Args:
        logits: [T, V].
        tokens: int64 [T].

    Returns:
        float64 [T].
    """
    nll = torch.empty(len(tokens), dtype=torch.float64)
    for part in _parts(logits):
        nll[part] = _of_tokens(logits[part].float().log_softmax(dim=-1), tokens[part])
    return nll


def _of_tokens(logprobs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Minus the log-probability of each row's token."""
    return -logprobs.gather(1, tokens[:, None].to(logprobs.device))[:, 0].double().cpu()


def _parts(logits: torch.Tensor) -> list[slice]:
    """Slices of the positions, each as many as are computed with at a time."""
    positions, vocabulary = logits.shape
    step = max(1, _CHUNK_ELEMENTS // vocabulary)
    return [slice(first, first + step) for first in range(0, positions, step)]
