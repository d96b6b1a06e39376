"""Which layers are quantized, architecture by architecture.

Names are the checkpoint's module names. A layer is quantized if it belongs to a numbered decoder
layer and its name there is in the table; everything else (embeddings, norms, the output projection,
routers, experts, vision towers, projectors) stays in 16 bit unless it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = [
    "ARCHITECTURES",
    "EXPERT_ARCHITECTURES",
    "UnknownArchitectureError",
    "candidate_layers",
    "decoder_layer_pattern",
    "default_layers",
    "is_default_layer",
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

EXPERT_ARCHITECTURES = frozenset({"MixtralForCausalLM"})
"""Architectures whose experts stay in 16 bit; the user is told once."""

_DECODER_LAYER = re.compile(r"(?:^|.*\.)layers\.\d+\.(?P<inner>.+)$")
_NOT_TEXT = re.compile(r"(?:^|\.)(?:vision\w*|visual\w*|audio\w*|\w*projector\w*)(?:\.|$)")
_NEVER_BY_DEFAULT = re.compile(
    r"(?:^|\.)(?:experts?|router\w*|gate|\w*embed\w*|\w*norm\w*|lm_head)(?:\.|$)"
)


class UnknownArchitectureError(ValueError):
    """An architecture that is not in the table."""


def is_default_layer(architecture: str, name: str) -> bool:
    """Whether the layer `name` is quantized by default.

    Works for the checkpoint's names and for vLLM's, which differ in front of ``layers``.

    Raises:
        UnknownArchitectureError: if the architecture is not in the table.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnknownArchitectureError(
            f"architectures: {architecture!r} is not in the table ({known})"
        )
    inside = _DECODER_LAYER.match(name)
    if inside is None or _NOT_TEXT.search(name):
        return False
    return inside["inner"] in ARCHITECTURES[architecture]


def default_layers(architecture: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that are quantized by default, in their order."""
    return [name for name in names if is_default_layer(architecture, name)]


def is_candidate(name: str) -> bool:
    """Whether a linear layer of an unknown architecture looks like a decoder layer's."""
    return (
        _DECODER_LAYER.match(name) is not None
        and _NOT_TEXT.search(name) is None
        and _NEVER_BY_DEFAULT.search(name) is None
    )


def candidate_layers(names: Iterable[str]) -> list[str]:
    """Those of `names` that look like linear layers of numbered decoder layers."""
    return [name for name in names if is_candidate(name)]


def decoder_layer_pattern(name: str) -> str:
    """`name` with its layer number replaced, as a ``re:`` pattern: for messages and grouping."""
    return "re:" + re.sub(r"\.\d+\.", r".\\d+.", name.replace(".", "."))
