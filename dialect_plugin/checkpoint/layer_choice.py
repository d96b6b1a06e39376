"""Deciding, before anything is written, what happens to every layer of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dialect_kernels.formatbook import ROTATION_GROUP
from dialect_kernels.layer_names import matches

from .. import architectures, experts
from ..scheme import (
    LayerFormat,
    Scheme,
    SchemeError,
    check_patterns,
    disagreement,
    experts_disagreement,
    fitted,
    fitting_block_size,
)
from .options import ConvertOptions
from .reader import Checkpoint, CheckpointError

__all__ = ["LayerChoice", "choose_layers"]

_QUANTIZABLE = {"BF16", "F16", "F32"}
_FOREIGN_CONFIGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_FOREIGN_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight.absmax",
)
_FOREIGN_BYTES = ("_blocks", "_scales")
"""Ends of names that mean packed weights if the tensor holds bytes."""
_BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names of config.json for the number of decoder layers."""
_TEXT = re.compile(r"text|llm|language|thinker|decoder")
"""What keys of config.json are called that hold the text model's config."""


@dataclass(frozen=True)
class LayerChoice:
    """Which layers of a checkpoint are quantized, and how.

    Attributes:
        formats: layer -> how it is quantized, for every layer that is.
        adapted: layers whose columns their block size does not divide, and that take another one.
        unrotated: layers that are not rotated because the rotation's group does not divide their
            columns.
        indivisible: layers that stay in 16 bit because no block size divides their columns.
        incomplete: layers that stay in 16 bit because the checkpoint lacks another part of the
            matrix that engines fuse them into.
        scheme: the resolved scheme, for config.json.
        has_plain_experts: whether routed experts, or some of them, stay in 16 bit.
        by_name: patterns of the layers, if only their names tell that they are linear layers of
            the decoder, because the table of architectures lacks the model's.
    """

    formats: dict[str, LayerFormat]
    adapted: tuple[str, ...]
    unrotated: tuple[str, ...]
    indivisible: tuple[str, ...]
    incomplete: tuple[str, ...]
    scheme: Scheme
    has_plain_experts: bool
    by_name: str = ""


def choose_layers(checkpoint: Checkpoint, options: ConvertOptions) -> LayerChoice:
    """Choose the layers to quantize, and how.

    Raises:
        CheckpointError: if the checkpoint is quantized already, no layer has a name that engines
            pack, or a chosen layer has a dtype that is not supported or is stored transposed.
        SchemeError: if a pattern matches nothing, the parts of a fused layer disagree, or with
            `strict` the columns of a layer do not fit.
    """
    _refuse_quantized(checkpoint)
    _ = checkpoint.architecture  # engines need it, whatever chooses the layers
    linear = checkpoint.linear_layers()
    scheme = options.scheme
    candidates = _choose(checkpoint, linear, options)
    check_patterns("ignore", scheme.ignore, _modules(checkpoint))
    check_patterns("override", scheme.overrides, _with_other_names(candidates))
    chosen = [name for name in candidates if not scheme.is_ignored(name)]
    if not chosen:
        raise _nothing_chosen(checkpoint, options, candidates)
    _refuse_transposed(checkpoint, chosen)
    absent = _absent_parts(checkpoint, chosen)
    chosen = [name for name in chosen if name not in absent]
    tied = checkpoint.tied_embeddings or "lm_head" not in linear
    wanted = {name: _wanted(scheme, name, tied) for name in chosen}
    _check_experts(checkpoint, wanted)
    formats = _with_whole_experts(_fit(checkpoint, wanted, strict=options.strict), wanted)
    if not formats:
        raise _nothing_fits(checkpoint)
    _check_fused_layers(linear, formats)
    missing = sorted({part for parts in absent.values() for part in parts})
    return LayerChoice(
        formats,
        tuple(n for n, form in formats.items() if form.block_size != wanted[n].block_size),
        tuple(n for n, form in formats.items() if form.rotation != wanted[n].rotation),
        tuple(name for name in chosen if name not in formats),
        tuple(absent),
        _resolved(scheme, linear, formats, missing),
        has_plain_experts=any(
            architectures.holds_experts(name)
            and not experts.is_bias(name)
            and not any(layer in formats for layer in checkpoint.layers_in(name))
            for name in checkpoint.tensors
        ),
        by_name=_chosen_by_name(checkpoint, options, formats),
    )


