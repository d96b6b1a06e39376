"""The GPU back end: Triton kernels, launched on the GPU that holds the tensors.

Triton is imported by the first call that needs it. With ``TRITON_INTERPRET=1`` the kernels also run
on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from .. import reference
from ..backend import BlockGrid, Decoded, Quantized, Weights
from ..formatbook import Formatbook, Rotation
from ..kv_cache import Context, KvCache, Scoring
from ..packed import PackedTensor
from ..packed_experts import PackedExperts
from ..rotation import rotate_weight

__all__ = [
    "attend",
    "covers",
    "decode_ahead",
    "dequantize",
    "dialect_linear",
    "embedding",
    "feed_back",
    "grouped_linear",
    "linears",
    "quantize",
    "quantize_counted",
    "rounding_loss",
    "runs_on",
    "semantic_linear",
    "store",
    "warm_up",
    "warm_up_cache",
    "warm_up_experts",
]

_log = logging.getLogger(__name__)


def runs_on(device: torch.device) -> bool:
    """Whether `device` is a GPU of compute capability 8.0, or the CPU of Triton's interpreter."""
    if not _may_run_on(device):
        return False
    from . import linear

    return linear.runs_on(device)


def covers(x: torch.Tensor, p: PackedTensor, activation_format: str, accumulation: str) -> bool:
    """Whether the kernels compute this product; see :func:`dialect_kernels.gpu.linear.covers`."""
    if not _may_run_on(x.device):
        return False
    from . import linear

    return linear.covers(x, p, activation_format, accumulation)


def quantize(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int,
    rotation: Rotation,
) -> PackedTensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    from . import quantize_packed

    with _current(x.device):
        return quantize_packed.quantize_weight(x, book, block_size, rule, window, rotation)


def quantize_counted(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int,
    rotation: Rotation,
) -> Quantized:
    """See :class:`~dialect_kernels.backend.Backend`; torch counts the blocks."""
    packed = quantize(x, book, block_size, rule, window, rotation)
    rounded = rotate_weight(x, rotation)
    return Quantized(packed, reference.blocks_below_window(rounded, block_size, window))


def dequantize(p: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`; torch decodes."""
    return p.dequantize(dtype)


def embedding(ids: torch.Tensor, p: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`; rows that are not there are NaN."""
    from . import rows

    with _current(p.device):
        return rows.gather(ids, p, dtype)


def rounding_loss(x: torch.Tensor, p: PackedTensor) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`; torch computes it."""
    return reference.rounding_loss(x, p)


def feed_back(
    block: torch.Tensor,
    factor: torch.Tensor,
    grid: BlockGrid,
    book: Formatbook,
    errors: torch.Tensor,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`; torch computes it."""
    return reference.feed_back(block, factor, grid, book, errors)


def dialect_linear(
    tokens: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
    decoded: Decoded | None = None,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`."""
    from . import linear

    with _current(tokens.device):
        return linear.dialect_linear(tokens, p, bias, activation_format, accumulation, decoded)


def decode_ahead(
    p: PackedTensor, activation_format: str, dtype: torch.dtype, into: Decoded | None
) -> Decoded | None:
    """See :func:`dialect_kernels.gpu.linear.decode_ahead`."""
    from . import linear

    with _current(p.device):
        return linear.decode_ahead(p, activation_format, dtype, into)


def grouped_linear(
    tokens: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    experts: PackedExperts,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`; never waits for the GPU."""
    from . import grouped

    with _current(tokens.device):
        return grouped.grouped_linear(
            tokens, rows, offsets, experts, bias, activation_format, accumulation
        )


def semantic_linear(
    tokens: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`; never waits for the GPU."""
    from . import linear

    with _current(tokens.device):
        return linear.semantic_linear(tokens, p, bias, salient, group)


def linears(
    tokens: torch.Tensor,
    weights: Weights,
    activation_format: str,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
) -> list[torch.Tensor]:
    """See :class:`~dialect_kernels.backend.Backend`; never waits for the GPU."""
    from . import linear

    with _current(tokens.device):
        return linear.linears(tokens, weights, activation_format, salient, group)


def store(cache: KvCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """See :func:`dialect_kernels.cached_attention.store`; slots begin at even addresses."""
    from . import cache_store

    _check_even(cache)
    with _current(cache.slots.device):
        cache_store.store(cache, key, value, slots)


def attend(
    cache: KvCache,
    query: torch.Tensor,
    context: Context,
    scoring: Scoring,
    out: torch.Tensor | None,
    dialect_attention: bool = False,
) -> torch.Tensor:
    """See :func:`dialect_kernels.cached_attention.attend`; slots begin at even addresses."""
    from . import cache_attention

    _check_even(cache)
    with _current(query.device):
        return cache_attention.attend(
            cache, query, context, scoring, out, dialect_attention=dialect_attention
        )


def warm_up_cache(
    cache: KvCache,
    heads: int,
    dtype: torch.dtype,
    scoring: Scoring,
    dialect_attention: bool = False,
) -> None:
    """See :func:`dialect_kernels.cached_attention.warm_up`."""
    from . import cache_attention, cache_store

    with _current(cache.slots.device):
        rows = torch.zeros(1, cache.heads, cache.head_size, dtype=dtype, device=cache.slots.device)
        slot = torch.zeros(1, dtype=torch.int64, device=cache.slots.device)
        cache_store.store(cache, rows, rows, slot)
        cache_attention.warm_up(cache, heads, dtype, scoring, dialect_attention)


def warm_up(
    p: PackedTensor,
    activation_format: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    decoded: Decoded | None = None,
) -> None:
    """See :func:`dialect_kernels.gpu.linear.warm_up`."""
    from . import linear

    with _current(p.device):
        linear.warm_up(p, activation_format, dtype, bias_dtype, decoded)


def warm_up_experts(
    experts: PackedExperts,
    activation_format: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    """See :func:`dialect_kernels.gpu.grouped.warm_up`."""
    from . import grouped

    with _current(experts.device):
        grouped.warm_up(experts, activation_format, dtype, bias_dtype)


def _check_even(cache: KvCache) -> None:
    """Raise ValueError unless slots begin at even addresses: kernels move two bytes at a time."""
    slots = cache.slots
    if slots.data_ptr() % 2 or any(stride % 2 for stride in slots.stride()[:3]):
        raise ValueError(
            f"slots: begin at {slots.data_ptr()} with strides {slots.stride()}; on a GPU all but "
            "the last must be even: leave an even number of bytes between slots"
        )


def _may_run_on(device: torch.device) -> bool:
    """Whether there are kernels for this kind of device."""
    on_gpu = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return on_gpu and _triton_imports()


@cache
def _triton_imports() -> bool:
    try:
        from . import linear  # noqa: F401 (whether it can be imported)
    except ImportError as error:  # torch without Triton
        _log.warning("no GPU kernels: %s", error)
        return False
    return True


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: Triton launches there, wherever a kernel's tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
