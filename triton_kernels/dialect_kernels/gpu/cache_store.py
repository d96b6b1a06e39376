"""Storing keys and values in a dialect KV cache on a GPU (layout: :mod:`dialect_kernels.kv_cache`).

A program rounds the key and the value of one token in one head, each a row of the 32-dialect book,
and writes them into the token's slot: mean, rotation, exponent and codes stay in registers.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formatbook import NAN_ROW
from ..kv_cache import CACHE_BLOCK, CACHE_BOOK, CACHE_WINDOW, KvCache
from .launch import launch
from .layout import interpreted, readable
from .quantize_packed import round_online, store_blocks
from .rotation import load_weight
from .rounding import block_largest, book_table, row_exponent

__all__ = ["store"]

_NAN_ROW = tl.constexpr(NAN_ROW)
_BLOCK = tl.constexpr(CACHE_BLOCK)
_WINDOW = tl.constexpr(CACHE_WINDOW)
_DIALECTS = tl.constexpr(len(CACHE_BOOK))
_ID_BITS = tl.constexpr(CACHE_BOOK.id_bits)


@triton.jit
def _store_row(
    p_row,
    p_mean,
    p_codes,
    p_meta,
    p_exponent,
    p_book,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Round a key or a value [D] and write it."""
    b_x = load_weight(p_row, 0, D, _BLOCK, CHUNK, ROTATED, p_mean)
    exponent, finite = row_exponent(tl.max(block_largest(b_x), axis=0))
    b_x = tl.where(finite != 0, b_x, 0.0)
    found = round_online(b_x, exponent, _WINDOW, p_book, _ID_BITS, _DIALECTS, ASM)
    o_block = tl.arange(0, CHUNK // _BLOCK)
    store_blocks(p_codes, p_meta, found, o_block, D // _BLOCK, _BLOCK, ASM)
    stored = tl.where(finite != 0, exponent, _NAN_ROW)
    tl.store(p_exponent, stored.to(tl.int8).to(tl.uint8, bitcast=True))


@triton.jit(
    do_not_specialize=[
        "key_token", "key_head", "value_token", "value_head", "block_stride", "head_stride",
        "token_stride", "block_tokens",
    ]
)  # fmt: skip
def _store_kernel(
    p_key,
    p_value,
    p_slots,
    p_cache,
    p_book,
    p_key_mean,
    p_value_mean,
    key_token,
    key_head,
    value_token,
    value_head,
    block_stride,
    head_stride,
    token_stride,
    block_tokens,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (T, heads); see the slot's layout for the offsets."""
    i_token = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    slot = tl.load(p_slots + i_token)
    if slot >= 0:
        p_slot = p_cache + slot // block_tokens * block_stride + i_head * head_stride
        p_slot += slot % block_tokens * token_stride
        p_exponents = p_slot + D + D // 16
        p_row = p_key + i_token * key_token + i_head * key_head
        if p_key_mean is not None:
            p_key_mean += i_head * D
        _store_row(
            p_row, p_key_mean, p_slot, p_slot + D, p_exponents, p_book, D, CHUNK, ROTATED, ASM
        )
        p_row = p_value + i_token * value_token + i_head * value_head
        if p_value_mean is not None:
            p_value_mean += i_head * D
        p_meta = p_slot + D + D // _BLOCK
        _store_row(
            p_row, p_value_mean, p_slot + D // 2, p_meta, p_exponents + 1, p_book, D, CHUNK,
            ROTATED, ASM,
        )  # fmt: skip


def store(cache: KvCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """See :func:`dialect_kernels.cached_attention.store`; arguments are checked there.

    Rows of keys and values may lie anywhere, their elements one behind the other.
    """
    if not key.shape[0]:
        return
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    memory, size = cache.slots, cache.head_size
    launch(
        _store_kernel,
        (key.shape[0], cache.heads),
        (
            key, value, readable(slots), memory, book_table(CACHE_BOOK, memory.device),
            cache.key_mean, cache.value_mean, *key.stride()[:2], *value.stride()[:2],
            *memory.stride()[:3], cache.block_tokens,
        ),
        {
            "D": size,
            "CHUNK": 1 << (size - 1).bit_length(),
            "ROTATED": cache.rotated,
            "ASM": not interpreted(),
        },
        num_warps=1,
    )  # fmt: skip