def _chosen_by_name(
    checkpoint: Checkpoint, options: ConvertOptions, formats: Collection[str]
) -> str:
    """Patterns of the layers that no table and no target has chosen; empty if one has."""
    if options.targets or checkpoint.architecture in architectures.ARCHITECTURES:
        return ""
    return architectures.patterns_of(formats)


def _wanted(scheme: Scheme, name: str, tied: bool) -> LayerFormat:
    """How a layer should be quantized, whatever its columns are."""
    if architectures.is_embedding(name):
        return scheme.embedding(name, tied=tied)
    return scheme.layer(name)


def _nothing_chosen(
    checkpoint: Checkpoint, options: ConvertOptions, candidates: Collection[str]
) -> ValueError:
    if candidates:
        return SchemeError("ignore: no layer is left to quantize; ignore fewer layers")
    if options.targets:
        return SchemeError(
            "targets: they match layers only that engines read in 16 bit; name linear layers of "
            "the decoder layers"
        )
    return CheckpointError(
        f"{checkpoint.path}: has no layer with the names of {checkpoint.architecture}; choose the "
        "layers with --targets"
    )


def _nothing_fits(checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: no block size (16, 32, 64) divides the columns of any layer, or the "
        "layers lack parts; leave the model in 16 bit"
    )


def _fit(
    checkpoint: Checkpoint, wanted: Mapping[str, LayerFormat], *, strict: bool
) -> dict[str, LayerFormat]:
    """How the layers are quantized whose columns some block size divides.

    Raises:
        CheckpointError, SchemeError: as :func:`choose_layers`.
    """
    formats = {}
    for name, layer in wanted.items():
        info = checkpoint.weights[name]
        if info.dtype not in _QUANTIZABLE:
            raise CheckpointError(
                f"{name}.weight: has dtype {info.dtype}; only BF16, F16 and F32 can be quantized: "
                f"use the original checkpoint, or --ignore {name}"
            )
        columns = info.shape[1]
        fitting = fitted(layer, columns)
        if strict and fitting_block_size(columns, layer.block_size) != layer.block_size:
            raise SchemeError(
                f"{name}: its {columns} columns are not a multiple of the block size "
                f"{layer.block_size}; override its block size, ignore it, or drop --strict"
            )
        if strict and fitting != layer:
            raise SchemeError(
                f"{name}: its {columns} columns are not a multiple of {ROTATION_GROUP}, which the "
                f"rotation {layer.rotation} needs; override its rotation with none, ignore it, or "
                "drop --strict"
            )
        if fitting is not None:
            formats[name] = fitting
    return formats


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, naming the method, if the checkpoint is quantized already."""
    method = None
    for holder in _nested(checkpoint.config):
        found = holder.get("quantization_config") or holder.get("compression_config")
        if isinstance(found, Mapping):
            method = found.get("quant_method") or found.get("quant_type") or "unknown method"
        elif found:
            method = found
    for name in _FOREIGN_CONFIGS:
        if method is None and (checkpoint.path / name).exists():
            method = f"it has a {name}"
    for name, info in checkpoint.tensors.items():
        packed = name.endswith(_FOREIGN_BYTES) and info.dtype not in _QUANTIZABLE
        if method is None and (packed or name.endswith(_FOREIGN_SUFFIXES)):
            method = f"it has a tensor {name}"
    if method is not None:
        raise CheckpointError(
            f"{checkpoint.path}: is quantized already ({method}); give the 16-bit checkpoint it "
            "was made from"
        )


def _nested(value: Any) -> Iterator[Mapping[str, Any]]:
    """An object of a JSON file and all objects inside it."""
    if isinstance(value, Mapping):
        yield value
        for entry in value.values():
            yield from _nested(entry)


def _modules(checkpoint: Checkpoint) -> list[str]:
    """Names of the modules with tensors, and of the output projection, which may be tied."""
    modules = {name.rpartition(".")[0]: None for name in checkpoint.tensors}
    linear = _with_other_names(checkpoint.linear_layers())
    return [*linear, *modules, *checkpoint.tensors, "lm_head"]


def _with_other_names(layers: Collection[str]) -> list[str]:
    """Layers, and what options may call several experts of theirs."""
    return list(dict.fromkeys(name for layer in layers for name in experts.names_of(layer)))


def _refuse_transposed(checkpoint: Checkpoint, chosen: Collection[str]) -> None:
    """Raise CheckpointError if a weight is stored as [in, out], as transformers' Conv1D does.

    A bias has one element for each output. Where it fits the columns only, the layer is transposed,
    and then every square layer with a bias may be, because a model has one kind of layer.
    """
    tensors = checkpoint.tensors
    square: list[str] = []
    transposed: list[str] = []
    for name in checkpoint.linear_layers():
        rows, columns = checkpoint.weights[name].shape
        bias = tensors.get(f"{name}.bias")
        if bias is None or bias.shape != (columns,):
            continue
        (square if rows == columns else transposed).append(name)
    if not transposed:
        return
    for name in chosen:
        if name in transposed or name in square:
            rows, columns = checkpoint.weights[name].shape
            raise CheckpointError(
                f"{name}.weight: [{rows}, {columns}] is stored as [inputs, outputs] (Conv1D), but "
                "packed weights are [outputs, inputs]; serve the 16-bit checkpoint with "
                "--quantization blockdialect, which packs it while loading"
            )


def _absent_parts(checkpoint: Checkpoint, chosen: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Chosen layer -> parts of its fused matrix that this block lacks and other blocks have.

    Models that share keys and values between layers, or use keys as values, are made so.
    """
    shares = any(
        holder.get("attention_k_eq_v") or holder.get("num_kv_shared_layers")
        for holder in _nested(checkpoint.config)
    )
    linear = checkpoint.linear_layers()
    present = set(linear)
    kinds = {architectures.decoder_layer_pattern(name) for name in linear}
    absent = {}
    for name in chosen:
        parts = () if experts.expert_of(name) else architectures.fused_with(name)
        missing = tuple(
            part
            for part in parts
            if part not in present and architectures.decoder_layer_pattern(part) in kinds
        )
        if missing and not shares:
            absent[name] = missing
    return absent


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
        served = _in_served_blocks(checkpoint, linear)
        chosen = set(architectures.default_layers(checkpoint.architecture, served))
    else:
        chosen = set(architectures.candidate_layers(_in_served_blocks(checkpoint, linear)))
    if not options.experts:
        chosen = {name for name in chosen if experts.expert_of(name) is None}
    return [name for name in linear if name in chosen | _vocabulary(checkpoint, linear, options)]


