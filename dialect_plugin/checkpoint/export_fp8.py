"""Exporting a packed checkpoint for engines that do not know its format.

A dialect weight *is* an FP8 weight: every value is an E4M3 number times its row's power of two
(docs/reference/format.md, section 2). ``fp8`` writes exactly that, as a compressed-tensors
checkpoint with one scale per output channel and FP8 activations scaled per token while serving. No
weight changes by a bit; only the size does, to 8 bits per weight. Embeddings go back to
the model's dtype, in which engines hold them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dialect_kernels import __version__

from ..architectures import collapse_experts, is_embedding
from ..cache_means import attention_of
from ..experts import expert_of, leaves_of, prefixes
from .companions import find_companions
from .finish import finish_checkpoint
from .progress import Progress
from .reader import PACKED_SUFFIXES, Checkpoint, CheckpointError, PackedCheckpoint
from .writer import check_destination, check_disk_space, write_file

__all__ = ["ExportResult", "export_fp8", "render"]

_CODES = PACKED_SUFFIXES[0]
_UNFINISHED = ".unfinished"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        destination: the FP8 checkpoint.
        layers: how many layers are stored in FP8.
        source_bytes, exported_bytes: bytes of all tensors before and after.
    """

    destination: Path
    layers: int
    source_bytes: int
    exported_bytes: int


def export_fp8(packed: PackedCheckpoint, destination: Path, progress: Progress) -> ExportResult:
    """Write a packed checkpoint as a compressed-tensors FP8 checkpoint with the same weights.

    The files are written into a directory beside `destination`, which is renamed at the end: a
    killed export leaves no checkpoint behind, and a rerun starts again.

    Args:
        packed: an opened packed checkpoint.
        destination: directory to write; must not exist or be empty.
        progress: receives every tensor.

    Raises:
        CheckpointError, ValueError: one sentence, if a layer is rotated, or of an expert that
            engines do not read, the destination cannot be used, or a tensor is missing, does not
            fit or holds reserved values.
        OSError: if writing fails.
    """
    source = packed.checkpoint
    _refuse_rotated(packed)
    _refuse_experts(packed)
    check_destination(source.path, destination)
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination}: is not empty; choose another directory")
    check_disk_space(destination, _exported_bytes(packed))
    staging = destination.with_name(destination.name + _UNFINISHED)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)

    sizes = [info.nbytes for info in source.tensors.values()]
    progress.begin("exporting", len(sizes), sum(sizes))
    stored: dict[str, tuple[str, int]] = {}
    for shard in source.shards:
        tensors = dict(_exported_tensors(packed, shard, progress))
        if not tensors:  # means
            continue
        stored |= {name: (shard, tensor.nbytes) for name, tensor in tensors.items()}
        write_file(staging / shard, partial(save_file, tensors, metadata={"format": "pt"}))
        del tensors
    exported_bytes = finish_checkpoint(
        source,
        staging,
        stored,
        _card(packed),
        find_companions(source),
        _compressed_tensors_config(packed),
    )
    staging.replace(destination)
    return ExportResult(destination, len(_fp8_layers(packed)), sum(sizes), exported_bytes)


def render(result: ExportResult) -> str:
    """What an export did, in one line."""
    return (
        f"{result.layers} layers in FP8, no weight changed; tensors "
        f"{result.source_bytes / 1e6:,.1f} MB -> {result.exported_bytes / 1e6:,.1f} MB"
    )


def _refuse_rotated(packed: PackedCheckpoint) -> None:
    for name in packed.layers:
        rotation = packed.scheme.layer(name).rotation
        if rotation != "none":
            raise CheckpointError(
                f"{packed.checkpoint.path}: the layer {name} has the rotation {rotation}, and "
                "engines that serve FP8 do not rotate its input; convert the 16-bit model again "
                "without --rotation, and export that"
            )


def _fp8_layers(packed: PackedCheckpoint) -> list[str]:
    """The packed layers that engines serve in FP8; embeddings they do not."""
    return [name for name in packed.layers if not is_embedding(name)]


