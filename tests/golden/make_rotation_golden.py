"""Write the golden vectors of rotated layers, which format version 2 brought, from the brute force.

    python -m tests.golden.make_rotation_golden

As :mod:`tests.golden.make_golden`, whose inputs and JSON form it shares: nothing of the package is
used, and a rerun must change nothing (a test looks).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.golden.make_golden import (
    ROOT,
    RULES,
    array,
    bell,
    from_bits,
    stored,
    text_of,
    to_bits,
    uniform,
)
from tests.support import brute_force as brute

VECTORS = ROOT / "triton_kernels" / "dialect_kernels" / "golden" / "rotation_v2.json"
ROTATION = "hadamard_32"


def special_rows() -> np.ndarray:
    """Subnormal numbers before and after the rotation, zeros, outliers and huge numbers."""
    tiny, sign = 2.0**-149, (-1.0) ** np.arange(64)
    rows = [
        [0.0] * 64,
        [-0.0] * 64,
        [tiny] * 64,
        [i * tiny for i in range(-32, 32)],
        [i * 2.0**-133 for i in range(64)],
        [2.0**-118, 2.0**-119] * 32,
        [100.0] + [1.0] * 63,
        [0.0] * 40 + [3.3] + [0.0] * 23,
        [2.0**122 * s for s in sign],
        [3.0e38] + [0.0] * 63,
    ]
    return np.array(rows, np.float32)


def inputs() -> dict[str, tuple[np.ndarray, str]]:
    """Named inputs: stored bits and dtype."""
    channels = np.exp(1.5 * bell("channels", 96))
    tokens = bell("tokens", 3, 96)
    tokens[:, 5] *= 500
    broken = bell("broken", 5, 64)
    broken[1, 7], broken[2, 63], broken[3] = np.nan, -np.inf, 2.0**124
    orders = np.exp2(np.floor(uniform("orders", 3, 64) * 40) - 20)
    plain = {
        "rotated weight float32": (bell("weight", 4, 96) * channels, "float32"),
        "rotated weight bfloat16": (bell("weight", 3, 64), "bfloat16"),
        "rotated orders float32": (bell("orders", 3, 64) * orders, "float32"),
        "rotated orders float16": (bell("orders", 3, 64), "float16"),
        "rotated special float32": (special_rows(), "float32"),
        "rotated tokens float32": (tokens, "float32"),
        "rotated tokens bfloat16": (tokens, "bfloat16"),
        "rotated tokens float16": (tokens, "float16"),
        "rotated broken tokens bfloat16": (broken, "bfloat16"),
        "rotated bias of 3 float32": (bell("bias of 3", 3), "float32"),
        "rotated bias of 4 bfloat16": (bell("bias of 4", 4), "bfloat16"),
    }
    return {name: (to_bits(x, dtype), dtype) for name, (x, dtype) in plain.items()}


MATRICES = (
    "rotated weight float32",
    "rotated weight bfloat16",
    "rotated orders float32",
    "rotated orders float16",
    "rotated special float32",
)

# (tokens, weight's input, bias)
LINEAR = (
    ("rotated tokens float32", "rotated weight float32", None),
    ("rotated tokens bfloat16", "rotated weight float32", "rotated bias of 4 bfloat16"),
    ("rotated tokens float16", "rotated weight float32", "rotated bias of 4 bfloat16"),
    ("rotated broken tokens bfloat16", "rotated weight bfloat16", "rotated bias of 3 float32"),
)


def quantize_cases(read: dict[str, np.ndarray]) -> dict[str, tuple[dict[str, Any], brute.Packed]]:
    cases = {}
    for name in MATRICES:
        for book, rule in RULES:
            for block_size in (16, 32, 64):
                packed = brute.quantize(brute.butterfly(read[name]), book, block_size, rule)
                cases[f"quantize {name}, {book.name}, block {block_size}, {rule}"] = (
                    {
                        "kind": "quantize",
                        "input": name,
                        "rotation": ROTATION,
                        "shape": list(packed.shape),
                        "book": book.name,
                        "block_size": block_size,
                        "rule": rule,
                        "window": None,
                        "expected": stored(packed),
                    },
                    packed,
                )
    return cases


def round_activation_cases(read: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    cases = {}
    for name in ("rotated tokens float32", "rotated special float32"):
        for book in brute.BOOKS:
            for block_size in (16, 32, 64):
                turned = brute.rotate_activation(read[name])
                values = brute.round_activation(turned, book, block_size)
                cases[f"round_activation {name}, {book.name}, block {block_size}"] = {
                    "kind": "round_activation",
                    "input": name,
                    "rotation": ROTATION,
                    "book": book.name,
                    "block_size": block_size,
                    "expected": {"values": array(values.astype(np.float32))},
                }
    return cases


def operand_of(turned: np.ndarray, packed: brute.Packed, activation_format: str) -> np.ndarray:
    """The numbers that are multiplied, float64 [T, K]; rows of NaN are left as they are."""
    if activation_format == "dialect":
        return brute.round_activation(turned, packed.book, packed.block_size)
    operand = turned.astype(np.float64)
    if activation_format == "fp8":
        for t in np.flatnonzero(np.isfinite(turned).all(axis=1)):
            values, scale = brute.fp8_row(turned[t])
            operand[t] = values * scale
    return operand


def linear_case(
    tokens: tuple[np.ndarray, str],
    packed: brute.Packed,
    bias: np.ndarray | None,
    activation_format: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(output bits, sum of the magnitudes of the products, float32)."""
    turned = brute.rotate_activation(from_bits(*tokens))
    if activation_format == "none":
        turned = from_bits(to_bits(turned, tokens[1]), tokens[1])
        padding = packed.halves.shape[1] - turned.shape[1]
        y = brute.linear_none(np.pad(turned, ((0, 0), (0, padding))), packed)
        y = y if bias is None else y + bias
    else:
        y = brute.linear(turned, packed, bias, activation_format)
    operand = operand_of(turned, packed, activation_format)
    magnitude = np.abs(np.where(np.isfinite(operand), operand, 0)) @ np.abs(packed.values()).T
    return to_bits(y, tokens[1]), magnitude.astype(np.float32)


