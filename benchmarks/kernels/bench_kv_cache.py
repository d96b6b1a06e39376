"""Attention over a 4-bit cache against vLLM's attention over a bfloat16 one, on the CPU.

One query token of one sequence (decoding), and a chunk of 512 (prefill), for 8 key/value heads with
4 query heads each; blocks of 128 tokens, scattered. vLLM's schedule of its work is part of its
time, as it is in its engine.

    python -m benchmarks.kernels.bench_kv_cache
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dialect_kernels import cpu, reference_attention
from dialect_kernels.cached_attention import attend, store
from dialect_kernels.kv_cache import Context, KvCache, Scoring, slot_bytes

from ..lib.gate import golden_faults
from ..lib.harness import Table, main, ratio, time_calls

PACKAGES = ("torch", "vllm")
HEADS, GROUP, BLOCK = 8, 4, 128
HEAD_SIZES = (64, 128)
DECODING = (4096, 16384)
CHUNK = 512
GOALS = {4096: 1.0, 16384: 1.5}
"""Decoding: context -> how many times as fast as bfloat16."""


def gate() -> list[str]:
    """Where the kernel differs from the reference."""
    if not cpu.available():
        return [f"there is no kernel: {cpu.why_not()}"]
    faults = golden_faults("cpu")
    for head_size in HEAD_SIZES:
        cache, query, context, _, rows = _case(head_size, 300, 2)
        stored = cache.slots.clone()
        reference_attention.store(cache, *rows)
        if not torch.equal(stored, cache.slots):
            faults.append(f"store, head size {head_size}: differs from the reference")
        scoring = Scoring(head_size**-0.5)
        want = reference_attention.attend(cache, query, context, scoring).float()
        got = attend(cache, query, context, scoring).float()
        if not float((got - want).abs().max()) < 2**-7 * float(want.abs().max()):
            faults.append(f"attend, head size {head_size}: differs from the reference")
    return faults


def measure() -> dict[str, Any]:
    """Milliseconds per layer, and ratios, by head size."""
    from dialect_plugin.vllm.compat import permit_amx

    permit_amx()
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "instructions": cpu.features(),
        "heads": HEADS,
        "group": GROUP,
    }
    for head_size in HEAD_SIZES:
        rows = {f"decoding, {length:,}": _times(head_size, length, 1) for length in DECODING}
        rows[f"prompt, {CHUNK}"] = _times(head_size, CHUNK, CHUNK)
        found[str(head_size)] = rows
    return found


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``attention``: a row for each head size and context."""
    rows = [["head size", "tokens", "bfloat16", "4 bit", "times as fast", "goal"]]
    for head_size in map(str, HEAD_SIZES):
        for name, one in figures[head_size].items():
            goal = GOALS.get(int(name.split(", ")[1].replace(",", "")))
            rows.append(
                [
                    head_size,
                    name,
                    f"{one['bfloat16_ms']:.2f} ms",
                    f"{one['dialect_ms']:.2f} ms",
                    f"{one['times']:.2f} x ({one['times_lowest']:.2f}–{one['times_highest']:.2f})",
                    f"{goal:.1f} x" if goal and name.startswith("decoding") else "–",
                ]
            )
    return {"attention": rows}


def _case(head_size: int, length: int, queries: int) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(0)
    blocks = -(-length // BLOCK)
    memory = torch.zeros(blocks, HEADS, BLOCK, slot_bytes(head_size), dtype=torch.uint8)
    cache = KvCache(memory, head_size)
    table = torch.randperm(blocks, generator=draw).to(torch.int32)[None]
    position = torch.arange(length)
    slots = table[0].long()[position // BLOCK] * BLOCK + position % BLOCK
    shape = (length, HEADS, head_size)
    key, value = (torch.randn(shape, generator=draw).bfloat16() for _ in range(2))
    store(cache, key, value, slots)
    query = torch.randn(queries, HEADS * GROUP, head_size, generator=draw).bfloat16()
    lengths = torch.tensor([length], dtype=torch.int32)
    context = Context(torch.tensor([0, queries], dtype=torch.int32), lengths, table)
    dense = torch.zeros(blocks, HEADS, 2 * BLOCK, head_size, dtype=torch.bfloat16)
    for part, x in enumerate((key, value)):
        dense[slots // BLOCK, :, part * BLOCK + slots % BLOCK] = x
    return cache, query, context, dense, (key, value, slots)


def _times(head_size: int, length: int, queries: int) -> dict[str, float]:
    cache, query, context, dense, _ = _case(head_size, length, queries)
    scoring, out = Scoring(head_size**-0.5), torch.empty_like(query)
    calls: dict[str, Callable[[], object]] = {
        "bfloat16": _vllm(query, context, dense, torch.empty_like(query)),
        "dialect": lambda: attend(cache, query, context, scoring, out),
    }
    timings = time_calls(calls, rounds=41, warmup=3)
    times = ratio(timings["bfloat16"], timings["dialect"])
    return {
        "bfloat16_ms": 1e3 * timings["bfloat16"].median_s,
        "dialect_ms": 1e3 * timings["dialect"].median_s,
        "times": times.median_s,
        "times_lowest": times.fastest_s,
        "times_highest": times.slowest_s,
    }


def _vllm(
    query: torch.Tensor, context: Context, dense: torch.Tensor, out: torch.Tensor
) -> Callable[[], object]:
    """vLLM's attention, with the schedule that its engine makes for every step."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    head_size = query.shape[2]
    key, value = dense.chunk(2, dim=2)
    isa = _get_attn_isa(torch.bfloat16, BLOCK, head_size, "auto")

    def call() -> None:
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=HEADS * GROUP,
            num_kv_heads=HEADS,
            head_dim=head_size,
            seq_lens=context.lengths,
            dtype=torch.bfloat16,
            query_start_loc=context.query_start,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
            dynamic_causal=None,
            kv_cache_dtype="auto",
        )
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key,
            value_cache=value,
            output=out,
            query_start_loc=context.query_start,
            seq_lens=context.lengths,
            scale=head_size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=context.block_table,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )

    return call


if __name__ == "__main__":
    main(gate, measure)
