"""Write the golden vectors and the golden checkpoint of format version 1, from the brute force.

    python -m tests.golden.make_golden

Nothing of the package is used: bytes come from tests/support/brute_force.py, which follows
docs/reference/format.md alone. Format version 1 is frozen, so a rerun must change nothing (a test
looks). The inputs do not depend on a random generator's version: they come from the SHA-256 of
their names.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import brute_force as brute

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "triton_kernels" / "dialect_kernels" / "golden" / "vectors_v1.json"
CHECKPOINT = Path(__file__).resolve().parent / "checkpoint_v1"

RULES = ((brute.FP4, "mse"), (brute.FP4, "two_stage"), (brute.SEM, "mse"), (brute.SEM, "lut"))
EXTRA_WINDOWS = {"dialect_fp4": (7, 0), "semantic_32": (3,)}


def uniform(name: str, *shape: int) -> np.ndarray:
    """float64 in [0, 1), 52 bits each, from SHA-256 of the name and a counter."""
    count = int(np.prod(shape))
    digests = b"".join(
        hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(-(-count // 4))
    )
    return (np.frombuffer(digests, "<u8")[:count] >> np.uint64(12)).reshape(shape) / 2.0**52


def bell(name: str, *shape: int) -> np.ndarray:
    """Sum of twelve uniforms minus 6: close to Gaussian, and the same bits on every machine."""
    return uniform(name, 12, *shape).sum(axis=0) - 6


def to_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return brute.to_bf16(x.astype(np.float32))
    return x.astype(dtype)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 numbers that a stored array means."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.float32)


def array(values: np.ndarray, dtype: str | None = None) -> dict[str, Any]:
    """JSON form of an array; `dtype` where numpy has no name for it."""
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"))
    return {
        "dtype": dtype or str(values.dtype),
        "shape": list(values.shape),
        "hex": little.tobytes().hex(),
    }


def special_rows() -> np.ndarray:
    tiny, huge = 2.0**-149, float(np.finfo(np.float32).max)
    below_8 = float(np.nextafter(np.float32(8), np.float32(0)))
    rows = [
        [0.0] * 64,
        [-0.0] * 64,
        [3.0] * 64,
        [tiny] * 64,
        [i * tiny for i in range(-32, 32)],
        [2.0**-122, -(2.0**-122), 2.0**-123, 0.0] * 16,
        [2.0**-118, 2.0**-119] * 32,
        [huge, -huge] * 32,
        [huge, tiny] * 32,
        [below_8] * 64,
        [below_8, -1.0, 3.3, -0.3] * 16,
        [7.75, 7.75 - 2**-21, 7.75 + 2**-21, 0.25, 0.25 - 2**-26, -0.25, 4.0, 0.1] * 8,
        [i / 4 for i in range(32)] + [-i / 4 for i in range(32)],
        [(2 * i + 1) / 8 for i in range(-32, 32)],
        [1.0] * 16 + [0.0] * 16 + [2.0**-20] * 16 + [2.0**-13] * 16,
        [7.5, 5.5, 4.0] + [0.0] * 61,
    ]
    return np.array(rows, np.float32)


def tied_rows() -> np.ndarray:
    """Blocks of 32 in which dialects 0 and 1 have exactly the same error and both win."""
    rows, pairs = 6, 6
    step = np.floor(uniform("ties", rows, pairs) * 2**20) * 2.0**-21
    rest = uniform("below the first threshold", rows, 12) * 0.23 + 0.01
    block = np.concatenate([5 - step, -5 - step, np.full((rows, 8), 7.5), -rest], axis=1)
    order = np.argsort(uniform("order", 32))
    return block[:, order].astype(np.float32)


def inputs() -> dict[str, tuple[np.ndarray, str]]:
    """Named inputs: stored bits and dtype."""
    blocks = np.exp2(np.floor(uniform("blocks", 3, 12) * -18)).repeat(16, axis=1)
    channels = np.exp(1.5 * bell("channels", 128))
    any_bits = (uniform("any bits", 3, 64) * 2.0**32).astype(np.uint32).view(np.float32)
    any_bits = np.where(np.isfinite(any_bits), any_bits, np.float32(0))
    tails = bell("heavy", 3, 96) / np.sqrt(uniform("tails", 3, 96) + 0.01)
    levels = np.floor(uniform("levels", 4, 96) * 31) - 15  # half-units of a grid, as numbers
    levels[:, ::16] = 15
    tokens = bell("tokens", 3, 128)
    tokens[1, 5] *= 500
    broken = bell("broken", 4, 96)
    broken[1, 7], broken[2, 95] = np.nan, -np.inf
    plain = {
        "bell float32": (bell("bell", 3, 100), "float32"),
        "channels bfloat16": (bell("weight", 4, 128) * channels, "bfloat16"),
        "heavy float16": (tails, "float16"),
        "wide float32": (bell("wide", 3, 192) * blocks, "float32"),
        "quarters float32": (np.floor(uniform("quarters", 4, 64) * 63 - 31) / 4, "float32"),
        "ties float32": (tied_rows(), "float32"),
        "special float32": (special_rows(), "float32"),
        "any bits float32": (any_bits, "float32"),
        "no rows float32": (np.zeros((0, 64)), "float32"),
        "no columns bfloat16": (np.zeros((2, 0)), "bfloat16"),
        "levels float32": (levels / 2, "float32"),
        "whole tokens bfloat16": (np.floor(uniform("whole", 3, 96) * 129) - 64, "bfloat16"),
        "tokens float32": (tokens, "float32"),
        "tokens bfloat16": (tokens, "bfloat16"),
        "tokens float16": (tokens, "float16"),
        "short tokens float32": (bell("short", 2, 100), "float32"),
        "broken tokens bfloat16": (broken, "bfloat16"),
        "broken tokens float32": (broken, "float32"),
        "bias of 3 float32": (bell("bias of 3", 3), "float32"),
        "bias of 4 bfloat16": (bell("bias of 4", 4), "bfloat16"),
    }
    return {name: (to_bits(x, dtype), dtype) for name, (x, dtype) in plain.items()}


MATRICES = (
    "bell float32",
    "channels bfloat16",
    "heavy float16",
    "wide float32",
    "quarters float32",
    "ties float32",
    "special float32",
    "any bits float32",
    "no rows float32",
    "no columns bfloat16",
    "levels float32",
)


def stored(packed: brute.Packed) -> dict[str, Any]:
    return {
        "codes": array(packed.codes),
        "meta": array(packed.meta),
        "row_exponent": array(packed.row_exponent),
    }


def quantize_cases(read: dict[str, np.ndarray]) -> dict[str, tuple[dict[str, Any], brute.Packed]]:
    cases = {}
    for name in MATRICES:
        for book, rule in RULES:
            for block_size in (16, 32, 64):
                windows: tuple[int | None, ...] = (None,)
                if name == "wide float32" and block_size == 16:
                    windows = (None, *EXTRA_WINDOWS[book.name])
                for window in windows:
                    packed = brute.quantize(read[name], book, block_size, rule, window)
                    case = {
                        "kind": "quantize",
                        "input": name,
                        "shape": list(packed.shape),
                        "book": book.name,
                        "block_size": block_size,
                        "rule": rule,
                        "window": window,
                        "expected": stored(packed),
                    }
                    title = f"quantize {name}, {book.name}, block {block_size}, {rule}"
                    if window is not None:
                        title += f", window {window}"
                    cases[title] = case, packed
    return cases


def decode_case(book: brute.Book, row_exponent: int) -> dict[str, Any]:
    """Every code under every meta byte, the reserved ones too."""
    codes = np.array([low | (low + 1) << 4 for low in range(0, 16, 2)], np.uint8)
    codes, meta = np.tile(codes, 256)[None], np.arange(256, dtype=np.uint8)[None]
    rows = np.array([row_exponent], np.int8)
    packed = brute.decode(codes, meta, rows, (1, 4096), book, 16)
    e4m3 = np.zeros((1, 4096), np.uint8)
    for k in range(4096):
        value = abs(int(packed.halves[0, k])) * brute.Fraction(2) ** (
            4 - int(packed.deltas[0, k // 16])
        )
        code = k % 16  # the sign of a code is the sign of its E4M3 number: code 8 reads as -0
        e4m3[0, k] = brute.E4M3.index(value) | (code >> 3) << 7
    return {
        "kind": "decode",
        "shape": [1, 4096],
        "book": book.name,
        "block_size": 16,
        "stored": stored(packed),
        "expected": {
            "e4m3": array(e4m3),
            "scale": array(np.array([2.0 ** (row_exponent - 5)], np.float32)),
        },
    }


def round_activation_cases(read: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    cases = {}
    for name in ("tokens float32", "short tokens float32", "broken tokens float32"):
        for book in brute.BOOKS:
            for block_size in (16, 32, 64):
                values = brute.round_activation(read[name], book, block_size)
                cases[f"round_activation {name}, {book.name}, block {block_size}"] = {
                    "kind": "round_activation",
                    "input": name,
                    "book": book.name,
                    "block_size": block_size,
                    "expected": {"values": array(values.astype(np.float32))},
                }
    return cases


# (tokens, weight's input, bias)
LINEAR = (
    ("tokens float32", "channels bfloat16", None),
    ("tokens bfloat16", "channels bfloat16", "bias of 4 bfloat16"),
    ("tokens float16", "channels bfloat16", "bias of 4 bfloat16"),
    ("short tokens float32", "bell float32", "bias of 3 float32"),
    ("broken tokens bfloat16", "heavy float16", "bias of 3 float32"),
)


def linear_case(
    tokens: tuple[np.ndarray, str],
    packed: brute.Packed,
    bias: np.ndarray | None,
    activation_format: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(output bits, sum of the magnitudes of the products, float32)."""
    x = from_bits(*tokens)
    weight = packed.values()
    if activation_format == "none":
        # exact in float32 in any order, so every implementation must give these bits
        y = (x.astype(np.float64) @ weight.T).astype(np.float32)
        y = y if bias is None else (y + bias).astype(np.float32)
        operand = x.astype(np.float64)
    else:
        y = brute.linear(x, packed, bias, activation_format)
        if activation_format == "dialect":
            operand = brute.round_activation(x, packed.book, packed.block_size)
        else:
            operand = np.full(x.shape, np.nan)
            for t in np.flatnonzero(np.isfinite(x).all(axis=1)):
                values, scale = brute.fp8_row(x[t])
                operand[t] = values * scale
    magnitude = np.abs(np.nan_to_num(operand)) @ np.abs(weight).T
    return to_bits(y, tokens[1]), magnitude.astype(np.float32)


