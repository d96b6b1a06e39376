"""Times of an H200 that compiled code lets one expect. **Predicted: nothing here was measured.**

The four products of a LLaMA-3-8B layer, quantization of the tokens included, beside PyTorch's
bfloat16 by the same model and beside the bytes that have to be read and written. What compilers
made of the products' kernels (instructions, registers, shared memory) is that of
:mod:`.bench_machine_code`; quantizers are compiled here; the rest is :class:`Card`.

A launch waits for the one before it. Programs of the fused kernel that share a processor share it:
their steps take the longest of issuing instructions, reading from the L2 cache and multiplying, but
not less than one program takes alone; programs beyond those that fit wait for the next wave. Memory
is a second limit for the whole product. A quantizer is limited by memory, by instructions or by
accesses of the L1 cache.

    python -m benchmarks.kernels.bench_predicted_time
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import triton

from dialect_kernels.gpu import quantize_activations, quantize_fp8
from dialect_kernels.gpu.tuning import FROM_DECODED, GemmPlan, choose

from ..lib.harness import RESULTS, Table, main, read_result
from ..lib.machine_code import MachineCode, compile_kernel, faults, programs_at_once
from ..lib.shapes import LLAMA_8B

PACKAGES = ("triton",)
TOKENS = (1, 16, 64, 128, 512, 4096, 16384)
_BETWEEN = 32
"""Tokens of two neighbours in the search for the slowest: at most this share of them apart."""
_MOST_TOKENS = 65536
FORMATS = {"dialect": "W4A4", "fp8": "W4A8", "none": "W4A16"}
GOALS = {1: 2.5, 16: 2.1, 64: 1.8, 128: 1.3, 512: 1.5, 4096: 1.6, 16384: 1.6}
"""Times as fast as bfloat16 that W4A4 is to be, over the four products."""
WAYS = {"": (False, False), ", fast": (True, False), ", kept": (False, True)}
WAYS[", kept, fast"] = (True, True)
"""Whether sums stay in the MMA's accumulator, and whether weights are kept decoded."""
SLOW_GOAL = 1.3
"""The goal for 4096 tokens and more where sums have to leave the MMA's accumulator."""
LEAST = {"dialect": 1.0, "fp8": 1.0, "none": 0.9}
WEIGHT_BYTES = 17 / 32
_ROW_IN_REGISTERS = 8192
_PARTS_TOKENS = 1024
_PART_BYTES = (60 << 20) * 7 // 16


@dataclass(frozen=True)
class Card:
    """What an H200 is taken to do; none of it by our own measurement but what a copy reaches.

    Attributes:
        processors, clock: multiprocessors and Hz.
        memory, cache: bytes a second from memory (what a copy reached), and from the L2 cache.
        bfloat16, fp8, fp8_slow: operations a second of the library's GEMMs; FP8 with sums in the
            accumulator, and with every step added in float32 (a published figure).
        launch, split: seconds of a launch that waits for another one in a graph; and from the sums
            of several programs to the result.
        issue: share of the cycles in which a scheduler issues.
        chain: cycles from one instruction of a warp to its next one.
        fp8_products: of one processor's FP8 MMA in a cycle.
        lookups: cycles of a processor's L1 cache for 32 elements of the dialect quantizer.
        quantizer: the shortest time of a quantizer, and of one that reads a row twice.
    """

    processors: int = 132
    clock: float = 1.755e9
    memory: float = 4.3e12
    cache: float = 5.5e12
    bfloat16: float = 790e12
    fp8: float = 1500e12
    fp8_slow: float = 1175e12
    launch: float = 2.3e-6
    split: float = 2.0e-6
    issue: float = 0.85
    chain: float = 2.5
    fp8_products: float = 4096
    lookups: float = 8
    quantizer: tuple[float, float] = (1.2e-6, 2.5e-6)


H200 = Card()


@dataclass(frozen=True)
class Product:
    """[T, K] times [N, K]."""

    tokens: int
    features: int
    columns: int

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.tokens * self.features * self.columns

    def bytes(self, of_weight: float, of_token: float) -> float:
        """What is read and written, the result in 16 bits."""
        weight = self.features * self.columns * of_weight
        return weight + self.tokens * (self.columns * of_token + 2 * self.features)


def gate() -> list[str]:
    """Spilled registers of the quantizers; the products' kernels have a gate of their own."""
    return [fault for code in _quantizers().values() for fault in faults(code, 90)]


def measure() -> dict[str, Any]:
    """Seconds by activation format, tokens and product; `fast`: sums stay in the accumulator."""
    each = {kind: len(code.without_divisions()) / 32 for kind, code in _quantizers().items()}
    rows = []
    for tokens in TOKENS:
        for name, (features, columns) in LLAMA_8B.fused_projections.items():
            product = Product(tokens, features, columns)
            row = {"tokens": tokens, "product": name, "bfloat16": bfloat16(product)}
            row["floor"] = product.bytes(WEIGHT_BYTES, 2) / H200.memory
            for kind in FORMATS:
                for how, options in WAYS.items():
                    row[f"{kind}{how}"] = layer(product, kind, each, *options)
            rows.append(row)
    least = {
        f"{kind}{how}": _slowest(kind, how, each) for kind in FORMATS for how in ("", ", kept")
    }
    return {"card": asdict(H200), "instructions": each, "rows": rows, "least": least}