def _refuse_experts(packed: PackedCheckpoint) -> None:
    architecture = packed.checkpoint.architecture
    for name in packed.layers:
        if expert_of(name) is not None and leaves_of(architecture) is None:
            raise CheckpointError(
                f"{packed.checkpoint.path}: the layer {name} is one of an expert, and engines are "
                f"not known to read FP8 experts of {architecture} one by one; convert the 16-bit "
                "model again with --no-experts, and export that"
            )


def _exported_name(packed: PackedCheckpoint, layer: str) -> str:
    """What a layer is called in the model's 16-bit checkpoints, which engines know."""
    expert = expert_of(layer)
    if expert is None:
        return layer
    leaves = leaves_of(packed.checkpoint.architecture) or {}
    return f"{expert.prefix}.{expert.number}.{leaves[expert.part]}"


def _compressed_tensors_config(packed: PackedCheckpoint) -> dict[str, Any]:
    """The ``quantization_config`` of the FP8 checkpoint: W8A8, scales per channel and per token."""
    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight_bits | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
        "ignore": _sixteen_bit_layers(packed),
    }


def _sixteen_bit_layers(packed: PackedCheckpoint) -> list[str]:
    """Names and patterns of all linear layers that stay in 16 bit; experts as patterns."""
    listed = collapse_experts(packed.checkpoint.linear_layers(), packed.layers)
    modules = prefixes(packed.checkpoint.linear_layers())
    listed = [f"re:{re.escape(name)}\\..*" if name in modules else name for name in listed]
    listed += filter(is_embedding, packed.layers)
    if "lm_head" not in (*listed, *packed.layers):
        listed.append("lm_head")  # tied to the embeddings: no tensor, but a linear layer
    return listed


def _exported_tensors(
    packed: PackedCheckpoint, shard: str, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an output shard; a layer goes where its codes are."""
    source = packed.checkpoint
    with source.open_shard(shard) as file:
        for name, info in source.tensors.items():
            if info.shard != shard:
                continue
            if name.endswith(_CODES):
                layer = name.removesuffix(_CODES)
                if is_embedding(layer):
                    yield f"{layer}.weight", packed.read(layer).dequantize(_dtype(source))
                    progress.advance(info.nbytes)
                    continue
                weight, scale = packed.read(layer).to_e4m3()
                exported = _exported_name(packed, layer)
                yield f"{exported}.weight", weight
                yield f"{exported}.weight_scale", scale[:, None].contiguous()
            elif _is_copied(name):
                yield name, file.get_tensor(name)
            progress.advance(info.nbytes)


def _dtype(source: Checkpoint) -> torch.dtype:
    """The model's own, in which engines hold embeddings; bfloat16 holds every value exactly."""
    text = source.config.get("text_config")
    config = source.config | (text if isinstance(text, dict) else {})
    return _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.bfloat16)


def _exported_bytes(packed: PackedCheckpoint) -> int:
    total = 0
    for name, info in packed.checkpoint.tensors.items():
        if name.endswith(_CODES) and is_embedding(name.removesuffix(_CODES)):
            total += 2 * info.nbytes * _dtype(packed.checkpoint).itemsize
        elif name.endswith(_CODES):
            total += 2 * info.nbytes + 4 * info.shape[0]
        elif _is_copied(name):
            total += info.nbytes
    return total


def _is_copied(tensor: str) -> bool:
    """Whether a tensor is neither packed nor a mean for a KV cache of 4 bits."""
    return not tensor.endswith(PACKED_SUFFIXES) and attention_of(tensor) is None


def _card(packed: PackedCheckpoint) -> str:
    name = packed.checkpoint.path.resolve().name
    return (
        f"# {name}, BlockDialect weights as FP8\n\n"
        f"{len(_fp8_layers(packed))} linear layers hold, bit for bit, the values of a BlockDialect "
        f"checkpoint (book `{packed.scheme.book}`) as E4M3 numbers with one power-of-two scale per "
        "output channel, in the compressed-tensors format. Any engine that serves FP8 W8A8 with "
        "dynamic scales per token serves it. Its loss against the 16-bit model is that of the "
        "4-bit weights.\n\n"
        f"Written by blockdialect {__version__} (`blockdialect export --to fp8`).\n"
    )
