"""Checkpoints that benchmarks make: random weights in the shape of a model, packed ones of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..lib.memory import PeakMemory
from ..lib.shapes import Llama

__all__ = ["convert", "write_checkpoint", "write_config", "write_tokenizer"]

_NORMS = ("input_layernorm", "post_attention_layernorm")
Tensors = dict[str, torch.Tensor]


def write_checkpoint(directory: Path, model: Llama, *, file_per_layer: bool = False) -> None:
    """Write a bf16 checkpoint of Gaussian weights, the same ones in every layer.

    Args:
        directory: is made; it must not exist.
        model: its dimensions; the output layer is tied to the embedding.
        file_per_layer: one file for each decoder layer and one for the rest; else a single file.
    """
    write_config(directory, model)
    parts = _tensors(model)
    if file_per_layer:
        for number, tensors in enumerate(parts):
            save_file(tensors, directory / f"model-{number:03}.safetensors", {"format": "pt"})
    else:
        whole = {name: tensor for tensors in parts for name, tensor in tensors.items()}
        save_file(whole, directory / "model.safetensors", {"format": "pt"})


def write_config(directory: Path, model: Llama) -> None:
    """Make `directory` with the config.json of `model` alone."""
    directory.mkdir()
    text = json.dumps(model.config)
    (directory / "config.json").write_text(text, encoding="utf-8")


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """Add a tokenizer with a word for every token id: clients and servers need one."""
    # here, because rendering the tables needs none of it
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)


def convert(source: Path, packed: Path, *options: str) -> PeakMemory:
    """Run ``blockdialect quantize`` and return its peak memory.

    Args:
        source: the 16-bit checkpoint.
        packed: the directory that is made.
        options: of the command; default: none.

    Raises:
        SystemExit: with the command's output, if it fails.
    """
    command = [sys.executable, "-m", "dialect_plugin.cli", "quantize", str(source), str(packed)]
    command += options
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with PeakMemory(process.pid) as peak:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"blockdialect quantize failed:\n{output}")
    return peak


def _tensors(model: Llama) -> Iterator[Tensors]:
    """The tensors outside of the decoder layers, then those of each layer."""
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16)

    ones = torch.ones(model.hidden, dtype=torch.bfloat16)
    embedding = random(64, model.hidden).repeat(-(-model.vocabulary // 64), 1)
    yield {
        "model.embed_tokens.weight": embedding[: model.vocabulary].contiguous(),
        "model.norm.weight": ones.clone(),
    }
    matrices = model.projections | model.routers
    weights = {name: random(*shape) for name, shape in matrices.items()}
    for layer in range(model.layers):
        tensors = {name: weight.clone() for name, weight in weights.items()}
        tensors |= {norm: ones.clone() for norm in _NORMS}
        yield {f"model.layers.{layer}.{name}.weight": value for name, value in tensors.items()}
