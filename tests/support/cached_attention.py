"""Sequences in a dialect cache, and what attention over them gives, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dialect_kernels import SEMANTIC_32, reference_attention
from dialect_kernels.kv_cache import Context, KvCache, Scoring, slot_bytes
from dialect_kernels.reference import round_activation
from dialect_kernels.rotation import rotate_activation


@dataclass(frozen=True)
class Case:
    """Sequences in scattered blocks of a cache whose other bytes are random.

    Attributes:
        slots: int64 [all positions], of one sequence after the other.
        key, value: [all positions, heads, D], not stored yet.
    """

    cache: KvCache
    key: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor
    query: torch.Tensor
    context: Context

    def stored(self) -> Case:
        """The same with keys and values stored by the reference, in a cache of its own."""
        case = replace(self, cache=replace(self.cache, slots=self.cache.slots.clone()))
        reference_attention.store(case.cache, self.key, self.value, self.slots)
        return case


def make(
    head_size: int,
    group: int,
    sequences: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    block: int = 16,
    means: bool = False,
    rotated: bool = True,
    causal: torch.Tensor | bool = True,
    seed: int = 0,
) -> Case:
    """Sequences of (queries, positions)."""
    draw = torch.Generator().manual_seed(seed)
    blocks = [-(-length // block) for _, length in sequences]
    shape = (sum(blocks) + 2, heads, block, slot_bytes(head_size))
    memory = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    memory[..., -2:] = 128  # unwritten slots read as NaN: whoever multiplies them by 0 shows it
    order = torch.randperm(shape[0], generator=draw).to(torch.int32)
    table = torch.zeros(len(sequences), max(blocks), dtype=torch.int32)
    slots = []
    for sequence, (_, length) in enumerate(sequences):
        first = sum(blocks[:sequence])
        table[sequence, : blocks[sequence]] = order[first : first + blocks[sequence]]
        position = torch.arange(length)
        slots.append(table[sequence].long()[position // block] * block + position % block)
    count, queries = sum(n for _, n in sequences), sum(n for n, _ in sequences)

    def rows(*shape: int) -> torch.Tensor:
        channels = torch.exp(0.5 * torch.randn(shape[-1], generator=draw))
        return (torch.randn(*shape, generator=draw) * channels).to(dtype)

    mean = torch.randn(heads, head_size, generator=draw).bfloat16().float() if means else None
    cache = KvCache(memory, head_size, rotated, mean, None if mean is None else mean.flip(1))
    starts = torch.tensor([0] + [n for n, _ in sequences]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([length for _, length in sequences], dtype=torch.int32)
    key, value = rows(count, heads, head_size), rows(count, heads, head_size)
    query = rows(queries, heads * group, head_size)
    context = Context(starts, lengths, table, causal)
    return Case(cache, key, value, torch.cat(slots), query, context)


def expected(case: Case, scoring: Scoring) -> torch.Tensor:
    """Plain attention in float64 over the rows as they were before rotation and means."""
    cache, out, at = case.cache, [], 0
    group = case.query.shape[1] // cache.heads
    starts = case.context.query_start.tolist()
    for sequence, length in enumerate(case.context.lengths.tolist()):
        rows = reference_attention.read(cache, case.slots[at : at + length])
        at += length
        key, value = (rotate_activation(x) if cache.rotated else x for x in rows)
        key = key.double() + (0 if cache.key_mean is None else cache.key_mean.double())
        value = value.double() + (0 if cache.value_mean is None else cache.value_mean.double())
        causal = case.context.causal
        causal = bool(causal[sequence]) if isinstance(causal, torch.Tensor) else causal
        for number in range(starts[sequence], starts[sequence + 1]):
            own = length - starts[sequence + 1] + number
            seen = [
                p
                for p in range(length)
                if (p <= own or not causal)
                and (not scoring.window or abs(p - own) < scoring.window)
            ]
            q, k = case.query[number].double(), key[seen].repeat_interleave(group, dim=1)
            score = torch.einsum("khd,hd->hk", k, q) * scoring.scale
            if scoring.soft_cap:
                score = scoring.soft_cap * torch.tanh(score / scoring.soft_cap)
            if scoring.slopes is not None:
                score += scoring.slopes.double()[:, None] * (torch.tensor(seen) - own)
            sink = torch.full((len(score), 1), -math.inf, dtype=torch.float64)
            if scoring.sinks is not None:
                sink = scoring.sinks.double()[:, None]
            weight = torch.softmax(torch.cat([score, sink], dim=1), dim=1)[:, :-1]
            v = value[seen].repeat_interleave(group, dim=1)
            out.append(torch.einsum("hk,khd->hd", weight, v))
    if not out:
        return torch.empty(case.query.shape, dtype=torch.float64)
    return torch.stack(out).view(case.query.shape)


def expected_in_dialects(case: Case, scoring: Scoring) -> torch.Tensor:
    """The full path of section 12 in float64, from its definition; causal, without slopes."""
    cache, out, at = case.cache, [], 0
    group = case.query.shape[1] // cache.heads
    starts = case.context.query_start.tolist()
    for sequence, length in enumerate(case.context.lengths.tolist()):
        slots = case.slots[at : at + length]
        at += length
        key, value = (x.repeat_interleave(group, 1) for x in reference_attention.read(cache, slots))
        r = cache.slots[slots // cache.block_tokens, :, slots % cache.block_tokens, -1].contiguous()
        r = r.view(torch.int8).double().repeat_interleave(group, 1)
        for number in range(starts[sequence], starts[sequence + 1]):
            own = length - starts[sequence + 1] + number
            first = max(0, own - scoring.window + 1) if scoring.window else 0
            query = case.query[number].float()
            rotated = rotate_activation(query) if cache.rotated else query
            score = torch.einsum("khd,hd->hk", key.double(), in_dialects(rotated)) * scoring.scale
            if cache.key_mean is not None and (scoring.soft_cap or scoring.sinks is not None):
                mean = cache.key_mean.repeat_interleave(group, 0)
                score += (query * mean).double().sum(-1, keepdim=True) * scoring.scale
            if scoring.soft_cap:
                score = scoring.soft_cap * torch.tanh(score / scoring.soft_cap)
            score = score[:, first : own + 1] * math.log2(math.e)
            weight = torch.exp2(score - score.amax(1, keepdim=True).ceil())
            total = seen = weight.sum(1, keepdim=True)
            if scoring.sinks is not None:
                sink = scoring.sinks.double()[:, None] * math.log2(math.e)
                total = total + torch.exp2(sink - score.amax(1, keepdim=True).ceil())
            product = 0
            for chunk in range(first // 128, own // 128 + 1):
                keys = range(max(first, 128 * chunk), min(own + 1, 128 * chunk + 128))
                row = torch.zeros(len(weight), 128, dtype=torch.float64)
                place = slice(keys.start % 128, keys.start % 128 + len(keys))
                row[:, place] = weight[:, keys.start - first : keys.stop - first]
                exponent = r[keys.start : keys.stop].T  # [query heads, keys]
                most = exponent.amax(1, keepdim=True)
                row[:, place] *= torch.exp2(exponent - most)
                unit = value[keys.start : keys.stop].double() * torch.exp2(-exponent.T)[:, :, None]
                rounded = in_dialects(row.float())[:, place]
                product += torch.einsum("hk,khd->hd", rounded, unit) * torch.exp2(most)
            product /= total
            if cache.rotated:
                product = rotate_activation(product.float()).double()
            if cache.value_mean is not None:
                product += cache.value_mean.repeat_interleave(group, 0) * (seen / total)
            out.append(product)
    return torch.stack(out)


def in_dialects(rows: torch.Tensor) -> torch.Tensor:
    """Rows rounded by rule ``lut``, window 13, as those of a linear layer are, in float64."""
    return round_activation(rows, SEMANTIC_32, 32).double()


def rows_of_all_kinds(count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary rows, zeros, NaN, Inf, tiny and outlying numbers, and one that overflows."""
    draw = torch.Generator().manual_seed(columns)
    x = torch.randn(count, columns, generator=draw)
    x *= torch.exp(2 * torch.randn(columns, generator=draw))
    x[1] = 0
    x[2, 0], x[3, -1], x[4, 5] = math.nan, math.inf, -math.inf
    x[5] *= 1e-30
    x[6, ::7] *= 2.0**14
    x = x.to(dtype)
    x[7] = torch.finfo(dtype).max
    return x