def _slowest(kind: str, how: str, instructions: dict[str, float]) -> tuple[float, int]:
    """Times as fast as bfloat16 for the number of tokens that gains least, and that number."""
    found = []
    tokens = 1
    while tokens <= _MOST_TOKENS:
        products = [Product(tokens, *shape) for shape in LLAMA_8B.fused_projections.values()]
        ours = sum(layer(product, kind, instructions, *WAYS[how]) for product in products)
        found.append((sum(map(bfloat16, products)) / ours, tokens))
        tokens += 1 + tokens // _BETWEEN
    return min(found)


def _quantizers() -> dict[str, MachineCode]:
    """The quantizers' code for Hopper, rows of 4096; a thread of each has 32 elements."""
    common = {"CHUNK": 4096, "ONE_CHUNK": True, "OPERANDS": True, "ROTATED": False}
    common |= {"ALIGNED": True, "ASM": True}
    dialect = common | {"DIALECTS": 32, "B": 32, "SALIENT": False, "GROUPED": False}
    dialect |= dict.fromkeys(("p_salient", "p_group", "p_totals"))
    kernel = quantize_activations._quantize_activation_kernel
    fp8 = quantize_fp8._quantize_activation_fp8_kernel
    return {
        "dialect": compile_kernel(kernel, 90, dialect, num_warps=4),
        "fp8": compile_kernel(fp8, 90, common | {"NATIVE": True}, num_warps=4),
    }


def bfloat16(product: Product) -> float:
    """Seconds of the library's product."""
    read = product.bytes(2, 2) / H200.memory
    return H200.launch + max(read, product.operations / H200.bfloat16)


def layer(
    product: Product,
    kind: str,
    instructions: dict[str, float],
    fast: bool = False,
    kept: bool = False,
) -> float:
    """Seconds of a linear layer by the plan that the dispatch derives for it."""
    table = "sixteen_bits" if kind == "none" else "fp8"
    shape = product.features, product.columns
    plan = choose(product.tokens, *shape, kind, "no such device", H200.processors, table)
    quantized = 0.0 if kind == "none" else quantizing(product, kind, instructions[kind])
    if kept and product.tokens >= FROM_DECODED:
        return quantized + multiplied(product, kind, fast)
    if plan.kind == "scratch":
        return quantized + decoded(product, kind, fast)
    cleared = H200.launch if kind == "none" and plan.splits > 1 else 0.0
    return quantized + cleared + fused(product, plan, kind != "none")