def linear_cases(
    stored_inputs: dict[str, tuple[np.ndarray, str]],
    read: dict[str, np.ndarray],
    quantized: dict[str, tuple[dict[str, Any], brute.Packed]],
) -> dict[str, dict[str, Any]]:
    cases = {}
    for tokens, weight, bias in LINEAR:
        broken = "broken" in tokens
        for activation_format in ("dialect", "fp8") if broken else ("dialect", "fp8", "none"):
            for book in brute.BOOKS:
                for block_size in (16, 32, 64):
                    title = f"quantize {weight}, {book.name}, block {block_size}, mse"
                    y, magnitude = linear_case(
                        stored_inputs[tokens],
                        quantized[title][1],
                        None if bias is None else read[bias],
                        activation_format,
                    )
                    name = f"linear {activation_format}, {tokens} x {weight}, {book.name}, "
                    cases[f"{name}block {block_size}" + (", bias" if bias else "")] = {
                        "kind": "linear",
                        "input": tokens,
                        "weight": title,
                        "bias": bias,
                        "activation_format": activation_format,
                        "expected": {
                            "y": array(y, stored_inputs[tokens][1]),
                            "sum_of_magnitudes": array(magnitude),
                        },
                    }
    return cases


def vectors() -> dict[str, Any]:
    stored_inputs = inputs()
    read = {name: from_bits(*bits) for name, bits in stored_inputs.items()}
    quantized = quantize_cases(read)
    cases: dict[str, Any] = {title: case for title, (case, _) in quantized.items()}
    cases |= round_activation_cases(read)
    cases |= linear_cases(stored_inputs, read, quantized)
    return {
        "format_version": 2,
        "inputs": {name: array(bits, dtype) for name, (bits, dtype) in stored_inputs.items()},
        "cases": cases,
    }


def vectors_text() -> str:
    return text_of(vectors())


if __name__ == "__main__":
    VECTORS.write_text(vectors_text(), encoding="utf-8")
