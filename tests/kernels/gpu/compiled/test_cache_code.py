"""The machine code of a KV cache's kernels for GPUs that are not there."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter cannot be compiled", allow_module_level=True)

from benchmarks.lib.machine_code import MMA, compile_kernel, faults
from dialect_kernels.gpu import cache_attention, cache_store, dialect_attention
from dialect_kernels.gpu.cache_attention import _padded_head, _plan_attention

pytestmark = pytest.mark.slow

HEADS, GROUP = 8, 4
DECODING, CHUNK = (4, 4), (512, 2)
"""Queries and sequences."""
OF_FEW_ROWS = r"HMMA\.16816\.F32\.BF16"
"""The matrix instruction of tiles with 16 rows, on every GPU."""
MOST = 11
"""Instructions of the loop for each element that is decoded for a single query."""

CASES = [
    (90, DECODING, 64),
    *((capability, DECODING, size) for capability in (80, 90, 100) for size in (128, 256, 512)),
    *((capability, CHUNK, size) for capability in (80, 90, 100) for size in (256, 512)),
    (90, CHUNK, 128),
]
"""Capability, queries and sequences, head size."""


def compiled(capability, sizes, head_size, group=GROUP):
    plan = _plan_attention(*sizes, HEADS, group, head_size, 132)
    absent = ("p_causal", "p_slopes", "p_sinks", "p_key_mean", "p_value_mean")
    if plan.splits == 1:
        absent += ("p_partial", "p_extremes")
    constants = {
        "SCALE": head_size**-0.5, "SOFT_CAP": 0.0, "CAUSAL": 1, "BLOCK_TOKENS": 16, "D": head_size,
        "DP": _padded_head(head_size), "GROUP": group, "BM": plan.rows, "TILE": plan.tile,
        "SPLIT": plan.splits > 1, "ROTATED": True, "ASM": True, **dict.fromkeys(absent),
    }  # fmt: skip
    pointers = {
        "p_query": "*bf16", "p_cache": "*u8", "p_key_table": "*i64", "p_value_table": "*i64",
        "p_start": "*i32", "p_lengths": "*i32", "p_blocks": "*i32", "p_out": "*bf16",
        "p_extremes": "*fp32",
    }  # fmt: skip
    kernel = cache_attention._attend_kernel
    return plan, compile_kernel(kernel, capability, constants, pointers, plan.num_warps)


def compiled_with_rounding(capability, sizes, head_size, eight_bits):
    plan = _plan_attention(*sizes, HEADS, GROUP, head_size, 132, dialect_attention=True)
    absent = ("p_causal", "p_slopes", "p_sinks", "p_key_mean", "p_value_mean")
    if plan.splits == 1:
        absent += ("p_partial", "p_extremes")
    constants = {
        "SCALE": head_size**-0.5, "SOFT_CAP": 0.0, "CAUSAL": 1, "BLOCK_TOKENS": 16, "D": head_size,
        "DP": _padded_head(head_size), "GROUP": GROUP, "BM": plan.rows, "SPLIT": plan.splits > 1,
        "ROTATED": True, "EIGHT": eight_bits, "ASM": True, **dict.fromkeys(absent),
    }  # fmt: skip
    pointers = {
        "p_query": "*bf16", "p_cache": "*u8", "p_table": "*i64", "p_book": "*i32",
        "p_start": "*i32", "p_lengths": "*i32", "p_blocks": "*i32", "p_out": "*bf16",
        "p_extremes": "*fp32",
    }  # fmt: skip
    kernel = dialect_attention.attend_kernel
    return compile_kernel(kernel, capability, constants, pointers, plan.num_warps)


@pytest.mark.parametrize(("capability", "sizes", "head_size"), CASES)
def test_rows_are_decoded_in_registers(capability, sizes, head_size):
    plan, code = compiled(capability, sizes, head_size)
    mma = MMA[False][capability] if plan.rows >= 64 else OF_FEW_ROWS
    assert faults(code, capability, mma) == []
    if plan.rows == 16:
        elements = 2 * plan.tile * head_size / (32 * plan.num_warps)
        assert len(code.main_loop()) / elements <= MOST


@pytest.mark.parametrize(
    ("capability", "sizes", "head_size"),
    [
        *((capability, DECODING, size) for capability in (80, 89, 90, 100) for size in (64, 128)),
        *((capability, CHUNK, 128) for capability in (80, 90)),
    ],
)
def test_queries_and_probabilities_are_rounded_in_registers(capability, sizes, head_size):
    eight_bits = capability == 89
    code = compiled_with_rounding(capability, sizes, head_size, eight_bits)
    mma = MMA[True][capability] if eight_bits else OF_FEW_ROWS
    assert faults(code, capability, mma) == []


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("head_size", [256, 512])
def test_many_queries_may_share_a_large_head(head_size, capability):
    plan, code = compiled(capability, DECODING, head_size, group=32)
    assert plan.rows == 32
    assert faults(code, capability, OF_FEW_ROWS) == []


@pytest.mark.parametrize("capability", [80, 90])
def test_storing_needs_no_memory_but_its_rows(capability):
    constants = {
        "D": 128, "CHUNK": 128, "ROTATED": True, "ASM": True, "p_key_mean": None,
        "p_value_mean": None,
    }  # fmt: skip
    pointers = {"p_key": "*bf16", "p_value": "*bf16", "p_slots": "*i64", "p_cache": "*u8"}
    kernel = cache_store._store_kernel
    code = compile_kernel(kernel, capability, constants, pointers, num_warps=1)
    assert not faults(code, capability)
    assert code.operations["PRMT"]
