"""Bytes and time of video transformers at the shapes of Wan 2.1 and Open-Sora 2.0.

Weights are random: neither bytes nor time depends on their values. Open-Sora 2.0 is a stand-in with
the same module names, shapes and token order.

* Bytes: of the whole transformer, built without memory, before (bfloat16) and after.
* Time: the calls of one generation's conditional branch, for a few blocks of each shape; salient
  tokens and SeDA both on. In `CALLS` calls every refresh happens as often as in a generation; the
  benchmark stops if it does not. The time of a whole step is that of a call, scaled from the
  measured blocks to all of them.
* Parts: in further calls that wait for the device before and after every part; shares are those of
  these calls. On a GPU a part's time then includes its launch, so that saliency and SeDA look
  dearer than they are. Rounding is timed apart, as the same layers with `ROWS` outputs. The rest of
  a call (attention, norms, modulation, embedding) belongs to no part.
* Peak memory during the calls: on a GPU the memory that torch allocated, on a CPU that of the whole
  process (proportional set size).

On a GPU a video has its real number of tokens, and more blocks are measured; on a CPU it has 780.

    python -m benchmarks.video.bench_video_speed [--device cpu] [--models "Wan 2.1 14B"]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dialect_kernels import quantize, reference, semantic_linear
from dialect_kernels.formatbook import SEMANTIC_32

from ..lib.gate import golden_faults
from ..lib.harness import Table, main, time_calls
from .instruments import clocked, peak_memory, refreshed_in_time, rounding_apart, wait
from .models import Shape, generation, shapes

PACKAGES = ("torch", "diffusers")

CALLS = 10
"""A salient-token refresh every 5 calls and a grouping every 10: two and one."""
REFRESHES = {"salient_refreshes": 2, "group_refreshes": 1}
"""Per block, in that many calls after the first."""

PLAIN_CALLS = 4
LINEAR_GOAL, SHARE_GOAL = 1.6, 0.03
"""On an H200: linear layers against bfloat16; saliency and SeDA of a step."""


def gate() -> list[str]:
    """Faults of the golden vectors and of decomposed and grouped tokens, on the devices here."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return golden_faults(*devices) + [
        fault for device in devices for fault in semantic_faults(torch.device(device))
    ]


def semantic_faults(device: torch.device) -> list[str]:
    """Where decomposed and grouped tokens differ from the reference by more than the format allows.

    On a CPU by a bit; on a GPU by 2^-7 of the sum of the products' magnitudes.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 150, 256, generator=generator).to(torch.bfloat16)
    weight = quantize(torch.randn(96, 256, generator=generator), SEMANTIC_32, 32)
    salient = torch.arange(15).expand(2, -1)
    group = (torch.arange(150) // 40).to(torch.int32).expand(2, -1)
    faults = []
    for name, rows in (("salient", {"salient": salient}), ("grouped", {"group": group})):
        want = reference.semantic_linear(tokens, weight, None, **rows).float()
        placed = {key: row.to(device) for key, row in rows.items()}
        got = semantic_linear(tokens.to(device), weight.to(device), None, **placed)
        allowed = torch.zeros_like(want)
        if device.type == "cuda":
            allowed = 2**-7 * (tokens.float().abs() @ weight.dequantize(torch.float32).abs().T)
        if bool(((got.cpu().float() - want).abs() > allowed).any()):
            faults.append(f"{device}, {name} tokens: semantic_linear differs from the reference")
    return faults


def options(parser: argparse.ArgumentParser) -> None:
    """Where and what."""
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--models", nargs="+", choices=shapes(), default=list(shapes()))


def measure(device: str, models: Sequence[str]) -> dict[str, Any]:
    """Per model: bytes before and after, seconds of a call, and of the hook's parts."""
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it would rather keep some weights in float32
    where = torch.device(device)
    found = {}
    for name in models:
        shape = shapes()[name]
        place = shape.place(where)
        found[name] = {
            "bytes": count_bytes(shape),
            "blocks": list(place.blocks),
            "all_blocks": list(shape.blocks),
            "grid": list(place.grid),
            "text_tokens": place.text,
            "time": _time(shape, where),
        }
        print(_line(name, found[name]), flush=True)
    return {"device": device, "calls": CALLS, "models": found}


