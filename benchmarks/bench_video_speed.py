"""Bytes and time of video transformers at the shapes of Wan 2.1 and Open-Sora 2.0.

Random weights: neither depends on their values. Open-Sora 2.0 is a stand-in with the same module
names, shapes and token order.

* Bytes: of the whole transformer, built without memory, before (bfloat16) and after.
* Time: a few blocks of each shape on `GRID` video tokens. Means over calls that hold every refresh
  as often as a generation does; salient tokens and SeDA both on. What is not in the hook's parts
  (attention, norms, modulation, embedding) is the same in 16 bit.

    python -m benchmarks.bench_video_speed
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dialect_kernels.verify import verify

from .harness import Table, main

GRID = (2, 15, 26)
"""Frames, rows and columns of video tokens."""

TEXT_TOKENS = 64
CALLS = 10
"""A salient-token refresh every 5 calls and a grouping every 10: two and one."""

PLAIN_CALLS = 4
PLAIN_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        whole: builds it with all of its blocks.
        part: builds it with a few blocks.
        blocks: how many these are, in words.
        arguments: of one call in a dtype.
        layout: for `diffusers_hook.enable`, where the class does not tell.
    """

    whole: Callable[[], nn.Module]
    part: Callable[[], nn.Module]
    blocks: str
    arguments: Callable[[torch.dtype], dict[str, Any]]
    layout: str | None = None


def gate() -> list[str]:
    """Golden vectors that the installed code does not meet; no figure is taken while there are."""
    return [f"{r.case}: {r.detail}" for r in verify(["cpu"]) if not r.passed]


def shapes() -> dict[str, Shape]:
    """The models by name."""
    return {
        "Wan 2.1 1.3B": Shape(
            lambda: _wan(12, 8960, 30), lambda: _wan(12, 8960, 2), "2 of 30", _wan_call
        ),
        "Wan 2.1 14B": Shape(
            lambda: _wan(40, 13824, 40), lambda: _wan(40, 13824, 1), "1 of 40", _wan_call
        ),
        "Open-Sora 2.0": Shape(
            lambda: _open_sora(19, 38),
            lambda: _open_sora(1, 2),
            "1 of 19 double, 2 of 38 single",
            _open_sora_call,
            "open_sora",
        ),
    }


def measure() -> dict[str, Any]:
    """Per model: bytes before and after, seconds of a call, and of the hook's parts."""
    found = {}
    for name, shape in shapes().items():
        found[name] = {"bytes": count_bytes(shape), "blocks": shape.blocks, "time": _time(shape)}
        print(name, found[name], flush=True)
    return {"models": found, "grid": list(GRID), "calls": CALLS}


def count_bytes(shape: Shape) -> dict[str, int]:
    """Bytes of the whole model and of the layers that become 4 bit, in bfloat16 and quantized."""
    from diffusers_hook import SemanticDialectConfig
    from diffusers_hook.layouts import layout_for, layout_named
    from diffusers_hook.plan import empty_layer, make_plan, put

    with torch.device("meta"):
        model = shape.whole().to(torch.bfloat16)
    layout = layout_named(shape.layout) if shape.layout else layout_for(model)
    assert layout is not None
    config, plan = make_plan(model, SemanticDialectConfig(), layout, "transformer", empty=True)
    before = _nbytes(model)
    layers_before = sum(layer.weight.nbytes for layer, _ in plan.quantized.values())
    weights = sum(layer.weight.numel() for layer, _ in plan.quantized.values())
    for path in plan.layers:
        put(model, path, empty_layer(plan, path, config))
    quantized = [model.get_submodule(path) for path in plan.quantized]
    layers_after = sum(tensor.nbytes for layer in quantized for tensor in layer.buffers())
    return {
        "parameters": before // 2,
        "quantized_weights": weights,
        "fp8_layers": len(plan.modulation),
        "before": before,
        "after": _nbytes(model),
        "layers_before": layers_before,
        "layers_after": layers_after,
    }


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def _time(shape: Shape) -> dict[str, Any]:
    """Mean seconds of a call: plain in both dtypes, quantized, and of the hook's parts."""
    from diffusers.utils import logging

    import diffusers_hook

    logging.set_verbosity_error()  # it would rather keep some weights in float32
    torch.manual_seed(0)
    model = shape.part().to(torch.bfloat16).eval()
    seconds: dict[str, Any] = {"plain": {}}
    for name, dtype in PLAIN_DTYPES.items():
        model.to(dtype)
        given = shape.arguments(dtype)
        seconds["plain"][name] = _mean_seconds(lambda given=given: model(**given), PLAIN_CALLS)
    model.to(torch.bfloat16)
    layout = {"layout": shape.layout} if shape.layout else {}
    diffusers_hook.enable(model, progress=False, keep_original="none", seda=True, **layout)
    given = shape.arguments(torch.bfloat16)
    model(**given)
    before = diffusers_hook.summary(model).transformers[0].seconds
    seconds["quantized"] = _mean_seconds(lambda: model(**given), CALLS, warmup=0)
    after = diffusers_hook.summary(model).transformers[0].seconds
    seconds["parts"] = {part: (after[part] - before.get(part, 0.0)) / CALLS for part in after}
    return seconds


