"""What the library reaches: its FP8 products in each mode, bfloat16, and a copy. No Triton in it.

The mode decides what a layer for many tokens can reach: with a scale for each row and slow
accumulation, as this project's products need them, or with less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from ..kernels.random_data import random_tokens, random_weight
from ..lib.gpu_timing import measure_ceilings, microseconds, time_graphs
from ..lib.shapes import LLAMA_8B
from .records import Work

__all__ = ["measure"]

_TOKENS = (512, 4096, 16384)
_COPIES = 2


def measure(work: Work) -> None:
    """One line for each layer of LLaMA-3-8B and number of tokens, the largest question first."""
    ceilings = measure_ceilings(torch.device("cuda"))
    work.lines.add(
        kind="ceilings",
        bytes_per_s=ceilings.bytes_per_s,
        bf16_per_s=ceilings.bf16_per_s,
        fp8_per_s=ceilings.fp8_per_s,
    )
    for tokens in sorted(_TOKENS, key=lambda count: count != 4096):
        for layer, (features, columns) in LLAMA_8B.fused_projections.items():
            calls = _calls(tokens, features, columns)
            failed: dict[str, str] = {}
            times = time_graphs(
                {name: (call, _COPIES) for name, call in calls.items()},
                rounds=3,
                seconds=0.004,
                may_fail=calls,
                failed=failed,
            )
            operations = 2 * tokens * features * columns
            for name, timing in times.items():
                work.lines.add(
                    kind="product",
                    layer=layer,
                    shape=[features, columns],
                    tokens=tokens,
                    mode=name,
                    tflop_per_s=round(operations / timing.median_s / 1e12, 1),
                    **microseconds(timing),
                )
            for name, why in failed.items():
                work.lines.add(kind="failed", layer=layer, tokens=tokens, mode=name, why=why)


def _calls(tokens: int, features: int, columns: int) -> dict[str, Callable[[int], object]]:
    fp8, device = torch.float8_e4m3fn, "cuda"
    x = random_tokens(tokens, columns, device=device)
    weights = [random_weight(features, columns, i, device).bfloat16() for i in range(_COPIES)]
    x8, weights8 = x.to(fp8), [weight.mul(16).to(fp8) for weight in weights]
    one = torch.ones((), device=device)
    rows = torch.ones(tokens, 1, device=device)
    outputs = torch.ones(1, features, device=device)

    def scaled(i: int, by_row: bool, fast: bool, dtype: torch.dtype) -> torch.Tensor:
        return torch._scaled_mm(
            x8,
            weights8[i].t(),
            scale_a=rows if by_row else one,
            scale_b=outputs if by_row else one,
            out_dtype=dtype,
            use_fast_accum=fast,
        )

    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "bf16": lambda i: F.linear(x, weights[i]),
        "rows, slow": partial(scaled, by_row=True, fast=False, dtype=bf16),
        "rows, fast": partial(scaled, by_row=True, fast=True, dtype=bf16),
        "rows, slow, float32": partial(scaled, by_row=True, fast=False, dtype=fp32),
        "rows, fast, float32": partial(scaled, by_row=True, fast=True, dtype=fp32),
        "tensor, slow": partial(scaled, by_row=False, fast=False, dtype=bf16),
        "tensor, fast": partial(scaled, by_row=False, fast=True, dtype=bf16),
    }
