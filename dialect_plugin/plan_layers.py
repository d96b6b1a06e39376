"""Deciding, before anything is written, what happens to every layer of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from . import architectures
from .checkpoint import Checkpoint, CheckpointError
from .scheme import (
    ActivationFormat,
    BlockSize,
    BookName,
    LayerOverride,
    Scheme,
    SchemeError,
    check_patterns,
    fitting_block_size,
    matches,
)

__all__ = ["ConvertOptions", "LayerPlan", "plan_layers"]

_QUANTIZABLE = {"BF16", "F16", "F32"}


class ConvertOptions(BaseModel):
    """What the user asks of a conversion.

    Attributes:
        book: formatbook of weights and activations.
        block_size: block size of layers without an override.
        activation_format: what the checkpoint asks an engine for.
        ignore: patterns of layers that stay in 16 bit.
        overrides: pattern -> what differs for these layers.
        targets: patterns of the layers to quantize, instead of the architecture's table.
        lm_head: quantize the output projection too.
        strict: refuse layers whose columns no block size divides as asked, instead of adapting.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    book: BookName = "dialect_fp4"
    block_size: BlockSize = 32
    activation_format: ActivationFormat = "dialect"
    ignore: list[str] = Field(default_factory=list)
    overrides: dict[str, LayerOverride] = Field(default_factory=dict)
    targets: list[str] = Field(default_factory=list)
    lm_head: bool = False
    strict: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """The decision for a checkpoint.

    Attributes:
        block_sizes: layer -> block size of every layer that is quantized.
        adapted: layers that take another block size than asked for.
        indivisible: layers that stay in 16 bit because no block size divides their columns.
        scheme: the resolved scheme, for config.json.
        has_experts: whether a mixture's experts stay in 16 bit.
    """

    block_sizes: dict[str, int]
    adapted: tuple[str, ...]
    indivisible: tuple[str, ...]
    scheme: Scheme
    has_experts: bool


def plan_layers(checkpoint: Checkpoint, options: ConvertOptions) -> LayerPlan:
    """Choose the layers to quantize and their block sizes.

    Raises:
        CheckpointError: if the checkpoint is quantized already, its architecture is not known and
            no targets are given, or a chosen layer has a dtype that is not supported.
        SchemeError: if a pattern matches nothing, or `strict` finds a layer that does not fit.
    """
    _refuse_quantized(checkpoint)
    linear = checkpoint.linear_layers()
    asked = Scheme.model_validate(
        {
            "book": options.book,
            "block_size": options.block_size,
            "activation_format": options.activation_format,
            "ignore": options.ignore,
            "overrides": {k: v.model_dump() for k, v in options.overrides.items()},
            "lm_head": options.lm_head,
        }
    )
    chosen = _choose(checkpoint, linear, options)
    check_patterns("ignore", options.ignore, linear)
    check_patterns("override", options.overrides, chosen)
    chosen = [name for name in chosen if not asked.is_ignored(name)]
    if not chosen:
        raise SchemeError("ignore: no layer is left to quantize; ignore fewer layers")

    block_sizes: dict[str, int] = {}
    adapted, indivisible = [], []
    for name in chosen:
        info = checkpoint.tensors[f"{name}.weight"]
        if info.dtype not in _QUANTIZABLE:
            raise CheckpointError(
                f"{name}.weight: has dtype {info.dtype}; only BF16, F16 and F32 can be quantized: "
                f"use the original checkpoint, or --ignore {name}"
            )
        wanted = asked.block_size_of(name)
        fitting = fitting_block_size(info.shape[1], wanted)
        if fitting != wanted and options.strict:
            raise SchemeError(
                f"{name}: its {info.shape[1]} columns are not a multiple of the block size "
                f"{wanted}; override its block size, ignore it, or drop --strict"
            )
        if fitting is None:
            indivisible.append(name)
            continue
        if fitting != wanted:
            adapted.append(name)
        block_sizes[name] = fitting
    scheme = _resolved(asked, linear, block_sizes)
    has_experts = checkpoint.config.get("architectures", [""])[0] in (
        architectures.EXPERT_ARCHITECTURES
    )
    return LayerPlan(block_sizes, tuple(adapted), tuple(indivisible), scheme, has_experts)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    existing = checkpoint.config.get("quantization_config")
    if existing is None:
        return
    method = existing.get("quant_method", "unknown") if isinstance(existing, Mapping) else existing
    raise CheckpointError(
        f"{checkpoint.path}: is quantized already ({method}); give the 16-bit checkpoint it was "
        "made from"
    )


def _choose(checkpoint: Checkpoint, linear: list[str], options: ConvertOptions) -> list[str]:
    """The layers to quantize before `ignore`, in the checkpoint's order."""
    if options.targets:
        check_patterns("targets", options.targets, linear)
        chosen = {n for n in linear if any(matches(p, n) for p in options.targets)}
    elif checkpoint.architecture in architectures.ARCHITECTURES:
        chosen = set(architectures.default_layers(checkpoint.architecture, linear))
    else:
        candidates = architectures.candidate_layers(linear)
        patterns = sorted({architectures.decoder_layer_pattern(name) for name in candidates})
        known = ", ".join(architectures.ARCHITECTURES)
        raise CheckpointError(
            f"architectures: {checkpoint.architecture!r} is not known (known are {known}); choose "
            f"the layers with --targets, candidates are: {' '.join(patterns) or 'none'}"
        )
    if options.lm_head:
        if checkpoint.tied_embeddings:
            raise SchemeError(
                "lm_head: this model ties its output projection to the embeddings, which stay in "
                "16 bit; leave --lm-head out"
            )
        if "lm_head" not in linear:
            raise SchemeError("lm_head: the checkpoint has no lm_head.weight; leave --lm-head out")
        chosen.add("lm_head")
    return [name for name in linear if name in chosen]


def _resolved(asked: Scheme, linear: list[str], block_sizes: dict[str, int]) -> Scheme:
    """The scheme with exact names: what stays in 16 bit, and every block size that differs."""
    untouched = [name for name in linear if name not in block_sizes and ".experts." not in name]
    overrides = {
        name: {"block_size": size} for name, size in block_sizes.items() if size != asked.block_size
    }
    experts = ["re:.*\\.experts\\..*"] if any(".experts." in name for name in linear) else []
    data = asked.to_config() | {"ignore": untouched + experts, "overrides": overrides}
    return Scheme.parse(data | {"lm_head": "lm_head" in block_sizes})
