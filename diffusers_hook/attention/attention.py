"""One attention: queries, keys and mask, the logits, and their log-sum-exp without the full map.

Everything here takes CPU and CUDA tensors in float32, bfloat16 or float16, computes in float32 and
does not wait for the device. Logits are computed by an attention kernel, or in tiles of at most
``_TILE_ELEMENTS`` (or of one query row of one head, where that is more), so that peak memory does
not grow with T x T.

Masks are those of ``torch.nn.functional.scaled_dot_product_attention``: bool (True takes part) or
additive, broadcastable to [B, H, T_q, T_k]. Additive values of -8192 and below count as -inf:
"masked" is written as -inf, as the dtype's lowest number or as -10000 in practice. A query row
with every key masked attends to nothing: its weights are zeros, not NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

__all__ = ["Attention", "masked_logits", "probabilities"]

_TILE_ELEMENTS = 1 << 23
"""Logits computed at a time: 32 MiB in float32, and about three such temporaries."""
_TILE_QUERIES = 256
"""Query rows of a tile, at most: keeps a tile well below the full map for short sequences too."""
_MASKED = -8192.0
"""Additive mask values from here down are -inf; above bfloat16's nearest to -10000, -9984."""
_BIAS_ALIGNMENT = 16
"""Elements: the memory-efficient kernel reads rows of a bias that start at multiples of it."""


@dataclass(frozen=True, eq=False)
class Attention:
    """The inputs of one attention, as they enter its softmax; :meth:`checked` makes one.

    Attributes:
        query: [B, H, T_q, D]; nothing here is differentiable.
        key: [B, H, T_k, D]; fewer heads are allowed where they divide H (grouped queries).
        mask: None or broadcastable to [B, H, T_q, T_k]; see the module's text.
        scale: factor of the logits.
        lse: float32 [B, H, T_q], the log-sum-exp of every query's logits, -inf where every key is
            masked; None where it has not been computed.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    lse: torch.Tensor | None = None

    @classmethod
    def checked(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
        lse: torch.Tensor | None = None,
    ) -> Attention:
        """An attention whose parts fit together.

        Args:
            query, key, mask, lse: see the class.
            scale: default ``1 / sqrt(D)``.

        Raises:
            ValueError: if shapes do not fit.
        """
        _check_tokens(query, key)
        if mask is not None:
            _check_mask(mask, (*query.shape[:3], key.shape[2]))
        if lse is not None and lse.shape != query.shape[:3]:
            raise ValueError(
                f"lse: has shape {list(lse.shape)}, but query needs {list(query.shape[:3])}; "
                "pass one value per query row"
            )
        return cls(query, key, mask, query.shape[-1] ** -0.5 if scale is None else scale, lse)

    @property
    def whole_mask(self) -> torch.Tensor | None:
        """The mask as a [B, H, T_q, T_k] view that takes no memory."""
        if self.mask is None:
            return None
        return self.mask.expand(*self.query.shape[:3], self.key.shape[2])

    @torch.no_grad()
    def with_lse(self) -> Attention:
        """The same attention with the log-sum-exp of its logits.

        An attention kernel computes it, and its output is thrown away: it costs as much as the
        attention. Where no kernel takes the inputs, :meth:`tiled_lse` does half the
        multiplications but is slower.
        """
        if self.lse is not None:
            return self
        lse = _kernel_lse(self)
        return replace(self, lse=self.tiled_lse() if lse is None else lse)

    @torch.no_grad()
    def tiled_lse(self) -> torch.Tensor:
        """``logsumexp(q k^T * scale + mask)`` over the keys, tile by tile, float32 [B, H, T_q]."""
        lse = torch.empty(self.query.shape[:3], dtype=torch.float32, device=self.query.device)
        with torch.autocast(self.query.device.type, enabled=False):
            for heads, rows, logits in self.tiles():
                lse[:, heads, rows] = logits.logsumexp(-1)
        return lse

    def every(self, step: int) -> Attention:
        """The attention of every `step`-th query, from the first one on."""
        mask = self.whole_mask
        return replace(
            self,
            query=self.query[:, :, ::step],
            mask=None if mask is None else mask[:, :, ::step],
            lse=None if self.lse is None else self.lse[:, :, ::step],
        )

    def tiles(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """The masked logits in tiles: (heads, query rows, float32 [B, heads, rows, T_k])."""
        mask = self.whole_mask
        kv_heads, queries = self.key.shape[1], self.query.shape[2]
        group = self.query.shape[1] // kv_heads
        per_row = max(1, self.key.shape[0] * group * self.key.shape[2])
        rows = max(1, min(queries, _TILE_QUERIES, _TILE_ELEMENTS // per_row))
        step = max(1, _TILE_ELEMENTS // (per_row * rows))
        for first in range(0, kv_heads, step):
            last = min(first + step, kv_heads)
            heads = slice(first * group, last * group)
            for row in range(0, queries, rows):
                part = slice(row, row + rows)
                logits = self._product(self.query[:, heads, part], self.key[:, first:last])
                yield (
                    heads,
                    part,
                    masked_logits(logits, None if mask is None else mask[:, heads, part]),
                )

    def _product(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """float32 [B, heads, rows, T_k]; grouped queries become rows of their key head."""
        batch, heads, rows, size = query.shape
        folded = (query.float() * self.scale).reshape(batch, key.shape[1], -1, size)
        return (folded @ key.float().mT).view(batch, heads, rows, key.shape[2])


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


def _check_tokens(query: torch.Tensor, key: torch.Tensor) -> None:
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


def _check_mask(mask: torch.Tensor, shape: tuple[int, ...]) -> None:
    try:
        mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"mask: has shape {list(mask.shape)}, which does not broadcast to {list(shape)}, "
            "that is [batch, heads, queries, keys]"
        ) from None


def _kernel_lse(attention: Attention) -> torch.Tensor | None:
    """The log-sum-exp from one kernel, or None where no kernel takes the inputs.

    The keys stand for the values: the output is not used.
    """
    query, key, mask = attention.query, attention.key, attention.mask
    if query.numel() == 0 or key.numel() == 0:
        return None
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return None  # a kernel would round it
    bias = None if mask is None else _bias(mask, query, key)
    key = _every_head(key, query)
    whole_bias = None if bias is None else bias.expand(*query.shape[:3], -1)
    run = _cuda_kernel if query.is_cuda else _cpu_kernel
    lse = run(query, key, whole_bias, attention.scale)
    if lse is None:
        return None
    lse = lse[..., : query.shape[2]]  # some kernels pad it to multiples of 32
    if bias is None:
        return lse
    # kernels disagree about rows without a key: torch's on CPU says 0
    return lse.masked_fill((bias == -math.inf).all(-1), -math.inf)


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


def _every_head(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys repeated for grouped queries."""
    group = query.shape[1] // key.shape[1]
    return key if group == 1 else key.repeat_interleave(group, 1)


