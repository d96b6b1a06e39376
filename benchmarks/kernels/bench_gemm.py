"""The linear layer on a GPU against cuBLAS, FP8 and other 4-bit kernels, at the shapes of LLaMA-3.

Every time is that of a whole layer as an engine calls it: activations come in bfloat16 and are
quantized in the call, the result is bfloat16. Weights are cold and calls lie in CUDA graphs, see
:mod:`benchmarks.lib.gpu_timing`. *MXFP4 here* is this project's own kernel on weights whose blocks
all use FP4's dialect.

    python -m benchmarks.kernels.bench_gemm                    # needs a GPU
    python -m benchmarks.kernels.bench_gemm --models 8B --tokens 1 16 512 4096
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from dialect_kernels import (
    DIALECT_FP4,
    PackedTensor,
    baselines,
    dialect_linear,
    quantize,
    reference,
)
from dialect_kernels.ops import linear
from dialect_plugin.scheme import METHODS

from ..lib.gate import golden_faults
from ..lib.gpu_timing import (
    Ceilings,
    copies_for,
    measure_ceilings,
    microseconds,
    need_gpu,
    reason,
    time_graphs,
)
from ..lib.harness import Report, Table, main
from ..lib.shapes import LLAMA_8B, LLAMA_70B
from .peer_kernels import PEERS, Peer
from .random_data import random_tokens, random_weight

PACKAGES = ("torch", "triton")
MODELS = {"8B": LLAMA_8B, "70B": LLAMA_70B}
TOKENS = tuple(2**power for power in range(15))
OURS = {method.bits: name for name, method in METHODS.items()}
MXFP4_HERE = "MXFP4 here, W4A8"
BASELINE = "bfloat16"
FP8 = "FP8"
Methods: TypeAlias = dict[str, tuple[Callable[[torch.Tensor, int], object], int]]
"""Name -> (call with tokens and the number of a copy, copies)."""
EIGHT_BITS = {"W4A4", "W4A8", FP8, MXFP4_HERE}


def gate() -> list[str]:
    """Faults of the kernels on this GPU.

    Raises:
        SystemExit: if there is none.
    """
    need_gpu()
    faults = golden_faults("cuda")
    for features, columns in LLAMA_8B.fused_projections.values():
        p = quantize(_weight((features, columns)))
        for tokens in (1, 40, 600):
            x = _tokens(tokens, columns)
            for name, activation_format in OURS.items():
                y = dialect_linear(x, p, None, activation_format)
                if not is_close(y, x, p, activation_format):
                    faults.append(f"{name}, {tokens} tokens, {features} x {columns}: wrong result")
    return faults


def measure(
    models: list[str],
    tokens: list[int],
    peers: Mapping[str, Peer] = PEERS,
    report: Report = lambda **_: None,
) -> dict[str, Any]:
    """Microseconds of every method for each model, layer and number of tokens.

    Args:
        models: keys of `MODELS`.
        tokens: T, each.
        peers: other projects' kernels to measure beside ours.
        report: receives ``model``, ``layer``, ``shape``, ``tokens`` and ``times`` of each.
    """
    device = torch.device("cuda")
    ceilings = measure_ceilings(device)
    missing: dict[str, str] = {}
    figures: dict[str, Any] = {
        "ceilings": dataclasses.asdict(ceilings),
        "missing": missing,
        "models": {},
    }
    for model in models:
        figures["models"][model] = {}
        for layer, shape in MODELS[model].fused_projections.items():
            methods = _prepare(shape, peers, missing)
            times = {}
            for count in tokens:
                times[str(count)] = _measure_tokens(methods, shape, count, ceilings, missing)
                found = {"tokens": count, "times": times[str(count)]}
                report(model=model, layer=layer, shape=list(shape), **found)
            figures["models"][model][layer] = {"shape": list(shape), "tokens": times}
            del methods
            gc.collect()
            torch.cuda.empty_cache()
    return figures


def options(parser: argparse.ArgumentParser) -> None:
    """Which models and numbers of tokens."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """For each model ``ratios_8b`` (median over its layers) and ``times_8b`` (every layer)."""
    made = {}
    for model, layers in figures["models"].items():
        made[f"ratios_{model.lower()}"] = _ratios(layers)
        made[f"times_{model.lower()}"] = _times(layers)
    made["missing"] = [["peer", "why it was not measured"], *map(list, figures["missing"].items())]
    return made


def plots(figures: dict[str, Any]) -> dict[str, Figure]:
    """``speed``: times faster than bfloat16 against tokens, one panel for each model."""
    models = figures["models"]
    figure = Figure(figsize=(5.4 * len(models), 4), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, (model, layers) in zip(panels, models.items(), strict=True):
        tokens = sorted(int(t) for t in next(iter(layers.values()))["tokens"])
        for method in _methods(layers):
            ratios = [_median_ratio(layers, str(t), method) for t in tokens]
            panel.plot(tokens, ratios, "o-", label=method, markersize=3)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(title=MODELS[model].name, xlabel="tokens", xscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("times faster than bfloat16")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return {"speed": figure}


def _measure_tokens(
    methods: Methods,
    shape: tuple[int, int],
    tokens: int,
    ceilings: Ceilings,
    missing: dict[str, str],
) -> dict[str, dict[str, float]]:
    x = _tokens(tokens, shape[1])
    calls = {name: (partial(call, x), copies) for name, (call, copies) in methods.items()}
    times = time_graphs(calls, failed=missing, may_fail=PEERS)
    return {
        name: microseconds(timing)
        | {"of_floor": round(_floor_s(name, shape, tokens, ceilings) / timing.median_s, 4)}
        for name, timing in times.items()
    }


def _prepare(shape: tuple[int, int], peers: Mapping[str, Peer], missing: dict[str, str]) -> Methods:
    """Every method with enough copies of its weight."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    weight = _weight(shape)
    packed = quantize(weight)
    all_fp4 = dataclasses.replace(packed, meta=(packed.meta & 0xF0) | 7)
    methods: Methods = {}

    copies = copies_for(weight.nbytes, cache)
    dense = [weight.clone() for _ in range(copies)]
    methods[BASELINE] = (lambda x, i: F.linear(x, dense[i]), copies)
    if torch.cuda.get_device_capability() >= (8, 9):
        methods[FP8] = _fp8(weight, copies_for(weight.numel(), cache))

    copies = copies_for(packed.codes.nbytes, cache)
    for name, activation_format, p in (
        *((name, how, packed) for name, how in OURS.items()),
        (MXFP4_HERE, "fp8", all_fp4),
    ):
        ours = [copy_packed(p) for _ in range(copies)]
        methods[name] = (lambda x, i, o=ours, a=activation_format: _call(x, o[i], a), copies)
    for name, peer in peers.items():
        try:
            first = peer(weight)
            first(_tokens(1, shape[1]))  # what tunes or compiles itself does so once
            calls = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
        except Exception as error:  # other projects raise anything
            missing[name] = reason(error)
        else:
            methods[name] = (lambda x, i, c=calls: c[i](x), copies)
    return methods


