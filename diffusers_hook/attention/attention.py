"""The logits of an attention and their log-sum-exp, without the full map.

All functions take CPU and CUDA tensors in float32, bfloat16 or float16, compute in float32 and do
not wait for the device. What is not left to an attention kernel is cut into tiles of at most
``_TILE_ELEMENTS`` logits (or of one query row of one head, where that is more), so that peak memory
does not grow with T x T.

Masks are those of ``torch.nn.functional.scaled_dot_product_attention``: bool (True takes part) or
additive, broadcastable to [B, H, T_q, T_k]. Additive values of -8192 and below count as -inf:
"masked" is written as -inf, as the dtype's lowest number or as -10000 in practice. A query row
with every key masked attends to nothing: its weights are zeros, not NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["attention_with_lse", "log_sum_exp"]

_TILE_ELEMENTS = 1 << 23
"""Logits computed at a time: 32 MiB in float32, and about three such temporaries."""
_TILE_QUERIES = 256
"""Query rows of a tile, at most: keeps a tile well below the full map for short sequences too."""
_MASKED = -8192.0
"""Additive mask values from here down are -inf; above bfloat16's nearest to -10000, -9984."""
_BIAS_ALIGNMENT = 16
"""Elements: the memory-efficient kernel reads rows of a bias that start at multiples of it."""


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

    On CUDA xformers is asked first, if it is installed and runs here (not for masks), then torch's
    flash and memory-efficient kernels; on CPU torch's flash kernel. Where none takes the inputs,
    ``scaled_dot_product_attention`` and :func:`tiled_log_sum_exp` do the same in two passes.

    Args:
        query: [B, H, T_q, D]; nothing here is differentiable.
        key: [B, H, T_k, D]; fewer heads are allowed where they divide H (grouped queries).
        value: [B, H, T_k, D_v], with key's heads.
        mask: see the module's text.
        scale: factor of the logits, default ``1 / sqrt(D)``.

    Returns:
        The output [B, H, T_q, D_v] in query's dtype, and the log-sum-exp, float32 [B, H, T_q];
        -inf, and zeros in the output, for a query with every key masked.

    Raises:
        ValueError: if shapes do not fit.
    """
    check_attention(query, key)
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: has shape {list(value.shape)}, but key has {list(key.shape)}; "
            "they must agree in batch, heads and tokens"
        )
    result = _kernel(query, key, value, mask, scale)
    if result is not None:
        return result
    lse = tiled_log_sum_exp(query, key, mask=mask, scale=scale)
    key, value = (_every_head(x, query) for x in (key, value))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.masked_fill(lse.unsqueeze(-1) == -math.inf, 0), lse


@torch.no_grad()
def log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """``logsumexp(q k^T * scale + mask)`` over the keys.

    From an attention kernel, whose output is thrown away: it costs as much as the attention. Where
    no kernel takes the inputs, from :func:`tiled_log_sum_exp`, which does half the multiplications
    but is slower. Whoever computes the attention anyway gets it for nothing from
    :func:`attention_with_lse`.

    Args:
        query, key, mask, scale: as for :func:`attention_with_lse`.

    Returns:
        float32 [B, H, T_q]; -inf for a query with every key masked.

    Raises:
        ValueError: if shapes do not fit.
    """
    check_attention(query, key)
    result = _kernel(query, key, key, mask, scale)
    return tiled_log_sum_exp(query, key, mask=mask, scale=scale) if result is None else result[1]


@torch.no_grad()
def tiled_log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """:func:`log_sum_exp` in plain torch, one tile of ``q k^T`` after the other."""
    check_attention(query, key)
    scale = default_scale(query, scale)
    mask = expanded_mask(mask, query, key)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for heads, kv_heads, rows in tiles(query, key):
            part = None if mask is None else mask[:, heads, rows]
            logits = tile_logits(query[:, heads, rows], key[:, kv_heads], part, scale)
            lse[:, heads, rows] = logits.logsumexp(-1)
    return lse


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


def tile_logits(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """float32 [B, heads, rows, T_k]; grouped queries become rows of their key head's product."""
    batch, heads, rows, size = query.shape
    folded = (query.float() * scale).reshape(batch, key.shape[1], -1, size)
    logits = (folded @ key.float().mT).view(batch, heads, rows, key.shape[2])
    return masked_logits(logits, mask)


def tiles(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Heads, their key heads and query rows of tiles with at most _TILE_ELEMENTS logits."""
    kv_heads, queries = key.shape[1], query.shape[2]
    group = query.shape[1] // kv_heads
    per_row = max(1, key.shape[0] * group * key.shape[2])
    rows = max(1, min(queries, _TILE_QUERIES, _TILE_ELEMENTS // per_row))
    step = max(1, _TILE_ELEMENTS // (per_row * rows))
    for first in range(0, kv_heads, step):
        last = min(first + step, kv_heads)
        for row in range(0, queries, rows):
            yield slice(first * group, last * group), slice(first, last), slice(row, row + rows)


_WithLse = tuple[torch.Tensor, torch.Tensor]


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> _WithLse | None:
    """Output and log-sum-exp from one kernel, or None where no kernel takes the inputs."""
    expanded_mask(mask, query, key)  # refuses what does not fit
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return None
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return None  # a kernel would round it
    bias = None if mask is None else _bias(mask, query, key)
    scale = default_scale(query, scale)
    key, value = (_every_head(x, query) for x in (key, value))
    whole_bias = None if bias is None else bias.expand(*query.shape[:3], -1)
    run = _cuda_kernel if query.is_cuda else _cpu_kernel
    result = run(query, key, value, whole_bias, scale)
    if result is None:
        return None
    out, lse = result
    lse = lse[..., : query.shape[2]]  # some kernels pad it to multiples of 32
    if bias is None:
        return out, lse
    # kernels disagree about rows without a key: torch's on CPU says 0
    empty = (bias == -math.inf).all(-1)
    return out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, -math.inf)


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask as kernels take it: additive, in query's dtype, rows aligned.

    Broadcastable to [B, H, T_q, T_k] and no larger than the mask with all its keys.
    """
    shape = (*[1] * (4 - mask.ndim), *mask.shape[:-1], key.shape[2])
    width = -(-key.shape[2] // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
    bias = query.new_zeros(*shape[:-1], width)[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        bias.masked_fill_(~mask, -math.inf)
    else:
        bias.copy_(mask).masked_fill_(mask <= _MASKED, -math.inf)
    return bias


def _every_head(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values repeated for grouped queries."""
    group = query.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, 1)


def _cpu_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> _WithLse | None:
    if query.device.type != "cpu" or value.shape[-1] != query.shape[-1]:
        return None
    # the kernel reads rows of contiguous elements
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    result: _WithLse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=bias, scale=scale
    )
    return result


def _cuda_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> _WithLse | None:
    forward = _xformers_forward() if bias is None else None
    if forward is not None:
        # xformers wants [B, T, H, D]
        turned = (x.transpose(1, 2) for x in (query, key, value))
        try:
            out, lse = forward(*turned, scale=scale)
        except torch.OutOfMemoryError:  # a RuntimeError, but nothing that another kernel could cure
            raise
        except (NotImplementedError, RuntimeError, ValueError):
            pass  # no operator for this device, dtype or head size; torch's are next
        else:
            return out.transpose(1, 2), lse
    params = torch.backends.cuda.SDPAParams(query, key, value, bias, 0.0, False, False)
    # torch itself pads other head sizes before it calls the flash kernel
    if query.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(params):
        flash = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
        return flash[0], flash[1]
    if torch.backends.cuda.can_use_efficient_attention(params):
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, scale=scale
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
