"""Bytes and time of video transformers at the shapes of Wan 2.1 and Open-Sora 2.0.

Random weights: neither depends on their values. Open-Sora 2.0 is a stand-in with the same module
names, shapes and token order.

* Bytes: of the whole transformer, built without memory, before (bfloat16) and after.
* Time: the calls of one generation's conditional branch, for a few blocks of each shape; salient
  tokens and SeDA both on. `CALLS` calls hold every refresh as often as a generation does; that is
  asserted before a figure is taken. A whole step is the call times the share of blocks.
* Parts: in further calls that wait for the device before and after every part; shares are those of
  these calls. On a GPU the time to launch a part is then in its time, so that saliency and SeDA
  look dearer than they are. Rounding is timed apart, as the same layers with `ROWS` outputs. What
  is in no part (attention, norms, modulation, embedding) is the rest.
* Peak memory during the calls: on a GPU what torch allocated, on a CPU the whole process's
  (proportional set size).

On a GPU it measures a video's real number of tokens and more blocks, on a CPU 780 tokens.

    python -m benchmarks.video.bench_video_speed [--device cpu] [--models "Wan 2.1 14B"]
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from dialect_kernels import PackedTensor, quantize, reference, semantic_linear
from dialect_kernels.formatbook import SEMANTIC_32
from dialect_kernels.verify import verify

from ..lib.harness import Table, main, time_calls

PACKAGES = ("torch", "diffusers")

CALLS = 10
"""A salient-token refresh every 5 calls and a grouping every 10: two and one."""
REFRESHES = {"salient_refreshes": 2, "group_refreshes": 1}
"""Per block, in that many calls after the first."""

PLAIN_CALLS = 4
ROWS = 16
"""Outputs of the layers that are timed for their rounding: few, and what every kernel takes."""

LINEAR_GOAL, SHARE_GOAL = 1.6, 0.03
"""On an H200: linear layers against bfloat16; saliency and SeDA of a step."""

Grid: TypeAlias = tuple[int, int, int]
"""Frames, rows and columns of video tokens."""


@dataclass(frozen=True)
class Place:
    """What of a model is measured on a kind of device.

    Attributes:
        grid: video tokens.
        text: text tokens.
        blocks: built of each of the model's lists.
    """

    grid: Grid
    text: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        build: makes it with the given number of blocks in each of its lists.
        blocks: of the whole model, in each list; a `Place` has the same share of every list.
        arguments: of a call: (place, dtype) -> them by name, on the default device.
        timestep: the argument that falls from call to call; by how much, and from where.
        cpu, gpu: what is measured there.
        layout: for `diffusers_hook.enable`, where the class does not tell.
    """

    build: Callable[..., nn.Module]
    blocks: tuple[int, ...]
    arguments: Callable[[Place, torch.dtype], dict[str, Any]]
    timestep: tuple[str, float, float]
    cpu: Place
    gpu: Place
    layout: str | None = None

    def place(self, device: torch.device) -> Place:
        """What is measured on a device."""
        return self.gpu if device.type == "cuda" else self.cpu


SMALL = (2, 15, 26)
"""780 tokens: what a CPU multiplies in seconds."""


def shapes() -> dict[str, Shape]:
    """The models by name; on a GPU with 81 frames at 480p and 720p, and 129 at 576 x 1024."""
    return {
        "Wan 2.1 1.3B": Shape(
            lambda layers: _wan(12, 8960, layers),
            (30,),
            _wan_call,
            ("timestep", -10.0, 999.0),
            cpu=Place(SMALL, 64, (2,)),
            gpu=Place((21, 30, 52), 512, (10,)),
        ),
        "Wan 2.1 14B": Shape(
            lambda layers: _wan(40, 13824, layers),
            (40,),
            _wan_call,
            ("timestep", -10.0, 999.0),
            cpu=Place(SMALL, 64, (1,)),
            gpu=Place((21, 45, 80), 512, (4,)),
        ),
        "Open-Sora 2.0": Shape(
            _open_sora,
            (19, 38),
            _open_sora_call,
            ("timesteps", -0.02, 0.98),
            cpu=Place(SMALL, 64, (1, 2)),
            gpu=Place((33, 36, 64), 512, (2, 4)),
            layout="open_sora",
        ),
    }


