"""What :mod:`.bench_serve` serves: models, formats, and how many requests they are sent.

Weights are random where no model of the shape is shipped: speed and bytes do not depend on their
values. The bytes of a format's layers follow from its definition; the gate compares them, for ours,
with a checkpoint that was really converted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dialect_plugin.scheme import METHODS

from ..lib.harness import ROOT
from ..lib.shapes import LLAMA_1B, LLAMA_8B, SPARSE_1B, Llama
from .checkpoints import write_checkpoint, write_config, write_tokenizer

__all__ = [
    "DEMO",
    "FORMATS",
    "SHAPES",
    "Format",
    "Load",
    "Shape",
    "layer_bytes",
    "prepare",
    "remove",
]

DEMO = ROOT / "demo" / "model"
_BLOCK_SIZE = 32
"""Of BlockDialect's defaults and of MXFP4."""


@dataclass(frozen=True)
class Load:
    """The requests of one run of ``vllm bench serve``.

    Attributes:
        at_once: requests that wait for their answers at the same time.
        prompts: requests in all.
        input_tokens, output_tokens: of each.
    """

    at_once: int
    prompts: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Shape:
    """A model and the requests it is sent.

    Attributes:
        name: in the tables.
        model: its dimensions.
        weights: those that are ``"shipped"``, a checkpoint of ``"random"`` ones, or ``"dummy"``:
            vLLM makes them up while it loads.
        context: for ``--max-model-len``, in tokens.
        loads: the requests, by the name of the table that shows their times.
    """

    name: str
    model: Llama
    weights: Literal["shipped", "random", "dummy"]
    context: int
    loads: Mapping[str, Load]


@dataclass(frozen=True)
class Format:
    """How a model is served.

    Attributes:
        name: in the tables.
        method: for ``--quantization``; None: as it is, in bfloat16.
        bits: of a weight in memory.
        row_bytes: further bytes of a weight's row; what a whole tensor has is not counted.
        environment: variables of the server beside the usual ones.
        slow: so slow that its server is started once and answers one short request.
        vocabulary: whether embeddings and output projection are quantized too.
    """

    name: str
    method: str | None
    bits: float
    row_bytes: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False
    vocabulary: bool = False


_DEMO_CONFIG = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
SHAPES = {
    "demo": Shape(
        "shipped LLaMA, 4 layers",
        Llama.from_config("shipped LLaMA", _DEMO_CONFIG),
        "shipped",
        context=512,
        loads={"single": Load(1, 24, 64, 64), "many": Load(8, 48, 64, 64)},
    ),
    "llama-3.2-1b": Shape(
        f"{LLAMA_1B.name}'s shape",
        LLAMA_1B,
        "random",
        context=512,
        loads={"single": Load(1, 2, 64, 32), "many": Load(8, 8, 64, 32)},
    ),
    "mixture": Shape(
        SPARSE_1B.name,
        SPARSE_1B,
        "random",
        context=512,
        loads={"single": Load(1, 2, 64, 32), "many": Load(8, 8, 64, 32)},
    ),
    "llama-3-8b": Shape(
        f"{LLAMA_8B.name}'s shape",
        LLAMA_8B,
        "dummy",
        context=2048,
        loads={"single": Load(1, 4, 512, 128), "many": Load(32, 64, 512, 128)},
    ),
}

_BLOCK_BITS = 4 + 8 / _BLOCK_SIZE
_OURS = {
    method.bits.lower(): Format(
        f"BlockDialect {method.bits}", method.quantization, _BLOCK_BITS, row_bytes=1
    )
    for method in METHODS.values()
}
FORMATS = {
    "bf16": Format("bf16", None, 16),
    **_OURS,
    "w4a4-vocabulary": replace(
        _OURS["w4a4"], name=f"{_OURS['w4a4'].name}, vocabulary too", vocabulary=True
    ),
    "mxfp4": Format("MXFP4", "mxfp4", _BLOCK_BITS),
    "fp8": Format("FP8", "fp8", 8),
    "w4a4-torch": replace(
        _OURS["w4a4"],
        name=f"{_OURS['w4a4'].name}, torch path",
        environment={"BLOCKDIALECT_CPU_KERNEL": "0"},
        slow=True,
    ),
}
"""The torch path is what the plugin falls back on where the CPU kernel cannot be built."""


def layer_bytes(model: Llama, form: Format) -> int:
    """Bytes of all decoder layers of `model` that are quantized, in a format."""
    layer = sum(
        int(rows * columns * form.bits) // 8 + rows * form.row_bytes
        for rows, columns in model.projections.values()
    )
    return model.layers * layer


def prepare(shape: Shape, directory: Path) -> Path:
    """The directory of the shape's checkpoint and tokenizer; made, unless the model is shipped.

    Args:
        shape: the model.
        directory: must not exist.
    """
    if shape.weights == "shipped":
        return DEMO
    if shape.weights == "random":
        write_checkpoint(directory, shape.model)
    else:
        write_config(directory, shape.model)
    write_tokenizer(directory, shape.model.vocabulary)
    return directory


def remove(shape: Shape, directory: Path) -> None:
    """Free the disk space of what `prepare` made."""
    if shape.weights != "shipped":
        shutil.rmtree(directory)