def _vocabulary(checkpoint: Checkpoint, linear: list[str], options: ConvertOptions) -> set[str]:
    """The matrices beside the decoder layers that the options name.

    Raises:
        SchemeError: if the checkpoint has no such matrix.
    """
    chosen = set()
    if options.scheme.embeddings:
        chosen = {name for name in linear if architectures.is_embedding(name)}
        if not chosen:
            raise SchemeError(
                "embeddings: the checkpoint has no matrix with a usual name for them, such as "
                "model.embed_tokens; leave --embeddings out"
            )
    if options.scheme.lm_head and not (checkpoint.tied_embeddings and chosen):
        if checkpoint.tied_embeddings:
            raise SchemeError(
                "lm_head: this model ties its output projection to the embeddings; use "
                "--embeddings, which packs the one matrix of both, or leave --lm-head out"
            )
        if "lm_head" not in linear:
            raise SchemeError(
                "lm_head: the checkpoint has no lm_head.weight, perhaps because its output "
                "projection is tied to the embeddings; leave --lm-head out"
            )
        chosen.add("lm_head")
    return chosen


def _in_served_blocks(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """`names` without the blocks behind the model's last one, which belong to draft models."""
    config = checkpoint.config
    texts = [entry for key, entry in config.items() if _TEXT.search(key)]
    for holder in (config, *(found for text in texts for found in _nested(text))):
        for key in _BLOCK_COUNTS:
            if isinstance(count := holder.get(key), int):
                return [name for name in names if architectures.block_of(name) < count]
    return names


def _check_targets(targets: Collection[str], linear: list[str]) -> None:
    """Patterns pass over layers that engines read in 16 bit only; their exact names are errors."""
    for name in targets:
        if name in linear and architectures.is_never_packed(name):
            embedding = "use --embeddings" if architectures.is_embedding(name) else "leave it out"
            remedy = "use --lm-head" if name == "lm_head" else embedding
            raise SchemeError(
                f"targets: {name} is an embedding, norm, router or gate, convolution, "
                f"draft layer or output projection, which engines read in 16 bit; {remedy}"
            )


def _check_fused_layers(linear: Collection[str], formats: Mapping[str, LayerFormat]) -> None:
    """Raise SchemeError if layers that engines run as one matrix would be stored differently."""
    present = set(linear)
    for name in formats:
        parts = [part for part in architectures.fused_with(name) if part in present]
        found = disagreement({part: formats.get(part) for part in parts})
        if found is not None:
            listed, common = found
            raise SchemeError(
                f"{listed}: engines run these as one matrix; give all of them the same {common}, "
                "or ignore all of them"
            )


def _check_experts(checkpoint: Checkpoint, wanted: Mapping[str, LayerFormat]) -> None:
    """Raise unless the experts of a decoder layer are complete and quantized alike, or not at all.

    Raises:
        CheckpointError: if a matrix of an expert is missing, or two are of different shapes.
        SchemeError: if their formats differ.
    """
    chosen = experts.prefixes(wanted)
    for prefix, layers in experts.prefixes(checkpoint.linear_layers()).items():
        if prefix not in chosen:
            continue
        found = experts_disagreement({layer: wanted.get(layer) for layer in layers})
        if found is not None:
            listed, common = found
            raise SchemeError(
                f"{listed}: engines run all experts of a layer as one; give all of them the same "
                f"{common}, or ignore {prefix}"
            )
        _check_complete(checkpoint, prefix, layers)


def _check_complete(checkpoint: Checkpoint, prefix: str, layers: Collection[str]) -> None:
    """Raise CheckpointError if experts of a decoder layer lack a matrix, or differ in shape."""
    found = [expert for expert in map(experts.expert_of, layers) if expert is not None]
    parts = [part for part in experts.PARTS if any(expert.part == part for expert in found)]
    shapes: dict[str, tuple[int, ...]] = {}
    present = set(layers)
    for number in range(1 + max(expert.number for expert in found)):
        for part in parts:
            layer = f"{prefix}.{number}.{part}"
            if layer not in present:
                raise CheckpointError(
                    f"{layer}: the checkpoint does not hold it beside the other experts; complete "
                    f"the checkpoint, or --ignore {prefix}"
                )
            shape = checkpoint.weights[layer].shape
            if shapes.setdefault(part, shape) != shape:
                raise CheckpointError(
                    f"{layer}: is {list(shape)}, and other experts are {list(shapes[part])}; "
                    f"download the checkpoint again, or --ignore {prefix}"
                )
    rows = {part: shape[0] for part, shape in shapes.items() if part != experts.DOWN}
    width = shapes.get(experts.DOWN, (0, 0))[1]
    if set(rows.values()) != {width}:
        raise CheckpointError(
            f"{prefix}: its experts have {sorted(set(rows.values()))} rows before and {width} "
            f"columns behind the activation, which do not fit together; --ignore {prefix}"
        )


def _with_whole_experts(
    formats: dict[str, LayerFormat], wanted: Mapping[str, LayerFormat]
) -> dict[str, LayerFormat]:
    """`formats` without the experts of decoder layers that some block size does not fit."""
    fitting = experts.prefixes(formats)
    for prefix, layers in experts.prefixes(wanted).items():
        if len(layers) != len(fitting.get(prefix, ())):
            for layer in layers:
                formats.pop(layer, None)
    return formats


def _resolved(
    scheme: Scheme, linear: list[str], formats: Mapping[str, LayerFormat], absent: list[str]
) -> Scheme:
    """The scheme with exact names: what stays in 16 bit, and every layer that differs."""
    untouched = [*(name for name in linear if name not in formats), *absent]
    overrides = {
        experts.name_for_all(name): scheme.differing(form) for name, form in formats.items()
    }
    config = {k: v for k, v in scheme.to_config().items() if k != "format_version"}
    return Scheme.parse(
        config
        | {
            "serialized": True,
            "ignore": architectures.collapse_experts(untouched, formats),
            "overrides": {name: keys for name, keys in overrides.items() if keys},
            "lm_head": "lm_head" in formats,
            "embeddings": any(map(architectures.is_embedding, formats)),
        }
    )