def linear_cases(
    stored_inputs: dict[str, tuple[np.ndarray, str]],
    read: dict[str, np.ndarray],
    quantized: dict[str, tuple[dict[str, Any], brute.Packed]],
) -> dict[str, dict[str, Any]]:
    cases = {}
    plans = [
        (tokens, weight, bias, activation_format)
        for tokens, weight, bias in LINEAR
        for activation_format in ("dialect", "fp8")
    ]
    plans.append(("whole tokens bfloat16", "levels float32", None, "none"))
    for tokens, weight, bias, activation_format in plans:
        for book in brute.BOOKS:
            for block_size in (16, 32, 64):
                title = f"quantize {weight}, {book.name}, block {block_size}, mse"
                y, magnitude = linear_case(
                    stored_inputs[tokens],
                    quantized[title][1],
                    None if bias is None else read[bias],
                    activation_format,
                )
                dtype = stored_inputs[tokens][1]
                cases[
                    f"linear {activation_format}, {tokens} x {weight}, {book.name}, "
                    f"block {block_size}" + (", bias" if bias else "")
                ] = {
                    "kind": "linear",
                    "input": tokens,
                    "weight": title,
                    "bias": bias,
                    "activation_format": activation_format,
                    "expected": {"y": array(y, dtype), "sum_of_magnitudes": array(magnitude)},
                }
    return cases