def gate() -> list[str]:
    """What the installed code does wrong on the devices here; no figure is taken while it does."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    faults = [f"{r.backend}, {r.case}: {r.detail}" for r in verify(devices) if not r.passed]
    return faults + [fault for device in devices for fault in semantic_faults(torch.device(device))]


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
        got = semantic_linear(tokens.to(device), _moved(weight, device), None, **placed)
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
    from diffusers_hook import SemanticDialectConfig
    from diffusers_hook.layouts.layouts import layout_for, layout_named
    from diffusers_hook.model.layer_choice import empty_layer, make_plan, put

    with torch.device("meta"):
        model = shape.build(*shape.blocks).to(torch.bfloat16)
    layout = layout_named(shape.layout) if shape.layout else layout_for(model)
    assert layout is not None
    config, plan = make_plan(model, SemanticDialectConfig(), layout, "transformer", empty=True)
    before = _nbytes(model)
    layers_before = sum(layer.weight.nbytes for layer, _ in plan.quantized.values())
    weights = sum(layer.weight.numel() for layer, _ in plan.quantized.values())
    for path in plan.layers:
        put(model, path, empty_layer(plan, path, config))
    quantized = [model.get_submodule(path).state_dict() for path in plan.quantized]
    return {
        "parameters": before // 2,
        "quantized_weights": weights,
        "fp8_layers": len(plan.modulation),
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
    with peak_memory(device) as peak, refreshed_in_time(model):
        seconds = _seconds(call, CALLS, device)
    layers = [layer for layer in model.modules() if isinstance(layer, DialectLinear)]
    hook.state.wait = wait(device)
    before = dict(hook.state.seconds)
    with clocked(layers, wait(device)) as linear, refreshed_in_time(model):
        apart = _seconds(call, CALLS, device)
    parts = {part: hook.state.seconds[part] - before[part] for part in ("saliency", "SeDA")}
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


def generation(
    model: nn.Module, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """The next call of the conditional branch of one generation, whenever it is called."""
    with torch.device(device):
        given = shape.arguments(shape.place(device), dtype)
    name, fall, first = shape.timestep
    steps = itertools.count()

    def call() -> object:
        step = next(steps)
        given[name] = torch.full((1,), first + fall * step, dtype=dtype, device=device)
        context: Any = getattr(model, "cache_context", lambda *_, **__: nullcontext())
        with context("cond", step_index=step):
            return model(**given)

    return call


@contextmanager
def refreshed_in_time(model: nn.Module) -> Iterator[None]:
    """Sees that `CALLS` calls choose and group as often as those of a generation.

    Raises:
        SystemExit: if they do not.
    """
    import diffusers_hook
    from diffusers_hook.model.attach import attached

    hook = attached(model)
    assert hook is not None
    blocks = sum(block.kind.attention is not None for block in hook.state.blocks)
    before = diffusers_hook.summary(model).transformers[0]
    yield
    after = diffusers_hook.summary(model).transformers[0]
    for name, times in REFRESHES.items():
        counted = getattr(after, name) - getattr(before, name)
        if counted != times * blocks:
            raise SystemExit(
                f"{name}: {counted} in {CALLS} calls of {blocks} blocks, not {times} in each; "
                "these calls are not those of one generation"
            )


@contextmanager
def clocked(layers: Iterable[nn.Module], wait: Callable[[], object]) -> Iterator[list[float]]:
    """[seconds] spent in the layers during the `with` block, each waited for."""
    seconds, starts = [0.0], [0.0]

    def start(*_: object) -> None:
        wait()
        starts[0] = time.perf_counter()

    def end(*_: object) -> None:
        wait()
        seconds[0] += time.perf_counter() - starts[0]

    handles = []
    for layer in layers:
        handles += [layer.register_forward_pre_hook(start), layer.register_forward_hook(end)]
    yield seconds
    for handle in handles:
        handle.remove()


@contextmanager
def rounding_apart(layers: Iterable[Any], wait: Callable[[], object]) -> Iterator[list[float]]:
    """[seconds] that the layers' inputs take with `ROWS` outputs: rounded, hardly multiplied.

    Each is called again with the first rows of its weight, with the salient tokens and the groups
    of the call in progress.
    """
    seconds = [0.0]

    def again(layer: nn.Module) -> Callable[..., None]:
        few = _first_rows(layer)

        def call(_: nn.Module, arguments: tuple[torch.Tensor, ...], __: object) -> None:
            wait()
            start = time.perf_counter()
            few(*arguments)
            wait()
            seconds[0] += time.perf_counter() - start

        return call

    handles = [layer.register_forward_hook(again(layer)) for layer in layers]
    yield seconds
    for handle in handles:
        handle.remove()


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """[bytes] of the peak during the `with` block."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
    else:
        # reads /proc with psutil, which a GPU does not need
        from ..lib.memory import PeakMemory

        with PeakMemory(os.getpid()) as process:
            yield peak
        peak[0] = process.pss


