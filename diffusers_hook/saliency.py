"""Which tokens are salient: the attention each one receives, without the full attention map.

The score of token j is the mean, over heads and over sampled query rows i, of
``softmax(q k^T * scale)_ij``; the tokens with the largest scores get a second, residual rounding.
That attention guides the choice is SemanticDialect's idea; the formulas are ours (docs/format.md,
section 5).

All functions take CPU and CUDA tensors in float32, bfloat16 or float16, compute in float32 and do
not wait for the device. Work is cut into tiles of at most ``_TILE_ELEMENTS`` attention weights (or
of one query row of one head, where that is more), so that peak memory does not grow with T x T.

Masks are those of ``torch.nn.functional.scaled_dot_product_attention``: bool (True takes part) or
additive, broadcastable to [B, H, T_q, T_k]. Additive values of -8192 and below count as -inf:
"masked" is written as -inf, as the dtype's lowest number or as -10000 in practice. A query row
with every key masked attends to nothing: it adds zeros, not NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

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

_TILE_ELEMENTS = 1 << 23
"""Attention weights computed at a time: 32 MiB in float32, and about three such temporaries."""
_TILE_QUERIES = 256
"""Query rows of a tile, at most: keeps a tile well below the full map for short sequences too."""
_MASKED = -8192.0
"""Additive mask values from here down are -inf; above bfloat16's nearest to -10000, -9984."""


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
        mask: see the module's text.
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


@torch.no_grad()
def log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """``logsumexp(q k^T * scale + mask)`` over the keys, tile by tile.

    About half the work of an attention: for masks, and where no kernel hands its own out.

    Args:
        query, key, mask, scale: as for :func:`received_attention`.

    Returns:
        float32 [B, H, T_q]; -inf for a query with every key masked.

    Raises:
        ValueError: if shapes do not fit.
    """
    check_attention(query, key)
    scale = default_scale(query, scale)
    mask = expanded_mask(mask, query, key)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    group = query.shape[1] // key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        for kv_heads, rows in _tiles(query.shape, key.shape):
            heads = slice(kv_heads.start * group, kv_heads.stop * group)
            part = None if mask is None else mask[:, heads, rows]
            logits = _logits(query[:, heads, rows], key[:, kv_heads], part, scale)
            lse[:, heads, rows] = logits.logsumexp(-1)
    return lse


