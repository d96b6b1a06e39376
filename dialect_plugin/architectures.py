"""Which layers are quantized, architecture by architecture.

Names are the checkpoint's module names. A layer is quantized if it belongs to a numbered decoder
layer and its name there is in the table; everything else (embeddings, norms, the output projection,
routers, experts, vision towers, projectors) stays in 16 bit unless an option names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from dialect_kernels.layer_names import matches

__all__ = [
    "ARCHITECTURES",
    "candidate_layers",
    "collapse_experts",
    "decoder_layer_pattern",
    "default_layers",
    "fused_with",
    "is_candidate",
    "is_default_layer",
    "is_expert",
    "is_never_packed",
]

_LLAMA = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_PHI3 = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_OPT = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "fc1",
    "fc2",
)

ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _LLAMA,
    "Gemma3ForCausalLM": _LLAMA,
    "Gemma3ForConditionalGeneration": _LLAMA,
    "Phi3ForCausalLM": _PHI3,
    "OPTForCausalLM": _OPT,
    "MixtralForCausalLM": _LLAMA[:4],
}
"""Architecture (config.json) -> names inside a decoder layer that are quantized."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines run as one matrix: their parts need one block size, or 16 bit, together."""

_ROUTED_EXPERTS = "re:.*\\.experts\\..*"
"""One pattern for the experts of a model: their names alone would make config.json megabytes."""

_REPEATED_BLOCK = re.compile(r"(?:^|\.)\d+\.")
_DECODER_LAYER = re.compile(r"(?:^|.*\.)layers\.\d+\.(?P<inner>.+)$")
_NOT_TEXT = re.compile(r"(?:^|\.)(?:vision\w*|visual\w*|audio\w*|\w*projector\w*)(?:\.|$)")
_EXPERT = re.compile(r"(?:^|\.)(?:experts?|\w*_experts?)(?:\.|$)")
_NEVER_PACKED = re.compile(
    r"(?:^|\.)(?:router\w*|gate|\w*embed\w*|wte|wpe|\w*norm\w*|ln_\w+|lm_head)(?:\.|$)"
)


def is_default_layer(architecture: str, name: str) -> bool:
    """Whether the layer `name` is quantized by default.

    Works for the checkpoint's names and for vLLM's, which differ in front of ``layers``.

    Raises:
        KeyError: if the architecture is not in :data:`ARCHITECTURES`.
    """
    inside = _DECODER_LAYER.match(name)
    if inside is None or _NOT_TEXT.search(name):
        return False
    return inside["inner"] in ARCHITECTURES[architecture]


def default_layers(architecture: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that are quantized by default, in their order."""
    return [name for name in names if is_default_layer(architecture, name)]


def is_expert(name: str) -> bool:
    """Whether a layer, or the module of a tensor, belongs to the experts of a mixture.

    Experts stay in 16 bit. Shared experts are experts too.
    """
    return _EXPERT.search(name) is not None


def collapse_experts(names: Iterable[str]) -> list[str]:
    """`names` in their order, but for routed experts, which one pattern at the end stands for."""
    listed, has_experts = [], False
    for name in names:
        if matches(_ROUTED_EXPERTS, name):
            has_experts = True
        else:
            listed.append(name)
    return [*listed, _ROUTED_EXPERTS] if has_experts else listed


def is_never_packed(name: str) -> bool:
    """Whether engines read the layer in 16 bit only: embedding, norm, router, expert, lm_head."""
    return is_expert(name) or _NEVER_PACKED.search(name) is not None


def is_candidate(name: str) -> bool:
    """Whether a linear layer of an unknown architecture looks like a decoder layer's."""
    return (
        _REPEATED_BLOCK.search(name) is not None
        and _NOT_TEXT.search(name) is None
        and not is_never_packed(name)
    )


def candidate_layers(names: Iterable[str]) -> list[str]:
    """Those of `names` that look like linear layers of numbered decoder layers."""
    return [name for name in names if is_candidate(name)]


def fused_with(name: str) -> tuple[str, ...]:
    """The layers, itself included, that engines fuse with the layer `name`; empty if none."""
    parent, _, leaf = name.rpartition(".")
    for group in _FUSED:
        if leaf in group:
            return tuple(f"{parent}.{part}" if parent else part for part in group)
    return ()


def decoder_layer_pattern(name: str) -> str:
    """`name` as a ``re:`` pattern for the same layer of every decoder layer."""
    return "re:" + re.sub(r"(^|\.)\d+(?=\.)", r"\1\\d+", name)