def _mean_seconds(call: Callable[[], object], calls: int, warmup: int = 1) -> float:
    taken = []
    for number in range(-warmup, calls):
        start = time.perf_counter()
        call()
        if number >= 0:
            taken.append(time.perf_counter() - start)
    return statistics.mean(taken)


def _wan(heads: int, ffn: int, layers: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    model: nn.Module = WanTransformer3DModel(
        num_attention_heads=heads, ffn_dim=ffn, num_layers=layers
    )
    return model


def _wan_call(dtype: torch.dtype) -> dict[str, Any]:
    frames, rows, columns = GRID
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * rows, 2 * columns, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 4096, dtype=dtype),
    }


def _open_sora(double: int, single: int) -> nn.Module:
    from tests.open_sora_stand_in import MMDiTModel

    model: nn.Module = MMDiTModel(
        hidden=3072, heads=24, depth=double, single=single, channels=64, text=4096, pooled=768,
        axes=(16, 56, 56),
    )  # fmt: skip
    return model


def _open_sora_call(dtype: torch.dtype) -> dict[str, Any]:
    places = torch.cartesian_prod(*map(torch.arange, GRID)).to(dtype)[None]
    return {
        "img": torch.randn(1, places.shape[1], 64, dtype=dtype),
        "img_ids": places,
        "txt": torch.randn(1, TEXT_TOKENS, 4096, dtype=dtype),
        "txt_ids": torch.zeros(1, TEXT_TOKENS, 3, dtype=dtype),
        "timesteps": torch.full((1,), 0.9, dtype=dtype),
        "y_vec": torch.randn(1, 768, dtype=dtype),
    }


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``bytes`` of the whole models, ``time`` of a few blocks."""
    sizes = [["model", "parameters", "in 4 bit", "bfloat16", "SemanticDialect", "whole model",
              "quantized layers"]]  # fmt: skip
    times = [["model", "blocks", "float32", "bfloat16", "SemanticDialect", "linear layers",
              "saliency", "SeDA"]]  # fmt: skip
    for name, found in figures["models"].items():
        size, taken = found["bytes"], found["time"]
        sizes.append(
            [
                name,
                f"{size['parameters'] / 1e9:.2f} G",
                f"{size['quantized_weights'] / size['parameters']:.1%}",
                f"{size['before'] / 1e9:.2f} GB",
                f"{size['after'] / 1e9:.2f} GB",
                f"{size['after'] / size['before']:.3f} x",
                f"{size['layers_after'] / size['layers_before']:.3f} x",
            ]
        )
        plain, parts = taken["plain"], taken["parts"]
        times.append(
            [
                name,
                found["blocks"],
                f"{plain['float32']:.2f} s",
                f"{plain['bfloat16']:.2f} s",
                f"{taken['quantized']:.2f} s",
                f"{parts['linear layers'] / taken['quantized']:.0%}",
                f"{parts['saliency'] / taken['quantized']:.1%}",
                f"{parts['SeDA'] / taken['quantized']:.1%}",
            ]
        )
    return {"bytes": sizes, "time": times}


if __name__ == "__main__":
    main(gate, measure)