def _fp8(weight: torch.Tensor, copies: int) -> tuple[Callable[[torch.Tensor, int], object], int]:
    """The library's FP8 GEMM with a scale for each token and output, its fast accumulation on."""
    from dialect_kernels.gpu.quantize_fp8 import quantize_activation_fp8

    q, scale = baselines.quantize_fp8(weight)
    dense = [q.clone() for _ in range(copies)]

    def call(x: torch.Tensor, i: int) -> torch.Tensor:
        tokens, token_scale = quantize_activation_fp8(x)
        return torch._scaled_mm(
            tokens,
            dense[i].t(),
            scale_a=token_scale[:, None],
            scale_b=scale[None, :],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return call, copies


def _call(x: torch.Tensor, p: PackedTensor, activation_format: str) -> torch.Tensor:
    y: torch.Tensor = linear(
        x, p.codes, p.meta, p.row_exponent, None, p.shape[1], p.book.name, p.block_size,
        activation_format, "default",
    )  # fmt: skip
    return y


def copy_packed(p: PackedTensor) -> PackedTensor:
    """The same weight in other memory."""
    return dataclasses.replace(
        p, codes=p.codes.clone(), meta=p.meta.clone(), row_exponent=p.row_exponent.clone()
    )


def is_close(y: torch.Tensor, x: torch.Tensor, p: PackedTensor, activation_format: str) -> bool:
    """Whether y is ``x @ p.T`` within the bound of ``default`` and the rounding of bfloat16."""
    a = x.double()
    if activation_format == "dialect":
        a = reference.round_activation(x, DIALECT_FP4, p.block_size).double()
    elif activation_format == "fp8":
        q, scale = baselines.quantize_fp8(x)
        a = q.double() * scale.double()[:, None]
    w = p.dequantize().double()
    want = a @ w.T
    allowed = 2.0**-7 * (a.abs() @ w.abs().T) + 2.0**-8 * want.abs()
    return bool(((y.double() - want).abs() <= allowed).all())


def _weight(shape: tuple[int, int]) -> torch.Tensor:
    return random_weight(*shape, seed=sum(shape), device="cuda").to(torch.bfloat16)


def _tokens(tokens: int, columns: int) -> torch.Tensor:
    return random_tokens(tokens, columns, seed=tokens, device="cuda")


def _floor_s(method: str, shape: tuple[int, int], tokens: int, ceilings: Ceilings) -> float:
    features, columns = shape
    bits = {BASELINE: 16.0, FP8: 8.0}.get(method, 4.25)
    moved = int(features * columns * bits / 8) + 2 * tokens * (features + columns)
    operations = 2 * tokens * features * columns
    eight_bits = method in EIGHT_BITS or method.endswith("W4A8")
    return ceilings.floor_s(moved, operations, eight_bits)


def _methods(layers: dict[str, Any]) -> list[str]:
    """The methods that were measured for every layer and number of tokens, without the baseline."""
    found = [measured for layer in layers.values() for measured in layer["tokens"].values()]
    return [m for m in found[0] if m != BASELINE and all(m in measured for measured in found)]


def _median_ratio(layers: dict[str, Any], tokens: str, method: str) -> float:
    """Times faster than bfloat16, the median over the layers."""
    return statistics.median(
        layer["tokens"][tokens][BASELINE]["median_us"]
        / layer["tokens"][tokens][method]["median_us"]
        for layer in layers.values()
    )


def _ratios(layers: dict[str, Any]) -> Table:
    methods = _methods(layers)
    rows = [["tokens", *methods]]
    for tokens in next(iter(layers.values()))["tokens"]:
        ratios = [f"{_median_ratio(layers, tokens, method):.2f} x" for method in methods]
        rows.append([tokens, *ratios])
    return rows


def _times(layers: dict[str, Any]) -> Table:
    methods = [BASELINE, *_methods(layers)]
    rows = [["layer", "tokens", *methods]]
    for name, layer in layers.items():
        shape = " x ".join(map(str, layer["shape"]))
        for tokens, found in layer["tokens"].items():
            cells = [
                f"{found[m]['median_us']:.1f} µs ({found[m]['of_floor']:.0%})" for m in methods
            ]
            rows.append([f"{name} {shape}", tokens, *cells])
    return rows


if __name__ == "__main__":
    main(gate, measure, options)
