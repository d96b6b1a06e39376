"""First chunks of prompts on GPUs: FlashAttention on keys and values before they are rounded.

A sequence whose positions are all computed in one step needs nothing from its cache: its keys and
values are there in 16 bit. vLLM's own packed caches attend to such chunks by FlashAttention, and so
does this back end, where FlashAttention can serve a layer; the format allows it (section 12). vLLM
puts such sequences behind all others, so that a step has one place where they begin. What they
become in later steps, when they read their cache, differs by the cache's error.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.fa_utils import (
    get_flash_attn_version,
    is_flash_attn_varlen_func_available,
)

__all__ = ["FirstChunks", "FlashAttention", "find_first_chunks", "flash_attention_for"]

_LARGEST_HEAD = 256
"""What all versions of FlashAttention can serve."""


@dataclass(frozen=True)
class FirstChunks:
    """The last sequences of a step, which begin in it.

    Attributes:
        sequences: how many there are before them.
        tokens: how many tokens those have.
        starts: int32 [first chunks + 1], where each begins and the last one ends, from 0 on.
        count: tokens of the first chunks.
        longest: the most tokens that one of them has.
    """

    sequences: int
    tokens: int
    starts: torch.Tensor
    count: int
    longest: int


def find_first_chunks(common: Any) -> FirstChunks | None:
    """The sequences at the end of a step that have no positions before it; None without any.

    Args:
        common: vLLM's metadata of the step. Its lengths on the host may be too large, but not
            where they are equal to the number of queries: no length is below that.
    """
    lengths = getattr(common, "seq_lens_cpu_upper_bound", None)
    if lengths is None or common.causal is not True:
        return None
    lengths, starts = lengths.tolist(), common.query_start_loc_cpu.tolist()
    last = len(lengths)
    while last and starts[last] == starts[last - 1]:  # places of a batch that nobody has
        last -= 1
    first = last
    while first and starts[first] - starts[first - 1] == lengths[first - 1]:
        first -= 1
    longest = max((starts[i + 1] - starts[i] for i in range(first, last)), default=0)
    if longest <= 1:
        return None
    own = common.query_start_loc[first : last + 1]
    tokens = starts[first]
    return FirstChunks(
        first, tokens, own - tokens if tokens else own, starts[last] - tokens, longest
    )


class FlashAttention:
    """vLLM's FlashAttention, as one layer calls it.

    Args:
        implementation: the layer's attention, whose options it has.
        version: of FlashAttention.
    """

    def __init__(self, implementation: Any, version: int) -> None:
        self._scale = implementation.scale
        self._soft_cap = implementation.logits_soft_cap
        self._window = list(implementation.sliding_window)
        self._version = version

    def attend(
        self,
        chunks: FirstChunks,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attend in first chunks.

        Args:
            chunks: where they are.
            query: float16 or bfloat16 [T, query heads, D], of all tokens of the step, and perhaps
                of more.
            key, value: the same of their heads, as they are before they are stored.
            out: as `query`; rows of first chunks are written.
        """
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        own = slice(chunks.tokens, chunks.tokens + chunks.count)
        flash_attn_varlen_func(
            q=query[own],
            k=key[own],
            v=value[own],
            out=out[own],
            cu_seqlens_q=chunks.starts,
            max_seqlen_q=chunks.longest,
            cu_seqlens_k=chunks.starts,
            max_seqlen_k=chunks.longest,
            softmax_scale=self._scale,
            causal=True,
            window_size=self._window,
            softcap=self._soft_cap,
            fa_version=self._version,
        )

    def try_out(
        self,
        starts: list[int],
        heads: tuple[int, int],
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Attend in zeros, so that what has to be compiled is compiled.

        Args:
            starts: as in :class:`FirstChunks`.
            heads: query heads, and heads of keys and values.
            size: of a head.
            dtype, device: of the model.
        """
        query, key = (
            torch.zeros(starts[-1], each, size, dtype=dtype, device=device) for each in heads
        )
        longest = max(b - a for a, b in pairwise(starts))
        own = torch.tensor(starts, dtype=torch.int32, device=device)
        chunks = FirstChunks(0, 0, own, starts[-1], longest)
        self.attend(chunks, query, key, key, torch.empty_like(query))


def flash_attention_for(implementation: Any) -> FlashAttention | None:
    """FlashAttention for a layer, if it can serve it: else its first chunks read their cache, too.

    Args:
        implementation: the layer's attention.
    """
    plain = (
        implementation.attn_type == AttentionType.DECODER
        and implementation.alibi_slopes is None
        and implementation.sinks is None
        # its keys and values are those of another layer
        and implementation.kv_sharing_target_layer_name is None
        and implementation.head_size <= _LARGEST_HEAD
    )
    if not plain or not is_flash_attn_varlen_func_available():
        return None
    version = get_flash_attn_version(head_size=implementation.head_size)
    return None if version is None else FlashAttention(implementation, version)