def vectors() -> dict[str, Any]:
    stored_inputs = inputs()
    read = {name: from_bits(*stored) for name, stored in stored_inputs.items()}
    quantized = quantize_cases(read)
    cases: dict[str, Any] = {title: case for title, (case, _) in quantized.items()}
    for book, row_exponent in ((brute.FP4, -120), (brute.SEM, 125)):
        title = f"decode every byte, {book.name}, row exponent {row_exponent}"
        cases[title] = decode_case(book, row_exponent)
    cases |= round_activation_cases(read)
    cases |= linear_cases(stored_inputs, read, quantized)
    return {
        "format_version": 1,
        "inputs": {name: array(bits, dtype) for name, (bits, dtype) in stored_inputs.items()},
        "cases": cases,
    }


def vectors_text() -> str:
    return text_of(vectors())


def text_of(data: dict[str, Any]) -> str:
    """One line a case, so that a difference shows which case changed."""
    parts = []
    for section in ("inputs", "cases"):
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in data[section].items()]
        parts.append(f'"{section}": {{\n' + ",\n".join(lines) + "\n}")
    return f'{{"format_version": {data["format_version"]},\n' + ",\n".join(parts) + "}\n"


# The checkpoint: one small LLaMA layer, packed.
HIDDEN, INTERMEDIATE, VOCABULARY = 64, 96, 16
LAYER = "model.layers.0"
LINEARS = {
    f"{LAYER}.self_attn.q_proj": (HIDDEN, HIDDEN, 32),
    f"{LAYER}.self_attn.k_proj": (HIDDEN, HIDDEN, 32),
    f"{LAYER}.self_attn.v_proj": (HIDDEN, HIDDEN, 32),
    f"{LAYER}.self_attn.o_proj": (HIDDEN, HIDDEN, 32),
    f"{LAYER}.mlp.gate_proj": (INTERMEDIATE, HIDDEN, 32),
    f"{LAYER}.mlp.up_proj": (INTERMEDIATE, HIDDEN, 32),
    f"{LAYER}.mlp.down_proj": (HIDDEN, INTERMEDIATE, 16),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "quantization_config": {
        "quant_method": "blockdialect",
        "format_version": 1,
        "serialized": True,
        "book": "dialect_fp4",
        "block_size": 32,
        "activation_format": "dialect",
        "ignore": ["lm_head"],
        "overrides": {f"{LAYER}.mlp.down_proj": {"block_size": 16}},
        "lm_head": False,
    },
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY,
}


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors file, written out here so that no library's version can change its bytes."""
    names = {"uint8": "U8", "int8": "I8", "uint16": "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, bits in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        start, data = len(data), data + bits.astype(bits.dtype.newbyteorder("<")).tobytes()
        header[name] = {
            "dtype": names[str(bits.dtype)],
            "shape": list(bits.shape),
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def checkpoint_files() -> dict[str, bytes]:
    """Contents of the checkpoint's files; expected.json has the SHA-256 of its float32 values."""
    tensors: dict[str, np.ndarray] = {}
    hashes = {}
    for name, shape in (
        ("model.embed_tokens", (VOCABULARY, HIDDEN)),
        (f"{LAYER}.input_layernorm", (HIDDEN,)),
        (f"{LAYER}.post_attention_layernorm", (HIDDEN,)),
        ("model.norm", (HIDDEN,)),
    ):
        values = bell(name, *shape) if len(shape) == 2 else 1 + bell(name, *shape) / 8
        tensors[f"{name}.weight"] = to_bits(values, "bfloat16")
    for name, (rows, columns, block_size) in LINEARS.items():
        values = bell(name, rows, columns) * np.exp(bell(f"{name} channels", columns)) / 8
        source = from_bits(to_bits(values, "bfloat16"), "bfloat16")
        packed = brute.quantize(source, brute.FP4, block_size)
        tensors[f"{name}.weight_packed"] = packed.codes
        tensors[f"{name}.weight_meta"] = packed.meta
        tensors[f"{name}.weight_row_exponent"] = packed.row_exponent
        decoded = packed.values().astype("<f4")
        hashes[name] = hashlib.sha256(decoded.tobytes()).hexdigest()
    return {
        "config.json": (json.dumps(CONFIG, indent=2) + "\n").encode(),
        "model.safetensors": safetensors_bytes(tensors),
        "expected.json": (json.dumps({"sha256": hashes}, indent=2) + "\n").encode(),
    }


def main() -> None:
    VECTORS.parent.mkdir(exist_ok=True)
    VECTORS.write_text(vectors_text(), encoding="utf-8")
    CHECKPOINT.mkdir(exist_ok=True)
    for name, content in checkpoint_files().items():
        (CHECKPOINT / name).write_bytes(content)


if __name__ == "__main__":
    main()
