"""Pack the small LLaMA that ships, read a layer back, and compare it with the 16-bit weight.

    python -m examples.quantize [MODEL] [DST]

MODEL is a 16-bit checkpoint. Without DST the packed one is thrown away.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

from dialect_kernels import dialect_linear
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.reader import open_packed

MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
LAYER = "model.layers.0.mlp.down_proj"


def main(model: Path, destination: Path) -> None:
    """Convert `model` into `destination` and print what one layer has lost."""
    result = convert(model, destination)
    print(f"{len(result.layers)} layers: {result.source_bytes:,} -> {result.packed_bytes:,} bytes")

    packed = open_packed(destination).read(LAYER)
    with safe_open(model / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor(f"{LAYER}.weight").float()
    error = packed.dequantize() - weight
    sqnr = 10 * torch.log10(weight.square().sum() / error.square().sum())
    print(f"{LAYER}: {packed.bits_per_element:.3f} bits per weight, SQNR {sqnr:.1f} dB")

    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    exact = x @ weight.T
    for name, activation_format in (("W4A4", "dialect"), ("W4A8", "fp8"), ("W4A16", "none")):
        y = dialect_linear(x, packed, activation_format=activation_format)
        print(f"{name}: relative error {(y - exact).norm() / exact.norm():.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        given = [Path(argument) for argument in sys.argv[1:]]
        main(*given, *(MODEL, Path(folder) / "packed")[len(given) :])
