"""Which layers are quantized, architecture by architecture.

Names are the checkpoint's module names. A layer is quantized if it belongs to a numbered decoder
layer and its name there is in the table; everything else (embeddings, norms, the output projection,
routers, vision towers, projectors) stays in 16 bit unless an option names it. Experts are layers of
their decoder layer, routed ones (:mod:`.experts`) in every architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from dialect_kernels.layer_names import matches

from .experts import expert_of, prefixes

__all__ = [
    "ARCHITECTURES",
    "block_of",
    "candidate_layers",
    "collapse_experts",
    "decoder_layer_pattern",
    "default_layers",
    "fused_with",
    "holds_experts",
    "is_candidate",
    "is_embedding",
    "is_in_encoder",
    "is_in_numbered_block",
    "is_never_packed",
    "is_vocabulary",
    "patterns_of",
]

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LLAMA = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_UNGATED = (*_ATTENTION, "mlp.up_proj", "mlp.down_proj")
_GLM = (*_ATTENTION, "mlp.gate_up_proj", "mlp.down_proj")
_PHI3 = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_OPT = (*_ATTENTION[:3], "self_attn.out_proj", "fc1", "fc2")
_MLP_4H = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_FALCON = ("self_attention.query_key_value", "self_attention.dense", *_MLP_4H)
_NEOX = ("attention.query_key_value", "attention.dense", *_MLP_4H)
_GPTJ = (
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.out_proj",
    "mlp.fc_in",
    "mlp.fc_out",
)
_FALCON_H1 = (
    *_ATTENTION,
    "mamba.in_proj",
    "mamba.out_proj",
    "feed_forward.gate_proj",
    "feed_forward.up_proj",
    "feed_forward.down_proj",
)
_NEMOTRON_H = (
    "mixer.in_proj",
    "mixer.out_proj",
    "mixer.q_proj",
    "mixer.k_proj",
    "mixer.v_proj",
    "mixer.o_proj",
    "mixer.up_proj",
    "mixer.down_proj",
)
_LFM2 = (
    "conv.in_proj",
    "conv.out_proj",
    *_ATTENTION[:3],
    "self_attn.out_proj",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)
_QWEN3_5 = (
    *_LLAMA,
    "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z",
    "linear_attn.in_proj_b",
    "linear_attn.in_proj_a",
    "linear_attn.out_proj",
)
_LATENT = (
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_GEMMA_3N = (
    *_LLAMA,
    "laurel.linear_left",
    "laurel.linear_right",
    "per_layer_projection",
)
_LLAMA_4 = (*_ATTENTION, *(f"feed_forward.{part}_proj" for part in ("gate", "up", "down")))
_ZAMBA_2 = (
    *(
        f"{mixer}.{part}_proj"
        for mixer in ("mamba", "mamba_decoder.mamba")
        for part in ("in", "out")
    ),
    "linear",
    *(f"shared_transformer.{name}" for name in _ATTENTION),
    "shared_transformer.feed_forward.gate_up_proj",
    "shared_transformer.feed_forward.down_proj",
)
_SHARED_GATED = tuple(f"mlp.shared_mlp.{part}_proj" for part in ("gate", "up", "down"))
_SHARED_MLP = ("shared_mlp.input_linear", "shared_mlp.output_linear")
_BERT = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)

ARCHITECTURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Ministral3ForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "GemmaForCausalLM",
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "Gemma3ForConditionalGeneration",
            "CohereForCausalLM",
            "Cohere2ForCausalLM",
            "Ernie4_5ForCausalLM",
            "Exaone4ForCausalLM",
            "GraniteForCausalLM",
            "HunYuanDenseV1ForCausalLM",
            "OlmoForCausalLM",
            "Olmo2ForCausalLM",
            "Olmo3ForCausalLM",
            "SeedOssForCausalLM",
            "SmolLM3ForCausalLM",
            "StableLmForCausalLM",
            "CwmForCausalLM",
            "GraniteSWAForCausalLM",
            "HyperCLOVAXForCausalLM",
            "VaultGemmaForCausalLM",
            "Cohere2MoeForCausalLM",
            "Ernie4_5_MoeForCausalLM",
            "ExaoneMoeForCausalLM",
            "Glm4MoeForCausalLM",
            "MellumForCausalLM",
            "MiMoV2FlashForCausalLM",
            "Gemma2Model",
            "Gemma3TextModel",
            "LlamaModel",
            "LlamaForSequenceClassification",
            "MistralModel",
            "Qwen2Model",
            "Qwen3Model",
            "Qwen3ForSequenceClassification",
            "PaliGemmaForConditionalGeneration",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(
        ("ApertusForCausalLM", "ArceeForCausalLM", "Jais2ForCausalLM", "NemotronForCausalLM"),
        _UNGATED,
    ),
    **dict.fromkeys(("GlmForCausalLM", "Glm4ForCausalLM"), _GLM),
    "Phi3ForCausalLM": _PHI3,
    "PhiForCausalLM": (*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    "OPTForCausalLM": _OPT,
    "GPTBigCodeForCausalLM": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "Starcoder2ForCausalLM": (*_ATTENTION, "mlp.c_fc", "mlp.c_proj"),
    "FalconForCausalLM": _FALCON,
    "BloomForCausalLM": _FALCON,
    "GPTNeoXForCausalLM": _NEOX,
    "GPTJForCausalLM": _GPTJ,
    "FalconH1ForCausalLM": _FALCON_H1,
    "NemotronHForCausalLM": _NEMOTRON_H,
    **dict.fromkeys(("Lfm2ForCausalLM", "Lfm2MoeForCausalLM"), _LFM2),
    "Qwen3_5ForCausalLM": _QWEN3_5,
    "Qwen3_5ForConditionalGeneration": _QWEN3_5,
    "AfmoeForCausalLM": (*_LLAMA, "self_attn.gate_proj"),
    "Gemma3nForCausalLM": _GEMMA_3N,
    "Gemma4ForCausalLM": (*_LLAMA, "per_layer_projection"),
    "Llama4ForCausalLM": _LLAMA_4,
    "Zamba2ForCausalLM": _ZAMBA_2,
    **dict.fromkeys(
        (
            "FlexOlmoForCausalLM",
            "GptOssForCausalLM",
            "GraniteMoeForCausalLM",
            "MiniMaxM2ForCausalLM",
            "MixtralForCausalLM",
            "OlmoeForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3MoeForCausalLM",
        ),
        _ATTENTION,
    ),
    **dict.fromkeys(
        ("GraniteMoeSWAForCausalLM", "GraniteMoeSharedForCausalLM"), (*_ATTENTION, *_SHARED_MLP)
    ),
    "GraniteMoeHybridForCausalLM": (
        *_ATTENTION,
        *_SHARED_MLP,
        "mamba.in_proj",
        "mamba.out_proj",
    ),
    "HrmTextForCausalLM": ("attn.gqkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "HYV3ForCausalLM": (*_LLAMA, *_SHARED_GATED),
    "HunYuanMoEV1ForCausalLM": (*_ATTENTION, *_SHARED_GATED),
    "Mamba2ForCausalLM": ("mixer.in_proj", "mixer.out_proj"),
    **dict.fromkeys(
        (
            "AXK1ForCausalLM",
            "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM",
            "Glm4MoeLiteForCausalLM",
            "MiniCPM3ForCausalLM",
        ),
        _LATENT,
    ),
    **dict.fromkeys(
        (
            "BertModel",
            "BertForSequenceClassification",
            "RobertaModel",
            "XLMRobertaModel",
            "XLMRobertaForSequenceClassification",
        ),
        _BERT,
    ),
    **dict.fromkeys(
        ("ModernBertModel", "ModernBertForSequenceClassification"),
        ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
    ),
}
"""Architecture (config.json) -> names inside a decoder layer that are quantized."""

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Layers that engines run as one matrix: their parts need one block size, or 16 bit, together."""