def wait(device: torch.device) -> Callable[[], object]:
    """What waits until the device has finished."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _seconds(call: Callable[[], object], calls: int, device: torch.device) -> dict[str, float]:
    """The mean, as some calls choose and group and others do not, and the spread."""
    timing = time_calls({"": call}, rounds=calls, warmup=0, synchronize=wait(device))[""]
    return {
        "call_s": math.fsum(timing.rounds_s) / calls,
        "fastest_call_s": timing.fastest_s,
        "slowest_call_s": timing.slowest_s,
    }


def _linear_layers(model: nn.Module, shape: Shape) -> list[nn.Linear]:
    """The layers that become 4 bit."""
    from diffusers_hook import SemanticDialectConfig
    from diffusers_hook.layouts.layouts import layout_for, layout_named
    from diffusers_hook.model.layer_choice import make_plan

    layout = layout_named(shape.layout) if shape.layout else layout_for(model)
    assert layout is not None
    _, plan = make_plan(model, SemanticDialectConfig(), layout, "transformer")
    return [layer for layer, _ in plan.quantized.values()]


def _first_rows(layer: Any) -> nn.Module:
    """A quantized layer with the first `ROWS` rows of another's weight, in the same block."""
    from diffusers_hook.layers.dialect import DialectLinear

    p = layer.packed
    rows = PackedTensor(
        p.codes[:ROWS], p.meta[:ROWS], p.row_exponent[:ROWS], (ROWS, p.shape[1]), p.book,
        p.block_size,
    )  # fmt: skip
    few = DialectLinear(rows, None, layer.stream, layer.activation, layer.original_dtype)
    few.slot = layer.slot
    return few


def _moved(p: PackedTensor, device: torch.device) -> PackedTensor:
    tensors = (x.to(device) for x in (p.codes, p.meta, p.row_exponent))
    return PackedTensor(*tensors, p.shape, p.book, p.block_size)


def _wan(heads: int, ffn: int, layers: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    model: nn.Module = WanTransformer3DModel(
        num_attention_heads=heads, ffn_dim=ffn, num_layers=layers
    )
    return model


def _wan_call(place: Place, dtype: torch.dtype) -> dict[str, Any]:
    frames, rows, columns = place.grid
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * rows, 2 * columns, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, place.text, 4096, dtype=dtype),
    }


def _open_sora(double: int, single: int) -> nn.Module:
    from benchmarks.video.open_sora_stand_in import MMDiTModel

    model: nn.Module = MMDiTModel(
        hidden=3072, heads=24, depth=double, single=single, channels=64, text=4096, pooled=768,
        axes=(16, 56, 56),
    )  # fmt: skip
    return model


def _open_sora_call(place: Place, dtype: torch.dtype) -> dict[str, Any]:
    places = torch.cartesian_prod(*map(torch.arange, place.grid)).to(dtype)[None]
    return {
        "img": torch.randn(1, places.shape[1], 64, dtype=dtype),
        "img_ids": places,
        "txt": torch.randn(1, place.text, 4096, dtype=dtype),
        "txt_ids": torch.zeros(1, place.text, 3, dtype=dtype),
        "y_vec": torch.randn(1, 768, dtype=dtype),
    }


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
