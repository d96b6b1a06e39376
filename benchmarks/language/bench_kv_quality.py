"""What a KV cache of few bits costs a language model whose weights stay in bfloat16.

Keys after the rotary embedding and values go through each format's rounding, in transformers'
model; attention itself is in float32 for all rows, the 16-bit one too. vLLM's formats are
emulated: ``fp8`` with its default scale of 1, and ``int4_per_token_head`` with its random signs,
Hadamard matrix and zero point. Means come from the default calibration text.

    python -m benchmarks.language.bench_kv_quality [--models smollm2,shipped] [--windows 8]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dialect_kernels.cached_attention import store
from dialect_kernels.kv_cache import KvCache, slot_bytes
from dialect_kernels.reference_attention import read
from dialect_kernels.rotation import rotate_activation

from ..lib.gate import golden_gate
from ..lib.harness import ROOT, Table, main
from .bench_accuracy import write_text

PACKAGES = ("torch", "transformers")
MODELS = {"smollm2": ROOT / ".cache/models/smollm2", "shipped": ROOT / "demo/model"}
WINDOW = 512
MEAN_WINDOWS = 8
GOAL = 1.1
"""KL of the dialect cache, of that of int4 per token and head."""

Rounding = Callable[[int, str, torch.Tensor], torch.Tensor]
"""(layer, "key" or "value", bfloat16 [T, heads, D]) -> float32 [T, heads, D]"""


def measure(models: str, windows: int) -> dict[str, Any]:
    """KL divergence from the 16-bit cache for each model and format."""
    return {name: _measure(MODELS[name], windows) for name in models.split(",")}


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``kl``: a row for each format, two columns for each model."""
    head = ["KV cache"]
    for name in figures:
        head += [f"{name}: bits", "KL", "of int4"]
    rows = [head]
    for row in next(iter(figures.values()))["formats"]:
        cells = [row]
        for found in figures.values():
            one, int4 = found["formats"][row], found["formats"]["int4 per token and head"]
            cells += [
                f"{one['bits']:.2f}",
                f"{one['kl']:.4f} ± {one['kl_se']:.4f}",
                f"{one['kl'] / int4['kl']:.2f} x",
            ]
        rows.append(cells)
    return {"kl": rows}


def _measure(path: Path, count: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from dialect_plugin.calibration.options import CalibrationOptions
    from dialect_plugin.calibration.text import read_text
    from dialect_plugin.evaluation.divergence import compare

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with tempfile.TemporaryDirectory() as directory:
        options = CalibrationOptions(
            calibrate=str(write_text(Path(directory))), samples=count, sequence_length=WINDOW
        )
        text = read_text(path, options, config.vocab_size, option="--text").windows
    means = _means(model, path, config.vocab_size)
    formats: dict[str, tuple[float, Rounding]] = {
        "dialect": (4 + 8 / 32 + 8 / size, _dialect(None)),
        "dialect + means": (4 + 8 / 32 + 8 / size, _dialect(means)),
        "fp8": (8.0, _fp8),
        "int4 per token and head": (4 + 32 / size, _int4),
    }
    with _attention_through(model, _as_it_is):
        exact = [_logits(model, window) for window in text]
    found = {}
    for name, (bits, rounding) in formats.items():
        with _attention_through(model, rounding):
            parts = [
                compare(reference, _logits(model, window), window[1:])
                for reference, window in zip(exact, text, strict=True)
            ]
        kl = torch.stack([part.divergence.mean() for part in parts])
        same = torch.cat([part.top == part.expected for part in parts]).double().mean()
        found[name] = {
            "bits": bits,
            "kl": float(kl.mean()),
            "kl_se": float(kl.std() / len(kl) ** 0.5),
            "same_top": float(same),
        }
    return {"windows": len(text), "window": WINDOW, "head_size": size, "formats": found}


@torch.inference_mode()
def _logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    return model(window[None]).logits[0, :-1].float()


def _means(model: Any, path: Path, vocabulary: int) -> dict[tuple[int, str], torch.Tensor]:
    """Means of keys and values by layer, bfloat16 numbers in float32 [heads, D]."""
    from dialect_plugin.calibration.options import CalibrationOptions
    from dialect_plugin.calibration.text import read_text

    options = CalibrationOptions(calibrate="default", samples=MEAN_WINDOWS, sequence_length=WINDOW)
    sums: dict[tuple[int, str], torch.Tensor] = {}
    tokens = 0

    def add(layer: int, kind: str, rows: torch.Tensor) -> torch.Tensor:
        found = rows.double().sum(dim=0)
        sums[layer, kind] = sums.get((layer, kind), torch.zeros_like(found)) + found
        return rows.float()

    with _attention_through(model, add):
        for window in read_text(path, options, vocabulary).windows:
            _logits(model, window)
            tokens += len(window)
    return {key: (total / tokens).bfloat16().float() for key, total in sums.items()}


def _as_it_is(layer: int, kind: str, rows: torch.Tensor) -> torch.Tensor:
    return rows.float()


def _dialect(means: dict[tuple[int, str], torch.Tensor] | None) -> Rounding:
    def rounding(layer: int, kind: str, rows: torch.Tensor) -> torch.Tensor:
        count, heads, size = rows.shape
        mean = None if means is None else means[layer, kind].contiguous()
        memory = torch.empty(1, heads, count, slot_bytes(size), dtype=torch.uint8)
        cache = KvCache(memory, size, key_mean=mean)
        store(cache, rows, rows, torch.arange(count))
        found = rotate_activation(read(cache, torch.arange(count))[0])
        return found if mean is None else found + mean

    return rounding


def _fp8(layer: int, kind: str, rows: torch.Tensor) -> torch.Tensor:
    return rows.float().clamp(-448, 448).to(torch.float8_e4m3fn).float()


def _int4(layer: int, kind: str, rows: torch.Tensor) -> torch.Tensor:
    size = rows.shape[-1]
    draw = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (size,), generator=draw) * 2.0 - 1
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < size & -size:
        upper = torch.cat([hadamard, hadamard], 1)
        hadamard = torch.cat([upper, torch.cat([hadamard, -hadamard], 1)])
    hadamard /= hadamard.shape[0] ** 0.5
    groups = (*rows.shape[:-1], -1, hadamard.shape[0])
    x = ((rows.float() * signs).view(groups) @ hadamard).view(rows.shape)
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((most - least) / 15).clamp(min=1e-6)
    zero = (-least / scale).round().clamp(0, 15)
    x = ((x / scale + zero).round().clamp(0, 15) - zero) * scale
    return (x.view(groups) @ hadamard.T).view(rows.shape) * signs


@contextmanager
def _attention_through(model: Any, rounding: Rounding) -> Iterator[None]:
    """Let a model attend in float32 over keys and values that went through `rounding`."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        rounded = [
            rounding(module.layer_idx, kind, x[0].transpose(0, 1)).transpose(0, 1)[None]
            for kind, x in (("key", key), ("value", value))
        ]
        out = torch.nn.functional.scaled_dot_product_attention(
            query.float(), *rounded, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("benchmark_kv_cache", attend)
    AttentionMaskInterface.register("benchmark_kv_cache", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("benchmark_kv_cache")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--windows", type=int, default=8)


if __name__ == "__main__":
    main(golden_gate, measure, _arguments)