_EVERY_ROUTED_EXPERT = "re:.*\\.experts\\..*"
"""One pattern for the experts of a model: their names alone would make config.json megabytes."""

_REPEATED_BLOCK = re.compile(r"(?:^|\.)\d+\.")
_DECODER_LAYER = re.compile(r"(?:^|.*\.)(?:layers?|h)\.(?P<block>\d+)\.(?P<inner>.+)$")
_NOT_TEXT = re.compile(
    r"(?:^|\.)(?:"
    r"vision\w*|visual\w*|vit|\w*_vit|vit_\w*|image\w*|img\w*|video\w*|vpm|siglip\w*|clip\w*"
    r"|sam_model|qwen2_model|\w*vision_(?:model|tower|encoder)"
    r"|audio\w*|apm|speech\w*|sound\w*|whisper\w*|conformer\w*|talker|code2wav|token2wav|tts\w*"
    r"|\w*_tower|(?!text_)\w+_encoder"
    r"|\w*projector\w*|\w*resampler\w*|\w*connector\w*|\w*merger\w*|\w*qformer\w*|perceiver\w*"
    r")(?:\.|$)"
    r"|^(?:model\.)?(?:mlp1|mlp_AR|linear_proj|language_projection|layerwise_\w+|spatial_\w+)\."
)
"""Towers of other modalities and what joins them to the text model."""
_DRAFT = re.compile(r"(?:^|\.)(?:mtp\w*|nextn\w*|eh_proj|eagle\w*|medusa\w*)(?:\.|$)")
"""Multi-token prediction: a draft model, whose joining projections engines build in 16 bit."""
_OF_EXPERTS = re.compile(
    r"(?:^|\.)experts(?:\.|$)|(?:^|\.)block_sparse_moe\.(?:in|out)put_linear(?:\.|$)"
)
_SHARED_EXPERT = re.compile(r"(?:^|\.)shared_experts?\.(?:gate|up|down)_proj$")
_NEVER_PACKED = re.compile(
    r"(?:^|\.)(?:\w*router\w*|gate|\w+_gate|gating|\w*indexer\w*|\w*embed\w*|wte|wpe|\w*norm\w*"
    r"|ln_\w+|\w+_coefs|\w+_adapter_list|lm_head)(?:\.|$)"
    r"|(?:^|\.)(?:conv\w*|\w+_conv\w*|x_proj|dt_proj|classifier|score)$"
)
"""The second line holds the last words of names only: LFM2's ``conv.in_proj`` is a linear layer."""
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|word_embeddings?|tok_embeddings|token_embd|wte|embed_in|embeddings?)$"
)
"""Last words of the names of matrices that hold a vector for each token of the vocabulary."""
_ENCODER = re.compile(r"(?:^|\.)encoder\.")
_SSM = ("x_proj", "in_proj", "out_proj", "dt_proj")
"""The linear layers of a Mamba-1 mixer, which vLLM builds in 16 bit; Mamba-2 has no ``x_proj``."""