@torch.no_grad()
def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention together with the log-sum-exp of its logits, from one kernel where there is one.

    On CUDA xformers is asked first, if it is installed and runs here, then torch's flash and
    memory-efficient kernels; on CPU torch's flash kernel. With a mask, or where no kernel takes
    the inputs, ``scaled_dot_product_attention`` and :func:`log_sum_exp` do the same in two passes.

    Args:
        query, key, mask, scale: as for :func:`received_attention`; not differentiable.
        value: [B, H, T_k, D_v], with key's heads.

    Returns:
        The output [B, H, T_q, D_v] in query's dtype, and the log-sum-exp, float32 [B, H, T_q].

    Raises:
        ValueError: if shapes do not fit.
    """
    check_attention(query, key)
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: has shape {list(value.shape)}, but key has {list(key.shape)}; "
            "they must agree in batch, heads and tokens"
        )
    scale = default_scale(query, scale)
    if query.shape[1] != key.shape[1]:
        group = query.shape[1] // key.shape[1]
        all_keys, all_values = (x.repeat_interleave(group, 1) for x in (key, value))
    else:
        all_keys, all_values = key, value
    if mask is None and query.numel() > 0 and key.numel() > 0:
        run = _cuda_attention if query.is_cuda else _cpu_attention
        result = run(query, all_keys, all_values, scale)
        if result is not None:
            out, lse = result
            return out, lse[..., : query.shape[2]]  # some kernels pad it to multiples of 32
    out = F.scaled_dot_product_attention(query, all_keys, all_values, attn_mask=mask, scale=scale)
    return out, log_sum_exp(query, key, mask=mask, scale=scale)


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


def check_attention(query: torch.Tensor, key: torch.Tensor) -> None:
    """Raise ValueError unless query [B, H, T_q, D] and key [B, H / group, T_k, D] fit."""
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            f"query and key: have shapes {list(query.shape)} and {list(key.shape)}; "
            "pass [batch, heads, tokens, head size]"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"key: has shape {list(key.shape)}, query {list(query.shape)}; "
            "they must agree in batch and head size"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key: has {key.shape[1]} heads, which do not divide query's {query.shape[1]}"
        )


def default_scale(query: torch.Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def expanded_mask(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """A [B, H, T_q, T_k] view of `mask` that takes no memory."""
    if mask is None:
        return None
    shape = (*query.shape[:3], key.shape[2])
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"mask: has shape {list(mask.shape)}, which does not broadcast to {list(shape)}, "
            "that is [batch, heads, queries, keys]"
        ) from None


def masked_logits(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """float32 logits with a mask of their shape applied."""
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -math.inf)
    return (logits + mask).masked_fill(mask <= _MASKED, -math.inf)


def probabilities(logits: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """``exp(logits - lse)``; 0 where lse is -inf, that is where everything is masked."""
    return torch.exp(logits - lse.masked_fill(lse == -math.inf, math.inf))


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
    group = query.shape[1] // key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        for kv_heads, rows in _tiles(query.shape, key.shape):
            heads = slice(kv_heads.start * group, kv_heads.stop * group)
            part = None if mask is None else mask[:, heads, rows]
            logits = _logits(query[:, heads, rows], key[:, kv_heads], part, scale)
            total = logits.logsumexp(-1, keepdim=True) if lse is None else lse[:, heads, rows]
            received += probabilities(logits, total).sum((1, 2))
    return received / max(1, query.shape[1] * query.shape[2])


def _logits(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """float32 [B, heads, rows, T_k]; grouped queries become rows of their key head's product."""
    batch, heads, rows, size = query.shape
    folded = (query.float() * scale).reshape(batch, key.shape[1], -1, size)
    logits = (folded @ key.float().mT).view(batch, heads, rows, key.shape[2])
    return masked_logits(logits, mask)


def _tiles(query: torch.Size, key: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Cut (key heads, query rows) so that no tile has more than _TILE_ELEMENTS logits."""
    batch, kv_heads, keys = key[0], key[1], key[2]
    per_row = max(1, batch * query[1] // kv_heads * keys)
    rows = min(query[2], _TILE_QUERIES, max(1, _TILE_ELEMENTS // per_row))
    heads = max(1, _TILE_ELEMENTS // (per_row * max(1, rows)))
    for head in range(0, kv_heads, heads):
        for row in range(0, query[2], max(1, rows)):
            yield slice(head, min(head + heads, kv_heads)), slice(row, row + rows)


_WithLse = tuple[torch.Tensor, torch.Tensor]


def _cpu_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> _WithLse | None:
    if query.device.type != "cpu" or value.shape[-1] != query.shape[-1]:
        return None
    # the kernel reads rows of contiguous elements
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    result: _WithLse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, scale=scale
    )
    return result


def _cuda_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> _WithLse | None:
    forward = _xformers_forward()
    if forward is not None:
        # xformers wants [B, T, H, D]
        turned = (x.transpose(1, 2) for x in (query, key, value))
        try:
            out, lse = forward(*turned, scale=scale)
        except (NotImplementedError, RuntimeError, ValueError):
            pass  # no operator for this device, dtype or head size; torch's are next
        else:
            return out.transpose(1, 2), lse
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    if torch.backends.cuda.can_use_flash_attention(params) and query.shape[-1] % 8 == 0:
        flash = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
        return flash[0], flash[1]
    if torch.backends.cuda.can_use_efficient_attention(params):
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, scale=scale
        )
        return efficient[0], efficient[1]
    return None


@cache
def _xformers_forward() -> Any:
    """xformers' attention with log-sum-exp, or None. Only asked on CUDA: it has nothing else.

    ``xformers.info`` calls kernels available that cannot be called, so the caller tries.
    """
    try:
        from xformers.ops import memory_efficient_attention_forward_requires_grad
    except (ImportError, OSError):  # OSError: built for another torch or CUDA
        return None
    return memory_efficient_attention_forward_requires_grad
