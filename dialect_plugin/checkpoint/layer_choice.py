"""Deciding, before anything is written, what happens to every layer of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dialect_kernels.layer_names import check_expressions, matches

from .. import architectures
from ..scheme import Scheme, SchemeError, check_patterns, fitting_block_size
from .reader import Checkpoint, CheckpointError

__all__ = ["ConvertOptions", "LayerChoice", "choose_layers"]

_QUANTIZABLE = {"BF16", "F16", "F32"}
_FOREIGN_CONFIGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_FOREIGN_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight.absmax",
    "_blocks",
    "_scales",
)


class ConvertOptions(BaseModel):
    """Options of a conversion.

    Attributes:
        scheme: formats and block sizes; its patterns may match many layers. The checkpoint's own
            scheme has exact names instead, and is always serialized.
        targets: patterns of the layers to quantize, instead of the architecture's table.
        strict: refuse a layer whose columns its block size does not divide, instead of taking
            another block size or leaving the layer in 16 bit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: Scheme = Field(default_factory=Scheme)
    targets: list[str] = Field(default_factory=list)
    strict: bool = False

    @field_validator("targets")
    @classmethod
    def _targets_compile(cls, patterns: list[str]) -> list[str]:
        check_expressions(patterns)
        return patterns


@dataclass(frozen=True)
class LayerChoice:
    """Which layers of a checkpoint are quantized, and how.

    Attributes:
        block_sizes: layer -> block size of every layer that is quantized.
        adapted: layers whose columns their block size does not divide, and that take another one.
        indivisible: layers that stay in 16 bit because no block size divides their columns.
        scheme: the resolved scheme, for config.json.
        has_experts: whether the model has experts; they stay in 16 bit.
    """

    block_sizes: dict[str, int]
    adapted: tuple[str, ...]
    indivisible: tuple[str, ...]
    scheme: Scheme
    has_experts: bool


def choose_layers(checkpoint: Checkpoint, options: ConvertOptions) -> LayerChoice:
    """Choose the layers to quantize and their block sizes.

    Raises:
        CheckpointError: if the checkpoint is quantized already, its architecture is not known and
            no targets are given, or a chosen layer has a dtype that is not supported.
        SchemeError: if a pattern matches nothing, the parts of a fused layer disagree, or `strict`
            finds a layer that does not fit.
    """
    _refuse_quantized(checkpoint)
    _ = checkpoint.architecture  # engines need it, whatever chooses the layers
    linear = checkpoint.linear_layers()
    scheme = options.scheme
    candidates = _choose(checkpoint, linear, options)
    check_patterns("ignore", scheme.ignore, linear)
    check_patterns("override", scheme.overrides, candidates)
    chosen = [name for name in candidates if not scheme.is_ignored(name)]
    if not chosen:
        raise SchemeError("ignore: no layer is left to quantize; ignore fewer layers")
    block_sizes, adapted, indivisible = _fit(checkpoint, chosen, options)
    _check_fused_layers(linear, block_sizes)
    return LayerChoice(
        block_sizes,
        tuple(adapted),
        tuple(indivisible),
        _resolved(scheme, linear, block_sizes),
        has_experts=any(architectures.is_expert(name) for name in checkpoint.tensors),
    )


