"""Which tokens are salient: the attention each one receives, without the full attention map.

The score of token j is the mean, over heads and over sampled query rows i, of
``softmax(q k^T * scale)_ij``; the tokens with the largest scores get a second, residual rounding.
That attention guides the choice is SemanticDialect's idea; the formulas are ours
(docs/reference/format.md, section 5).

Devices, dtypes and masks that are taken, and the bound of memory: see
:mod:`diffusers_hook.attention.attention`. Queries with every key masked add nothing to a score.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import torch

from .attention import Attention, probabilities

__all__ = ["received_attention", "select_salient"]

_SELECTIONS = ("top", "random", "bottom")


def _sampling_step(queries: int, samples: int = 64) -> int:
    """The distance of the queries whose attention counts: ``max(1, queries // samples)``.

    With the first query that makes between `samples` and ``2 * samples - 1`` of them, or all if
    there are fewer.
    """
    return max(1, queries // samples)


@torch.no_grad()
def received_attention(attention: Attention, samples: int = 64) -> torch.Tensor:
    """The attention every key receives from the sampled queries (ours, after SemanticDialect).

    Args:
        attention: the attention; a log-sum-exp that it has saves another softmax.
        samples: how many queries count, see :func:`_sampling_step`.

    Returns:
        float32 [B, T_k], the mean over heads and sampled queries. A sample's scores add up to the
        share of its sampled queries that attend to anything: 1 without a mask.
    """
    sampled = attention.every(_sampling_step(attention.query.shape[2], samples))
    query, key = sampled.query, sampled.key
    received = torch.zeros(key.shape[0], key.shape[2], dtype=torch.float32, device=key.device)
    with torch.autocast(query.device.type, enabled=False):
        for heads, rows, logits in sampled.tiles():
            if sampled.lse is None:
                total = logits.logsumexp(-1, keepdim=True)
            else:
                total = sampled.lse[:, heads, rows, None]
            received += probabilities(logits, total).sum((1, 2))
    return received / max(1, query.shape[1] * query.shape[2])


def _salient_count(fraction: float | Fraction | Decimal, tokens: int) -> int:
    """``ceil(fraction * tokens)``, the fraction read as it is written.

    0.1 of 30 tokens are 3: the float 0.1 is slightly more than a tenth, and float arithmetic
    would give 4 here and 3 there.

    Raises:
        ValueError: if `fraction` is not in 0..1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: {fraction} is not allowed; give a number in 0..1")
    return math.ceil(Fraction(str(fraction)) * tokens)


@torch.no_grad()
def select_salient(
    scores: torch.Tensor,
    fraction: float | Fraction | Decimal,
    *,
    selection: str = "top",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The salient tokens of every sample.

    Args:
        scores: [B, T_video], of the video tokens alone.
        fraction: share of the tokens, in 0..1; rounded up to whole tokens (:func:`_salient_count`).
        selection: ``"top"`` (the method: largest scores), or the controls ``"random"`` and
            ``"bottom"`` (smallest scores). Ties go to the lower index.
        generator: for ``"random"``; its device decides the draw, so that a CPU generator picks
            the same tokens everywhere.

    Returns:
        int64 [B, ceil(fraction * T_video)], ascending in every row.

    Raises:
        ValueError: if `fraction`, `selection` or the shape of `scores` is not allowed.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores: has shape {list(scores.shape)}; pass [samples, video tokens]")
    if selection not in _SELECTIONS:
        raise ValueError(
            f"selection: {selection!r} is not known; choose one of {', '.join(_SELECTIONS)}"
        )
    count, home = _salient_count(fraction, scores.shape[1]), scores.device
    if selection == "random":
        device = home if generator is None else generator.device
        # a float32 draw would tie among many tokens, and ties favour the lower index
        scores = torch.rand(scores.shape, generator=generator, device=device, dtype=torch.float64)
    # topk does not say which of equal scores it returns; a stable sort keeps their order
    order = scores.argsort(dim=1, descending=selection != "bottom", stable=True)
    return order[:, :count].sort(dim=1).values.to(home)