def count_bytes(shape: Shape) -> dict[str, int]:
    """Bytes of the whole model and of the layers that become 4 bit, in bfloat16 and quantized."""
    from diffusers_hook.model.layer_choice import put

    with torch.device("meta"):
        model = shape.build(*shape.blocks).to(torch.bfloat16)
    config, choice = _layer_choice(model, shape, empty=True)
    before = _nbytes(model)
    layers_before = sum(layer.weight.nbytes for layer, _ in choice.quantized.values())
    weights = sum(layer.weight.numel() for layer, _ in choice.quantized.values())
    for path in choice.layers:
        put(model, path, choice.empty_layer(path, config))
    quantized = [model.get_submodule(path).state_dict() for path in choice.quantized]
    return {
        "parameters": before // 2,
        "quantized_weights": weights,
        "fp8_layers": len(choice.modulation),
        "before": before,
        "after": _nbytes(model),
        "layers_before": layers_before,
        "layers_after": sum(
            tensor.nbytes for layer in quantized for name, tensor in layer.items() if name != "bias"
        ),
    }


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def _time(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Seconds of a call and of its linear layers, in 16 (and on a CPU 32) bits and quantized."""
    place = shape.place(device)
    torch.manual_seed(0)
    with torch.device(device):
        model = shape.build(*place.blocks).to(torch.bfloat16).eval()
    dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    found: dict[str, Any] = {}
    for dtype in dtypes:
        model.to(dtype)
        found[str(dtype).removeprefix("torch.")] = _time_plain(model, shape, dtype, device)
    found["quantized"] = _time_quantized(model, shape, device)
    return found


def _time_plain(
    model: nn.Module, shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    call = generation(model, shape, dtype, device)
    call()
    with peak_memory(device) as peak:
        seconds = _seconds(call, PLAIN_CALLS, device)
    with clocked(_linear_layers(model, shape), wait(device)) as linear:
        _seconds(call, PLAIN_CALLS, device)
    return {**seconds, "peak_bytes": peak[0], "linear_s": linear[0] / PLAIN_CALLS}


def _time_quantized(model: nn.Module, shape: Shape, device: torch.device) -> dict[str, float]:
    import diffusers_hook
    from diffusers_hook.layers.dialect import DialectLinear
    from diffusers_hook.model.attach import attached

    layout = {"layout": shape.layout} if shape.layout else {}
    diffusers_hook.enable(model, progress=False, keep_original="none", seda=True, **layout)
    hook = attached(model)
    assert hook is not None
    call = generation(model, shape, torch.bfloat16, device)
    call()
    with peak_memory(device) as peak, refreshed_in_time(model, CALLS, REFRESHES):
        seconds = _seconds(call, CALLS, device)
    layers = [layer for layer in model.modules() if isinstance(layer, DialectLinear)]
    hook.state.meter.wait = wait(device)
    before = dict(hook.state.meter.seconds)
    with clocked(layers, wait(device)) as linear, refreshed_in_time(model, CALLS, REFRESHES):
        apart = _seconds(call, CALLS, device)
    parts = {part: hook.state.meter.seconds[part] - before[part] for part in ("saliency", "SeDA")}
    with rounding_apart(layers, wait(device)) as rounding:
        _seconds(call, PLAIN_CALLS, device)
    return {
        **seconds,
        "peak_bytes": peak[0],
        "call_in_parts_s": apart["call_s"],
        "linear_s": linear[0] / CALLS,
        "rounding_s": rounding[0] / PLAIN_CALLS,
        "saliency_s": parts["saliency"] / CALLS,
        "seda_s": parts["SeDA"] / CALLS,
    }


def _seconds(call: Callable[[], object], calls: int, device: torch.device) -> dict[str, float]:
    """The mean, as some calls choose and group and others do not, and the spread."""
    timing = time_calls({"": call}, rounds=calls, warmup=0, synchronize=wait(device))[""]
    return {
        "call_s": math.fsum(timing.rounds_s) / calls,
        "fastest_call_s": timing.fastest_s,
        "slowest_call_s": timing.slowest_s,
    }


def _layer_choice(model: nn.Module, shape: Shape, empty: bool = False) -> tuple[Any, Any]:
    """The hook's configuration for a model, and its choice of layers."""
    from diffusers_hook import SemanticDialectConfig
    from diffusers_hook.layouts import layout_for, layout_named
    from diffusers_hook.model.layer_choice import choose_layers

    layout = layout_named(shape.layout) if shape.layout else layout_for(model)
    assert layout is not None
    return choose_layers(model, SemanticDialectConfig(), layout, "transformer", empty=empty)


def _linear_layers(model: nn.Module, shape: Shape) -> list[nn.Linear]:
    """The layers that become 4 bit."""
    _, choice = _layer_choice(model, shape)
    return [layer for layer, _ in choice.quantized.values()]


def _share(taken: dict[str, Any]) -> float:
    """Saliency and SeDA in a call."""
    ours = taken["quantized"]
    return float((ours["saliency_s"] + ours["seda_s"]) / ours["call_in_parts_s"])


def _linear_ratio(taken: dict[str, Any]) -> float:
    """How many times faster than in bfloat16 the linear layers are, everything included."""
    return float(taken["bfloat16"]["linear_s"] / taken["quantized"]["linear_s"])


def _line(name: str, found: dict[str, Any]) -> str:
    taken = found["time"]
    seconds = ", ".join(f"{kind} {times['call_s']:.3f} s" for kind, times in taken.items())
    return (
        f"{name}, {_blocks(found)} blocks, {math.prod(found['grid'])} tokens: {seconds}; linear "
        f"layers {_linear_ratio(taken):.2f} x, saliency and SeDA {_share(taken):.1%} (goals on an "
        f"H200: {LINEAR_GOAL} x, {SHARE_GOAL:.0%})"
    )


def _blocks(found: dict[str, Any]) -> str:
    pairs = zip(found["blocks"], found["all_blocks"], strict=True)
    return " + ".join(f"{built} of {whole}" for built, whole in pairs)


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``bytes`` and ``step`` of the whole models, ``time`` and ``memory`` of a few blocks."""
    sizes = [["model", "parameters", "in 4 bit", "bfloat16", "SemanticDialect", "whole model",
              "quantized layers"]]  # fmt: skip
    plain = list(next(iter(figures["models"].values()))["time"])[:-1]
    times = [["model", "blocks", "video tokens", *plain, "SemanticDialect", "linear layers",
              "of it rounding", "saliency", "SeDA"]]  # fmt: skip
    steps = [["model", "bfloat16", "SemanticDialect",
              f"linear layers against bfloat16 (goal on an H200: ≥ {LINEAR_GOAL} x)",
              f"saliency and SeDA (goal: ≤ {SHARE_GOAL:.0%})"]]  # fmt: skip
    peaks = [["model", "blocks", *plain, "SemanticDialect"]]
    for name, found in figures["models"].items():
        size, taken = found["bytes"], found["time"]
        ours = taken["quantized"]
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
        times.append(
            [
                name,
                _blocks(found),
                str(math.prod(found["grid"])),
                *(f"{taken[kind]['call_s']:.2f} s" for kind in (*plain, "quantized")),
                f"{ours['linear_s'] / ours['call_in_parts_s']:.0%}",
                f"{ours['rounding_s'] / ours['call_in_parts_s']:.0%}",
                f"{ours['saliency_s'] / ours['call_in_parts_s']:.1%}",
                f"{ours['seda_s'] / ours['call_in_parts_s']:.1%}",
            ]
        )
        whole = sum(found["all_blocks"]) / sum(found["blocks"])
        steps.append(
            [
                name,
                *(f"{whole * taken[kind]['call_s']:.1f} s" for kind in ("bfloat16", "quantized")),
                f"{_linear_ratio(taken):.2f} x",
                f"{_share(taken):.1%}",
            ]
        )
        peak = (f"{taken[kind]['peak_bytes'] / 1e9:.2f} GB" for kind in (*plain, "quantized"))
        peaks.append([name, _blocks(found), *peak])
    return {"bytes": sizes, "time": times, "step": steps, "memory": peaks}


if __name__ == "__main__":
    main(gate, measure, options)