def _fit(
    checkpoint: Checkpoint, chosen: Collection[str], options: ConvertOptions
) -> tuple[dict[str, int], list[str], list[str]]:
    """Block sizes that divide the columns, the layers they were adapted for, and those left out.

    Raises:
        CheckpointError, SchemeError: as :func:`choose_layers`.
    """
    block_sizes: dict[str, int] = {}
    adapted, indivisible = [], []
    for name in chosen:
        info = checkpoint.tensors[f"{name}.weight"]
        if info.dtype not in _QUANTIZABLE:
            raise CheckpointError(
                f"{name}.weight: has dtype {info.dtype}; only BF16, F16 and F32 can be quantized: "
                f"use the original checkpoint, or --ignore {name}"
            )
        wanted = options.scheme.block_size_of(name)
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
    return block_sizes, adapted, indivisible


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, naming the method, if the checkpoint is quantized already."""
    config = checkpoint.config
    text = config.get("text_config")
    holders = (config, text) if isinstance(text, Mapping) else (config,)
    method = None
    for holder in holders:
        found = holder.get("quantization_config") or holder.get("compression_config")
        if isinstance(found, Mapping):
            method = found.get("quant_method") or found.get("quant_type") or "unknown method"
        elif found:
            method = found
    for name in _FOREIGN_CONFIGS:
        if method is None and (checkpoint.path / name).exists():
            method = f"it has a {name}"
    for name in checkpoint.tensors:
        if method is None and name.endswith(_FOREIGN_SUFFIXES):
            method = f"it has a tensor {name}"
    if method is not None:
        raise CheckpointError(
            f"{checkpoint.path}: is quantized already ({method}); give the 16-bit checkpoint it "
            "was made from"
        )


def _choose(checkpoint: Checkpoint, linear: list[str], options: ConvertOptions) -> list[str]:
    """The layers to quantize before `ignore`, in the checkpoint's order."""
    if options.targets:
        check_patterns("targets", options.targets, linear)
        _check_targets(options.targets, linear)
        chosen = {
            name
            for name in linear
            if any(matches(pattern, name) for pattern in options.targets)
            and not architectures.is_never_packed(name)
        }
    elif checkpoint.architecture in architectures.ARCHITECTURES:
        chosen = set(architectures.default_layers(checkpoint.architecture, linear))
    else:
        candidates = architectures.candidate_layers(linear)
        patterns = sorted({f"'{architectures.decoder_layer_pattern(n)}'" for n in candidates})
        known = ", ".join(architectures.ARCHITECTURES)
        raise CheckpointError(
            f"architectures: {checkpoint.architecture!r} is not known (known are {known}); choose "
            f"the layers with --targets, candidates are: {' '.join(patterns) or 'none'}"
        )
    if options.scheme.lm_head:
        if checkpoint.tied_embeddings:
            raise SchemeError(
                "lm_head: this model ties its output projection to the embeddings, which stay in "
                "16 bit; leave --lm-head out"
            )
        if "lm_head" not in linear:
            raise SchemeError(
                "lm_head: the checkpoint has no lm_head.weight, perhaps because its output "
                "projection is tied to the embeddings; leave --lm-head out"
            )
        chosen.add("lm_head")
    return [name for name in linear if name in chosen]


def _check_targets(targets: Collection[str], linear: list[str]) -> None:
    """Patterns pass over layers that engines read in 16 bit only; their exact names are errors."""
    for name in targets:
        if name in linear and architectures.is_never_packed(name):
            remedy = "use --lm-head" if name == "lm_head" else "leave it out"
            raise SchemeError(
                f"targets: {name} is an embedding, norm, router, expert or output projection, "
                f"which engines read in 16 bit; {remedy}"
            )


def _check_fused_layers(linear: Collection[str], block_sizes: Mapping[str, int]) -> None:
    """Raise SchemeError if layers that engines run as one matrix would be stored differently."""
    present = set(linear)
    for name in block_sizes:
        parts = [part for part in architectures.fused_with(name) if part in present]
        if len({block_sizes.get(part) for part in parts}) > 1:
            listed = ", ".join(
                f"{part} block size {block_sizes[part]}"
                if part in block_sizes
                else f"{part} 16 bit"
                for part in parts
            )
            raise SchemeError(
                f"{listed}: engines run these as one matrix; give all of them the same block "
                "size, or ignore all of them"
            )


def _resolved(scheme: Scheme, linear: list[str], block_sizes: dict[str, int]) -> Scheme:
    """The scheme with exact names: what stays in 16 bit, and every block size that differs."""
    untouched = [name for name in linear if name not in block_sizes]
    overrides = {
        name: {"block_size": size}
        for name, size in block_sizes.items()
        if size != scheme.block_size
    }
    return Scheme.parse(
        scheme.to_config()
        | {
            "serialized": True,
            "ignore": architectures.collapse_experts(untouched),
            "overrides": overrides,
            "lm_head": "lm_head" in block_sizes,
        }
    )