def default_layers(architecture: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that are quantized by default, in their order.

    Args:
        architecture: a key of :data:`ARCHITECTURES`.
        names: the checkpoint's names.
    """
    inside = set(ARCHITECTURES[architecture])
    return [
        name
        for name in names
        if (found := _DECODER_LAYER.match(name)) is not None
        and (found["inner"] in inside or _is_an_expert(name))
        and is_candidate(name)
    ]


def _is_an_expert(name: str) -> bool:
    """Whether a layer is a matrix of a routed or of a shared expert."""
    return expert_of(name) is not None or _SHARED_EXPERT.search(name) is not None


def holds_experts(name: str) -> bool:
    """Whether a layer, or the module of a tensor, belongs to the routed experts of a mixture."""
    return _OF_EXPERTS.search(name) is not None


def collapse_experts(names: Iterable[str], packed: Iterable[str] = ()) -> list[str]:
    """`names` in their order, but for routed experts, for which less stands at the end.

    Args:
        names: layers in 16 bit.
        packed: those in 4 bit. If no routed experts are among them, one pattern stands for all
            experts, else the name of the experts' module for those of a decoder layer.
    """
    listed: list[str] = []
    experts: list[str] = []
    for name in names:
        (experts if matches(_EVERY_ROUTED_EXPERT, name) else listed).append(name)
    if not experts:
        return listed
    if not prefixes(packed):
        return [*listed, _EVERY_ROUTED_EXPERT]
    modules = prefixes(experts)
    others = set(experts).difference(*modules.values())
    return [*listed, *(name for name in experts if name in others), *modules]


def is_embedding(name: str) -> bool:
    """Whether a matrix holds the embeddings of the text model's tokens.

    Works for the checkpoint's names and for vLLM's. Embeddings of positions, of kinds of tokens and
    of single decoder layers are others.
    """
    return (
        _EMBEDDING.search(name) is not None
        and not is_in_numbered_block(name)
        and _NOT_TEXT.search(name) is None
        and _DRAFT.search(name) is None
    )


def is_vocabulary(name: str) -> bool:
    """Whether a matrix has a row for each token: embeddings, or the output projection."""
    return is_embedding(name) or name.rpartition(".")[2] == "lm_head"


def is_never_packed(name: str) -> bool:
    """Whether engines read the layer in 16 bit only.

    These are embeddings, norms, routers and other gates, convolutions, indexers, the draft layers
    of multi-token prediction, the output projection, and what belongs to routed experts but is no
    matrix of one.
    """
    if holds_experts(name) and expert_of(name) is None:
        return True
    return any(pattern.search(name) for pattern in (_NEVER_PACKED, _DRAFT))


def is_candidate(name: str) -> bool:
    """Whether a linear layer lies in a numbered block of the text model and may be packed.

    Works for the checkpoint's names and for vLLM's; engines quantize these while loading.
    """
    return (
        is_in_numbered_block(name) and _NOT_TEXT.search(name) is None and not is_never_packed(name)
    )


def candidate_layers(names: Iterable[str]) -> list[str]:
    """Those of `names` that engines pack, as far as names tell.

    Left out are, beside what :func:`is_candidate` leaves out, encoders beside a decoder and
    Mamba-1 mixers.
    """
    known = set(names)
    has_decoder = any(is_candidate(name) and not is_in_encoder(name) for name in known)
    found = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        in_mamba_1 = leaf in _SSM and f"{parent}.x_proj" in known
        is_encoder = has_decoder and is_in_encoder(name)
        if is_candidate(name) and not in_mamba_1 and not is_encoder:
            found.append(name)
    return found


def block_of(name: str) -> int:
    """The number of the decoder layer that the layer `name` lies in; -1 if it lies in none."""
    found = _DECODER_LAYER.match(name)
    return int(found["block"]) if found is not None else -1


def is_in_numbered_block(name: str) -> bool:
    """Whether a layer lies in one of several blocks of the same kind, whatever they are called."""
    return _REPEATED_BLOCK.search(name) is not None


def is_in_encoder(name: str) -> bool:
    """Whether a layer belongs to an encoder, which beside a text model is one of speech."""
    return _ENCODER.search(name) is not None


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


def patterns_of(names: Iterable[str]) -> str:
    """The patterns of layers in one line, sorted, in the quotes that a shell needs."""
    return " ".join(sorted({f"'{decoder_layer_pattern(name)}'" for name in names}))
