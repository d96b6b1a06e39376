"""Which tokens are salient: the attention each one receives, without the full attention map.

The score of token j is the mean, over heads and over sampled query rows i, of
``softmax(q k^T * scale)_ij``; the tokens with the largest scores get a second, residual rounding.
That attention guides the choice is SemanticDialect's idea; the formulas are ours (docs/format.md,
section 5).

What devices, dtypes and masks are taken, and how memory is bounded: see
:mod:`diffusers_hook.attention.attention`. Queries with every key masked add nothing to a score.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import torch

from .attention import (
    attention_with_lse,
    check_attention,
    default_scale,
    expanded_mask,
    log_sum_exp,
    probabilities,
    tile_logits,
    tiles,
)

__all__ = [
    "SELECTIONS",
    "attention_with_lse",
    "log_sum_exp",
    "received_attention",
    "received_attention_from_lse",
    "salient_count",
    "sampled_queries",
    "select_salient",
]

SELECTIONS = ("top", "random", "bottom")


def sampled_queries(count: int, samples: int = 64) -> range:
    """The query rows whose attention is looked at: every ``max(1, count // samples)``-th, from 0.

    Returns:
        Between `samples` and ``2 * samples - 1`` rows, or all if there are fewer.
    """
    return range(0, count, max(1, count // samples))


def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    samples: int = 64,
) -> torch.Tensor:
    """The attention every key receives from the sampled queries (ours, after SemanticDialect).

    Args:
        query: [B, H, T_q, D].
        key: [B, H, T_k, D]; fewer heads are allowed where they divide H (grouped queries).
        mask: see :mod:`diffusers_hook.attention.attention`.
        scale: factor of the logits, default ``1 / sqrt(D)``.
        samples: see :func:`sampled_queries`.

    Returns:
        float32 [B, T_k], the mean over heads and sampled queries. A sample's scores add up to the
        share of its sampled queries that attend to anything: 1 without a mask.

    Raises:
        ValueError: if shapes do not fit.
    """
    return _received(query, key, None, mask, scale, samples)


def received_attention_from_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    samples: int = 64,
) -> torch.Tensor:
    """:func:`received_attention` from the attention's own log-sum-exp, without another softmax.

    Args:
        query, key, mask, scale, samples: as for :func:`received_attention`.
        lse: float32 [B, H, T_q], of all queries, as :func:`attention_with_lse` and
            :func:`log_sum_exp` return it.

    Returns:
        float32 [B, T_k].

    Raises:
        ValueError: if shapes do not fit.
    """
    if lse.shape != query.shape[:3]:
        raise ValueError(
            f"lse: has shape {list(lse.shape)}, but query needs {list(query.shape[:3])}; "
            "pass one value per query row"
        )
    return _received(query, key, lse, mask, scale, samples)


def salient_count(fraction: float | Fraction | Decimal, tokens: int) -> int:
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
        fraction: share of the tokens, in 0..1; rounded up to whole tokens (:func:`salient_count`).
        selection: ``"top"`` (the method: largest scores), or the controls ``"random"`` and
            ``"bottom"`` (smallest scores). Ties go to the lower index.
        generator: for ``"random"``; its device decides the draw, so that a CPU generator picks
            the same tokens everywhere.

    Returns:
        int64 [B, ``salient_count(fraction, T_video)``], ascending in every row.

    Raises:
        ValueError: if `fraction`, `selection` or the shape of `scores` is not allowed.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores: has shape {list(scores.shape)}; pass [samples, video tokens]")
    if selection not in SELECTIONS:
        raise ValueError(
            f"selection: {selection!r} is not known; choose one of {', '.join(SELECTIONS)}"
        )
    count = salient_count(fraction, scores.shape[1])
    if selection == "random":
        device = scores.device if generator is None else generator.device
        # a float32 draw would tie among many tokens, and ties favour the lower index
        scores = torch.rand(scores.shape, generator=generator, device=device, dtype=torch.float64)
    # topk does not say which of equal scores it returns; a stable sort keeps their order
    order = scores.argsort(dim=1, descending=selection != "bottom", stable=True)
    chosen: torch.Tensor = order[:, :count].sort(dim=1).values
    return chosen if selection != "random" else chosen.to(scores.device)


@torch.no_grad()
def _received(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float | None,
    samples: int,
) -> torch.Tensor:
    check_attention(query, key)
    scale = default_scale(query, scale)
    mask = expanded_mask(mask, query, key)
    stride = sampled_queries(query.shape[2], samples).step
    query = query[:, :, ::stride]
    lse = None if lse is None else lse[:, :, ::stride, None]
    mask = None if mask is None else mask[:, :, ::stride]
    received = torch.zeros(key.shape[0], key.shape[2], dtype=torch.float32, device=key.device)
    with torch.autocast(query.device.type, enabled=False):
        for heads, kv_heads, rows in tiles(query, key):
            part = None if mask is None else mask[:, heads, rows]
            logits = tile_logits(query[:, heads, rows], key[:, kv_heads], part, scale)
            total = logits.logsumexp(-1, keepdim=True) if lse is None else lse[:, heads, rows]
            received += probabilities(logits, total).sum((1, 2))
    return received / max(1, query.shape[1] * query.shape[2])
