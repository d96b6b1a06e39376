"""A layer of experts on the CPU: packed, against bfloat16.

A layer takes tokens and their routing, and returns the weighted sum of its experts' outputs (gate
and up, SiLU, down); activation rounding is included, the router is not. Tokens are routed anew, at
random, in every call, and layers take turns, so that all experts together do not fit into the
last-level cache. Peers, in the same rounds: PyTorch's bfloat16 linear layers in a loop over the
experts that have tokens, and vLLM's own layer of experts, where vLLM is installed.

    python -m benchmarks.kernels.bench_experts
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import cycle, pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F

from dialect_kernels import DIALECT_FP4, PackedExperts, cpu, expert_linear, ops, reference
from dialect_plugin.scheme import METHODS

from ..lib.gate import golden_faults
from ..lib.harness import Table, main, ratio, time_calls
from ..lib.shapes import MIXTURE_1B, Mixture
from .random_data import random_tokens, random_weight

PACKAGES = ("torch", "vllm")

SHAPE = MIXTURE_1B
TOKENS = (1, 8, 32, 128, 512)
LAYERS = 2
"""Packed layers that take turns."""
ROUTINGS = 16
GOAL = 1.5
"""Times as fast as the faster peer, for one token."""

LOOP, VLLM = "bfloat16, a loop", "bfloat16, vLLM"
FORMATS = {name: method.bits for name, method in METHODS.items()}


class Routing(NamedTuple):
    """Which experts each token goes to: weights float32 and numbers int64, [T, active]."""

    weights: torch.Tensor
    experts: torch.Tensor


class Dense(NamedTuple):
    """A layer's weights in bfloat16: [E, 2 * width, hidden] and [E, hidden, width]."""

    gate_up: torch.Tensor
    down: torch.Tensor


class Packed(NamedTuple):
    """The same, packed."""

    gate_up: PackedExperts
    down: PackedExperts


Layer: TypeAlias = Callable[[torch.Tensor, Routing], torch.Tensor]


