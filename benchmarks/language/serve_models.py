"""What :mod:`.bench_serve` serves: shapes, formats, and how many requests are sent.

Weights are random where no model of the shape is shipped: speed and bytes do not depend on their
values. Layers of a format are counted in bytes by its definition; the gate compares the count of
ours with a checkpoint that was really converted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..lib.harness import ROOT
from . import bench_convert

__all__ = [
    "BLOCK_SIZE",
    "DEMO",
    "FORMATS",
    "SHAPES",
    "Format",
    "Load",
    "Shape",
    "layer_bytes",
    "prepare",
    "projections",
    "remove",
]

DEMO = ROOT / "demo" / "model"
BLOCK_SIZE = 32
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
    """A model by its dimensions.

    Attributes:
        name: in the tables.
        config: its config.json.
        weights: those that are ``"shipped"``, a checkpoint of ``"random"`` ones, or ``"dummy"``:
            vLLM makes them up while it loads.
        context: for ``--max-model-len``, in tokens.
        loads: what is sent, by the name of the table that shows it.
    """

    name: str
    config: Mapping[str, Any]
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
        environment: variables that the server gets beside the usual ones.
        slow: so much so that a single short request must do, once.
    """

    name: str
    method: str | None
    bits: float
    row_bytes: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False


SHAPES = {
    "demo": Shape(
        "shipped LLaMA, 4 layers",
        json.loads((DEMO / "config.json").read_text(encoding="utf-8")),
        "shipped",
        context=512,
        loads={"single": Load(1, 24, 64, 64), "many": Load(8, 48, 64, 64)},
    ),
    "llama-3.2-1b": Shape(
        "LLaMA-3.2-1B's shape",
        bench_convert.CONFIG,
        "random",
        context=512,
        loads={"single": Load(1, 2, 64, 32), "many": Load(8, 8, 64, 32)},
    ),
    "llama-3-8b": Shape(
        "LLaMA-3-8B's shape",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "max_position_embeddings": 8192,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        "dummy",
        context=2048,
        loads={"single": Load(1, 4, 512, 128), "many": Load(32, 64, 512, 128)},
    ),
}

_BLOCK_BITS = 4 + 8 / BLOCK_SIZE
FORMATS = {
    "bf16": Format("bf16", None, 16),
    "w4a4": Format("BlockDialect W4A4", "blockdialect", _BLOCK_BITS, row_bytes=1),
    "w4a8": Format("BlockDialect W4A8", "blockdialect_w4a8", _BLOCK_BITS, row_bytes=1),
    "w4a16": Format("BlockDialect W4A16", "blockdialect_w4a16", _BLOCK_BITS, row_bytes=1),
    "mxfp4": Format("MXFP4", "mxfp4", _BLOCK_BITS),
    "fp8": Format("FP8", "fp8", 8),
    "w4a4-torch": Format(
        "BlockDialect W4A4, torch path",
        "blockdialect",
        _BLOCK_BITS,
        row_bytes=1,
        environment={"BLOCKDIALECT_CPU_KERNEL": "0"},
        slow=True,
    ),
}
"""The torch path is what the plugin falls back on where the CPU kernel cannot be built."""


def projections(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """[N, K] of the linear layers of one decoder layer of a LLaMA, as the checkpoint names them."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    attention = [(query, hidden), (key, hidden), (key, hidden), (hidden, query)]
    return [*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]


def layer_bytes(config: Mapping[str, Any], form: Format) -> int:
    """Bytes of all layers that are quantized, in a format."""
    layer = sum(
        int(rows * columns * form.bits) // 8 + rows * form.row_bytes
        for rows, columns in projections(config)
    )
    return int(config["num_hidden_layers"]) * layer


def prepare(shape: Shape, directory: Path) -> Path:
    """The directory of the shape's checkpoint; made in `directory` unless it is shipped.

    A tokenizer with a word for every token id comes with it: clients and servers need one.
    """
    if shape.weights == "shipped":
        return DEMO
    if shape.weights == "random":
        bench_convert.write_checkpoint(
            directory, shape.config["num_hidden_layers"], shape.config["vocab_size"]
        )
    else:
        directory.mkdir()
        config = json.dumps(dict(shape.config))
        (directory / "config.json").write_text(config, encoding="utf-8")
    _write_tokenizer(directory, shape.config["vocab_size"])
    return directory


def remove(shape: Shape, directory: Path) -> None:
    """Free the disk space of what `prepare` made."""
    if shape.weights != "shipped":
        shutil.rmtree(directory)


def _write_tokenizer(directory: Path, vocabulary: int) -> None:
    # here, because rendering the tables needs none of it
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