def _cpu_kernel(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor | None:
    if query.device.type != "cpu":
        return None
    # the kernel reads rows of contiguous elements
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, key, attn_mask=bias, scale=scale
    )
    found: torch.Tensor = lse
    return found


def _cuda_kernel(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor | None:
    """xformers, if it is installed and runs here (not for masks), then torch's own kernels."""
    forward = _xformers_forward() if bias is None else None
    if forward is not None:
        # xformers wants [B, T, H, D]
        turned = [x.transpose(1, 2) for x in (query, key, key)]
        try:
            _, lse = forward(*turned, scale=scale)
        except torch.OutOfMemoryError:  # a RuntimeError, but nothing that another kernel could cure
            raise
        except (NotImplementedError, RuntimeError, ValueError):
            pass  # no operator for this device, dtype or head size; torch's are next
        else:
            found: torch.Tensor = lse
            return found
    params = torch.backends.cuda.SDPAParams(query, key, key, bias, 0.0, False, False)
    # torch itself pads other head sizes before it calls the flash kernel
    if query.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(params):
        flash = torch.ops.aten._scaled_dot_product_flash_attention(query, key, key, scale=scale)
        return flash[1]
    if torch.backends.cuda.can_use_efficient_attention(params):
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, key, bias, True, scale=scale
        )
        return efficient[1]
    return None


@cache
def _xformers_forward() -> Any:
    """xformers' attention with log-sum-exp, or None. For CUDA only: it has nothing else.

    ``xformers.info`` calls kernels available that cannot be called, so the caller tries.
    """
    try:
        from xformers.ops import memory_efficient_attention_forward_requires_grad
    except (ImportError, OSError):  # OSError: built for another torch or CUDA
        return None
    return memory_efficient_attention_forward_requires_grad