def quantizing(product: Product, kind: str, instructions: float) -> float:
    """Seconds of the tokens' quantizer."""
    elements = product.tokens * product.columns
    twice = product.columns > _ROW_IN_REGISTERS
    padded = -(-product.columns // _ROW_IN_REGISTERS) * _ROW_IN_REGISTERS if twice else 0
    work = max(elements, product.tokens * padded) / 32 / H200.processors / H200.clock
    issue = work * instructions / 4 / H200.issue
    looked_up = work * H200.lookups if kind == "dialect" else 0.0
    moved = 3 * elements / H200.memory
    return H200.launch + max(moved, issue, looked_up, H200.quantizer[twice])


def fused(product: Product, plan: GemmPlan, eight_bits: bool) -> float:
    """Seconds of the fused kernel."""
    code = _code(plan, eight_bits)
    bytes_of_token = 1 if eight_bits else 2
    products = H200.fp8_products * (1 if eight_bits else 0.5)
    weights = plan.features * plan.columns
    read = weights * WEIGHT_BYTES
    read += min(product.tokens, plan.tokens) * plan.columns * bytes_of_token
    instructions = weights * code["per_weight"] / 32
    step = max(
        instructions / 4 / H200.issue,
        read / (H200.cache / H200.processors / H200.clock),
        weights * plan.tokens / products,
    )
    alone = max(step, H200.chain * instructions / plan.num_warps)
    tiles = -(-product.tokens // plan.tokens) * -(-product.features // plan.features)
    waiting = -(-tiles * plan.splits // H200.processors)
    steps = -(-product.columns // (plan.columns * plan.splits))
    cycles = 0.0
    while waiting > 0:
        together = min(waiting, code["at_once"])
        cycles += steps * max(together * step, alone)
        waiting -= together
    memory = product.bytes(WEIGHT_BYTES, bytes_of_token) / H200.memory
    return H200.launch + max(cycles / H200.clock, memory) + (plan.splits > 1) * H200.split


def decoded(product: Product, kind: str, fast: bool) -> float:
    """Seconds of decoding to memory, in parts that stay in the cache or at once, and the GEMM."""
    width = 2 if kind == "none" else 1
    weights = product.features * product.columns
    inside = product.tokens <= _PARTS_TOKENS
    parts = -(-weights * width // _PART_BYTES) if inside else 1
    written = weights * width / (H200.cache if inside else H200.memory)
    decoding = weights * WEIGHT_BYTES / H200.memory + written
    tokens = product.bytes(0, width) / H200.memory
    multiplying = max(product.operations / _rate(kind, fast), tokens + written)
    return 2 * parts * H200.launch + decoding + multiplying


def multiplied(product: Product, kind: str, fast: bool) -> float:
    """Seconds of the library's GEMM with a weight that is kept decoded."""
    width = 2 if kind == "none" else 1
    read = product.bytes(width, width) / H200.memory
    return H200.launch + max(read, product.operations / _rate(kind, fast))


def _rate(kind: str, fast: bool) -> float:
    return H200.bfloat16 if kind == "none" else H200.fp8 if fast else H200.fp8_slow


def _code(plan: GemmPlan, eight_bits: bool) -> dict[str, Any]:
    """What the installed Triton made of a plan on Hopper, from the committed result."""
    rows = read_result(RESULTS / "machine_code.json").figures["triton"][triton.__version__]
    operands = "FP8" if eight_bits else "bfloat16"
    row = next(
        row
        for row in rows
        if row["gpu"].startswith("sm_90")
        and (row["operands"], row["tokens"], row["features"])
        == (operands, plan.tokens, plan.features)
    )
    code = MachineCode(row["registers"], 0, int(row["shared_kib"] * 1024), "", "")
    return row | {"at_once": programs_at_once(code, 90, plan.num_warps)}


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``layer``: the sum of the four products, ``kept``: with weights that are kept decoded;
    ``least``: the tokens that gain least; ``products``: W4A4 and bfloat16 of each."""
    rows = figures["rows"]

    def total(tokens: int, key: str) -> float:
        return sum(float(row[key]) for row in rows if row["tokens"] == tokens)

    head = ["tokens", "floor", "bfloat16", *(f"{name}, µs" for name in FORMATS.values())]
    summed = [[*head, "W4A4, times as fast as bfloat16", "goal", "W4A8", "W4A16"]]
    for tokens in TOKENS:
        keys = ("floor", "bfloat16", *FORMATS)
        cells = [_microseconds(total(tokens, key)) for key in keys]
        summed.append([str(tokens), *cells, *_ratios(tokens, total)])
    kept = [["tokens", *head[3:], *summed[0][6:]]]
    for tokens in TOKENS:
        if tokens >= FROM_DECODED:
            cells = [_microseconds(total(tokens, f"{kind}, kept")) for kind in FORMATS]
            kept.append([str(tokens), *cells, *_ratios(tokens, total, ", kept")])
    least = [["activations", "decoded in each product", "tokens", "kept decoded", "tokens"]]
    for kind, name in FORMATS.items():
        (plain, at), (ahead, there) = (figures["least"][f"{kind}{how}"] for how in ("", ", kept"))
        cells = [f"{_floor(ratio)}{_mark(ratio, kind)}" for ratio in (plain, ahead)]
        least.append([name, cells[0], str(at), cells[1], str(there)])
    each = [["tokens", "product", "floor", "bfloat16", "W4A4", "ratio", "W4A8", "W4A16"]]
    for row in rows:
        ratio = _floor(row["bfloat16"] / row["dialect"])
        cells = [_microseconds(row[key]) for key in ("floor", "bfloat16", "dialect")]
        others = [_microseconds(row[key]) for key in ("fp8", "none")]
        each.append([str(row["tokens"]), row["product"], *cells, ratio, *others])
    return {"layer": summed, "kept": kept, "least": least, "products": each}


def _ratios(tokens: int, total: Callable[[int, str], float], how: str = "") -> list[str]:
    """Times as fast as bfloat16, and whether that reaches the goal."""
    peer = total(tokens, "bfloat16")
    ours = peer / total(tokens, f"dialect{how}")
    shown, goal = _floor(ours), f"{GOALS[tokens]}"
    reached = ours >= GOALS[tokens]
    quick = peer / total(tokens, f"dialect{how}, fast")
    if not math.isclose(quick, ours):
        slow = SLOW_GOAL if tokens >= 4096 else GOALS[tokens]
        shown, goal = f"{_floor(ours)}; fast {_floor(quick)}", f"{slow}; fast {GOALS[tokens]}"
        reached = ours >= slow and quick >= GOALS[tokens]
    others = {kind: peer / total(tokens, f"{kind}{how}") for kind in ("fp8", "none")}
    marks = [f"{_floor(value)}{_mark(value, kind)}" for kind, value in others.items()]
    return [shown, f"{goal}: {'reached' if reached else 'missed'}", *marks]


def _mark(ratio: float, kind: str) -> str:
    return "" if ratio >= LEAST[kind] else " (missed)"


def _floor(value: float) -> str:
    """Two digits, never rounded up to a goal."""
    return f"{math.floor(100 * value) / 100:.2f}"


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}" if seconds < 1e-4 else f"{1e6 * seconds:.0f}"


if __name__ == "__main__":
    main(gate, measure)