def gate() -> list[str]:
    """Where the kernel differs from the reference, and a layer's peers from each other."""
    if not cpu.available():
        return [f"there is no kernel: {cpu.why_not()}"]
    faults = golden_faults("cpu")
    few = Mixture(SHAPE.hidden, 64, 4, 2)
    dense = _dense(few)
    packed = _packed(dense)
    x, routing = random_tokens(5, few.hidden), _routing(5, few, seed=1)
    order, offsets = _sorted(routing, few.experts)
    of_rows = routing.experts.flatten()[order].tolist()
    for name in FORMATS:
        y = expert_linear(x, packed.gate_up, offsets, order // few.active, None, name, "exact")
        for row, (expert, token) in enumerate(zip(of_rows, order // few.active, strict=True)):
            want = reference.dialect_linear(x[token][None], packed.gate_up[expert], None, name)
            if not torch.equal(y[row], want[0]):
                faults.append(f"{name}, row {row}: differs from the reference")
    wanted = _loop(dense)(x, routing)
    for name, layer in _layers(few, dense, [packed]).items():
        error = float((layer(x, routing) - wanted).norm() / wanted.norm())
        if not error < (0.02 if name == VLLM else 0.3):
            faults.append(f"{name}: the output differs from the loop's by {error:.2g} of its norm")
    return faults


def measure() -> dict[str, Any]:
    """Milliseconds of a layer by tokens and format, ratios to each peer, and bytes."""
    dense = _dense(SHAPE)
    packed = [_packed(dense) for _ in range(LAYERS)]
    layers = _layers(SHAPE, dense, packed)
    return {
        "shape": asdict(SHAPE),
        "block_size": packed[0].down.together.block_size,
        "threads": torch.get_num_threads(),
        "instructions": cpu.features(),
        "bytes": sum(experts.nbytes for experts in packed[0]),
        "bytes_bfloat16": sum(weight.nbytes for weight in dense),
        "tokens": {str(tokens): _measure(tokens, layers) for tokens in TOKENS},
    }


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``times``: all; ``summary``: W4A4, W4A8 and W4A16 against the faster peer of each row."""
    peers = [name for name in (LOOP, VLLM) if name in figures["tokens"]["1"]]
    head = ["tokens", *peers]
    for shown in FORMATS.values():
        head += [shown, *(f"against {name.partition(', ')[2]}" for name in peers)]
    times, summary = [head], [["tokens", *FORMATS.values(), "goal"]]
    for tokens, measured in figures["tokens"].items():
        row = [tokens, *(f"{measured[name]['median_ms']:.2f} ms" for name in peers)]
        best = min(peers, key=lambda name: measured[name]["median_ms"])
        for name in FORMATS:
            row.append(f"{measured[name]['median_ms']:.2f} ms")
            row += [f"{measured[name]['times'][peer]['median']:.2f} x" for peer in peers]
        times.append(row)
        shown = [f"{measured[name]['times'][best]['median']:.2f} x" for name in FORMATS]
        summary.append([tokens, *shown, f"≥ {GOAL} x" if tokens == "1" else ""])
    return {"times": times, "summary": summary}


def _measure(tokens: int, layers: dict[str, Layer]) -> dict[str, Any]:
    x = random_tokens(tokens, SHAPE.hidden, seed=tokens)
    calls = {}
    for name, layer in layers.items():
        routings = cycle([_routing(tokens, SHAPE, seed) for seed in range(ROUTINGS)])
        calls[name] = lambda layer=layer, routings=routings: layer(x, next(routings))
    timings = time_calls(calls, rounds=max(11, min(60, 960 // tokens)), warmup=2)
    peers = [name for name in timings if name not in FORMATS]
    out: dict[str, Any] = {}
    for name, timing in timings.items():
        out[name] = {
            "median_ms": 1e3 * timing.median_s,
            "fastest_ms": 1e3 * timing.fastest_s,
            "slowest_ms": 1e3 * timing.slowest_s,
        }
        if name in FORMATS:
            found = {peer: ratio(timings[peer], timing) for peer in peers}
            out[name]["times"] = {
                peer: {"median": r.median_s, "lowest": r.fastest_s, "highest": r.slowest_s}
                for peer, r in found.items()
            }
    return out


def _layers(shape: Mixture, dense: Dense, packed: list[Packed]) -> dict[str, Layer]:
    layers = {LOOP: _loop(dense)}
    if (fused := _vllm(dense)) is not None:
        layers[VLLM] = fused
    for name in FORMATS:
        layers[name] = _grouped(shape, packed, name)
    return layers


def _loop(dense: Dense) -> Layer:
    """PyTorch's linear layers, one expert after another."""
    count = len(dense.down)

    def layer(x: torch.Tensor, routing: Routing) -> torch.Tensor:
        order, offsets = _sorted(routing, count)
        tokens = order // routing.experts.shape[1]
        weights = routing.weights.flatten()[order]
        y = torch.zeros(x.shape, dtype=torch.float32)
        for expert, (first, end) in enumerate(pairwise(offsets.tolist())):
            if first < end:
                rows = tokens[first:end]
                inner = _gated(F.linear(x[rows], dense.gate_up[expert]))
                outer = F.linear(inner, dense.down[expert])
                y.index_add_(0, rows, outer * weights[first:end, None])
        return y.to(x.dtype)

    return layer


def _vllm(dense: Dense) -> Layer | None:
    """vLLM's layer of experts for CPUs; None where vLLM or its operator is missing."""
    try:
        from vllm import _custom_ops as vllm_ops

        # the system lets a process use matrix tiles only after a request
        isa = "amx" if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else "vec"
        gate_up, down = (vllm_ops.cpu_prepack_moe_weight(weight, isa) for weight in dense)
    except (ImportError, AttributeError):
        return None

    def layer(x: torch.Tensor, routing: Routing) -> torch.Tensor:
        y = torch.empty_like(x)
        chosen = routing.experts.to(torch.int32)
        vllm_ops.cpu_fused_moe(
            y, x, gate_up, down, None, None, routing.weights, chosen, "silu", isa
        )
        return y

    return layer


def _grouped(shape: Mixture, packed: list[Packed], activation_format: str) -> Layer:
    """Our layer, in static shapes as an engine runs it."""
    turns = cycle(packed)

    def layer(x: torch.Tensor, routing: Routing) -> torch.Tensor:
        gate_up, down = next(turns)
        order, offsets = _sorted(routing, shape.experts)

        def product(x: torch.Tensor, rows: torch.Tensor | None, experts: PackedExperts) -> Any:
            arguments = experts.op_arguments(None)
            return ops.grouped_linear(x, rows, offsets, *arguments, activation_format, "default")

        inner = _gated(product(x, order // shape.active, gate_up))
        outer = product(inner, None, down)
        placed = torch.empty_like(outer).index_copy_(0, order, outer)
        by_token = placed.view(len(x), shape.active, shape.hidden)
        return (by_token * routing.weights[..., None]).sum(1).to(x.dtype)

    return layer


def _gated(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def _sorted(routing: Routing, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of tokens and experts in the order of the experts, int64 [R]; offsets [E + 1]."""
    chosen = routing.experts.flatten()
    counts = torch.bincount(chosen, minlength=experts)
    return chosen.argsort(stable=True), F.pad(counts.cumsum(0), (1, 0))


def _routing(tokens: int, shape: Mixture, seed: int) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, shape.experts, generator=generator)
    return Routing(*torch.softmax(logits, -1).topk(shape.active))


def _dense(shape: Mixture) -> Dense:
    return Dense(
        *(
            torch.stack([random_weight(*size, seed=e).bfloat16() for e in range(shape.experts)])
            for size in shape.projections.values()
        )
    )


def _packed(dense: Dense) -> Packed:
    return Packed(
        *(
            PackedExperts.stack([ops.quantize(expert, DIALECT_FP4) for expert in weight])
            for weight in dense
        )
    )


if __name__ == "__main__":
    main(gate, measure)
