"""Tiny random checkpoints of every decoder that the sweep serves, and copies with decoded weights.

All are made by transformers' own class of the architecture, in the form it saves.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from dialect_kernels.ops import dequantize
from dialect_plugin.checkpoint.reader import Checkpoint, open_checkpoint, open_packed
from dialect_plugin.experts import ExpertTensor, layout_of
from tests.support.served_models import COMMON, VOCABULARY

_COMMON = COMMON | {"intermediate_size": 256}
_HEADS = {"head_dim": 32}
_TIED = {"tie_word_embeddings": True}
_GPT = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
_SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
_MAMBA_2 = {"mamba_d_state": 32, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_WIDE_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_MOE = _WIDE_MOE | {"moe_intermediate_size": 64}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
_MLA = {  # the latent sizes that vLLM's CPU kernel is compiled for
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}


def _parts(text: str, vision: str | None, **differing: Any) -> dict[str, Any]:
    """Configs of a text model and a tower, by their model types."""
    tower = {"model_type": vision} if vision else {}
    tower |= {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return {
        "text_config": _COMMON | _HEADS | {"model_type": text} | differing,
        "vision_config": tower,
    }


KINDS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "Dense": {
        "ApertusForCausalLM": ("ApertusConfig", {}),
        "ArceeForCausalLM": ("ArceeConfig", _HEADS),
        "BloomForCausalLM": ("BloomConfig", {"n_layer": 2, "n_head": 4} | _TIED),
        "CohereForCausalLM": ("CohereConfig", {}),
        "Cohere2ForCausalLM": ("Cohere2Config", _HEADS),
        "CwmForCausalLM": ("CwmConfig", _HEADS | _SLIDING),
        "Ernie4_5ForCausalLM": ("Ernie4_5Config", _HEADS),
        "Exaone4ForCausalLM": (
            "Exaone4Config",
            _HEADS | {"sliding_window": 64, "sliding_window_pattern": 2},
        ),
        "FalconForCausalLM": (
            "FalconConfig",
            {"new_decoder_architecture": True, "num_kv_heads": 2},
        ),
        "GPTBigCodeForCausalLM": ("GPTBigCodeConfig", _GPT | _TIED | {"num_key_value_heads": 1}),
        "GPTJForCausalLM": ("GPTJConfig", _GPT | {"n_inner": 256, "rotary_dim": 16}),
        "GPTNeoXForCausalLM": ("GPTNeoXConfig", {}),
        "GemmaForCausalLM": ("GemmaConfig", _HEADS),
        "Gemma2ForCausalLM": ("Gemma2Config", _HEADS | {"query_pre_attn_scalar": 32} | _TIED),
        "Gemma3ForCausalLM": ("Gemma3TextConfig", _HEADS | {"query_pre_attn_scalar": 32} | _TIED),
        "Gemma3nForCausalLM": (
            "Gemma3nTextConfig",
            _HEADS
            | _TIED
            | {
                "num_hidden_layers": 4,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "sliding_window": 64,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 32,
                "laurel_rank": 32,
                "intermediate_size": [256] * 4,
                "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
            },
        ),
        "Gemma4ForCausalLM": (
            "Gemma4TextConfig",
            _HEADS
            | {
                "global_head_dim": 32,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": VOCABULARY,
                "num_kv_shared_layers": 0,
            },
        ),
        "GlmForCausalLM": ("GlmConfig", _HEADS),
        "Glm4ForCausalLM": ("Glm4Config", _HEADS),
        "GraniteForCausalLM": ("GraniteConfig", {}),
        "GraniteSWAForCausalLM": ("GraniteSWAConfig", _SLIDING),
        "HrmTextForCausalLM": ("HrmTextConfig", _HEADS | {"num_key_value_heads": 4}),
        "HunYuanDenseV1ForCausalLM": ("HunYuanDenseV1Config", _HEADS),
        "HyperCLOVAXForCausalLM": ("HyperCLOVAXConfig", _HEADS),
        "Jais2ForCausalLM": ("Jais2Config", _HEADS),
        "LlamaForCausalLM": ("LlamaConfig", _HEADS),
        "MiniCPM3ForCausalLM": (
            "MiniCPM3Config",
            _MLA | {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "dim_model_base": 128},
        ),
        "Ministral3ForCausalLM": ("Ministral3Config", _HEADS | {"sliding_window": None}),
        "MistralForCausalLM": ("MistralConfig", _HEADS | {"sliding_window": None}),
        "NemotronForCausalLM": ("NemotronConfig", _HEADS),
        "OPTForCausalLM": (
            "OPTConfig",
            {"ffn_dim": 192, "word_embed_proj_dim": 128, "init_std": 0.1},
        ),
        "OlmoForCausalLM": ("OlmoConfig", {}),
        "Olmo2ForCausalLM": ("Olmo2Config", {}),
        "Olmo3ForCausalLM": ("Olmo3Config", {}),
        "PhiForCausalLM": ("PhiConfig", {"num_key_value_heads": 4}),
        "Phi3ForCausalLM": ("Phi3Config", {}),
        "Qwen2ForCausalLM": ("Qwen2Config", _TIED),
        "Qwen3ForCausalLM": ("Qwen3Config", _HEADS),
        "SeedOssForCausalLM": ("SeedOssConfig", _HEADS),
        "SmolLM3ForCausalLM": ("SmolLM3Config", {}),
        "StableLmForCausalLM": ("StableLmConfig", {}),
        "Starcoder2ForCausalLM": ("Starcoder2Config", {"sliding_window": None}),
        "VaultGemmaForCausalLM": (
            "VaultGemmaConfig",
            _HEADS | _SLIDING | {"query_pre_attn_scalar": 32} | _TIED,
        ),
    },
    "Mixtures of experts": {
        "AfmoeForCausalLM": (
            "AfmoeConfig",
            _HEADS
            | _MOE
            | _SLIDING
            | {"num_dense_layers": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1}
            | {"score_func": "sigmoid", "route_norm": True},  # vLLM's
        ),
        "Cohere2MoeForCausalLM": ("Cohere2MoeConfig", _HEADS | _MOE | _SLIDING | _DENSE_FIRST),
        "Ernie4_5_MoeForCausalLM": (
            "Ernie4_5_MoeConfig",
            {
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_intermediate_size": 64,
                "moe_num_shared_experts": 1,
            },
        ),
        "ExaoneMoeForCausalLM": (
            "ExaoneMoeConfig",
            _HEADS | _MOE | _SLIDING | _DENSE_FIRST | {"num_shared_experts": 1},
        ),
        "FlexOlmoForCausalLM": ("FlexOlmoConfig", _WIDE_MOE),
        "Glm4MoeForCausalLM": ("Glm4MoeConfig", _HEADS | _ROUTED),
        "GptOssForCausalLM": ("GptOssConfig", _HEADS | _SLIDING | _LOCAL),
        "GraniteMoeForCausalLM": ("GraniteMoeConfig", _LOCAL),
        "GraniteMoeSWAForCausalLM": (
            "GraniteMoeSWAConfig",
            _LOCAL | _SLIDING | {"shared_intermediate_size": 64},
        ),
        "GraniteMoeSharedForCausalLM": (
            "GraniteMoeSharedConfig",
            _LOCAL | {"shared_intermediate_size": 64},
        ),
        "HYV3ForCausalLM": (
            "HYV3Config",
            _HEADS
            | _MOE
            | _DENSE_FIRST
            | {"num_shared_experts": 1}
            | {"first_k_dense_replace": 1, "expert_hidden_dim": 64}  # vLLM's, as the next two
            | {"route_norm": True, "qk_norm": True},
        ),
        "HunYuanMoEV1ForCausalLM": (
            "HunYuanMoEV1Config",
            _HEADS | {"num_experts": 4, "moe_topk": 2},
        ),
        "Llama4ForCausalLM": (
            "Llama4TextConfig",
            _HEADS
            | {
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "intermediate_size": 64,
                "intermediate_size_mlp": 256,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 128,  # that of vLLM's blocks on a CPU
            },
        ),
        "MellumForCausalLM": ("MellumConfig", _HEADS | _MOE | _SLIDING | _DENSE_FIRST),
        "MiMoV2FlashForCausalLM": (
            "MiMoV2FlashConfig",
            _HEADS
            | _SLIDING
            | _DENSE_FIRST
            | {
                "v_head_dim": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
            }
            | {  # the same in vLLM's words
                "hybrid_layer_pattern": [1, 0],
                "moe_layer_freq": [0, 1],
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 4,
                "swa_head_dim": 32,
                "swa_v_head_dim": 32,
                "sliding_window_size": 64,
                "layernorm_epsilon": 1e-5,
                "add_swa_attention_sink_bias": True,
            },
        ),
        "MiniMaxM2ForCausalLM": (
            "MiniMaxM2Config",
            _HEADS
            | _LOCAL
            | {"rotary_dim": 16, "use_routing_bias": True}
            | {"scoring_func": "softmax"},  # released models have sigmoid, which vLLM has on GPUs
        ),
        "MixtralForCausalLM": ("MixtralConfig", _HEADS | _LOCAL | {"sliding_window": None}),
        "OlmoeForCausalLM": ("OlmoeConfig", _WIDE_MOE),
        "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", _MOE | {"shared_expert_intermediate_size": 64}),
        "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", _HEADS | _MOE),
    },
    "Latent attention": {
        "AXK1ForCausalLM": ("AXK1Config", _MLA | _ROUTED | {"first_k_dense_replace": 0}),
        "DeepseekV2ForCausalLM": ("DeepseekV2Config", _MLA | _ROUTED),
        "DeepseekV3ForCausalLM": (
            "DeepseekV3Config",
            _MLA | _ROUTED | {"topk_method": "noaux_tc"},
        ),
        "Glm4MoeLiteForCausalLM": ("Glm4MoeLiteConfig", _MLA | _ROUTED | _DENSE_FIRST),
    },
    "State spaces and short convolutions": {
        "FalconH1ForCausalLM": (
            "FalconH1Config",
            _HEADS | _MAMBA_2 | {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
        ),
        "GraniteMoeHybridForCausalLM": (
            "GraniteMoeHybridConfig",
            _LOCAL
            | _MAMBA_2
            | {
                "layer_types": ["mamba", "attention"],
                "mamba_n_heads": 8,
                "mamba_d_head": 32,
                "shared_intermediate_size": 64,
            },
        ),
        "Lfm2ForCausalLM": (
            "Lfm2Config",
            {
                "layer_types": ["conv", "full_attention"],
                "conv_dim": 128,
                "block_dim": 128,
                "block_ff_dim": 256,
                "block_auto_adjust_ff_dim": False,
            },
        ),
        "Lfm2MoeForCausalLM": (
            "Lfm2MoeConfig",
            _MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        ),
        "Mamba2ForCausalLM": (
            "Mamba2Config",
            {
                "num_heads": 8,
                "head_dim": 32,
                "state_size": 32,
                "n_groups": 1,
                "chunk_size": 16,
            },
        ),
        "NemotronHForCausalLM": (
            "NemotronHConfig",
            _HEADS
            | {
                "num_hidden_layers": 3,
                "layers_block_type": ["mamba", "attention", "mlp"],
                "mamba_num_heads": 4,
                "mamba_head_dim": 32,
                "ssm_state_size": 32,
                "n_groups": 1,
                "chunk_size": 16,
            },
        ),
        "Zamba2ForCausalLM": (
            "Zamba2Config",
            _TIED
            | {
                "num_hidden_layers": 4,
                "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
                "num_mem_blocks": 1,
                "num_key_value_heads": 4,
                "attention_hidden_size": 256,
                "attention_head_dim": 64,
                "adapter_rank": 32,
                "use_shared_attention_adapter": True,
                "use_mem_rope": True,
                "mamba_d_state": 32,
                "mamba_headdim": 32,
                "n_mamba_heads": 8,
                "mamba_ngroups": 1,
                "chunk_size": 16,
            },
        ),
    },
    "Embeddings and rerankers": {
        "BertModel": ("BertConfig", {}),
        "BertForSequenceClassification": ("BertConfig", {"num_labels": 1}),
        "Gemma2Model": ("Gemma2Config", _HEADS | {"query_pre_attn_scalar": 32}),
        "Gemma3TextModel": ("Gemma3TextConfig", _HEADS | {"query_pre_attn_scalar": 32}),
        "LlamaModel": ("LlamaConfig", _HEADS),
        "LlamaForSequenceClassification": ("LlamaConfig", _HEADS | {"num_labels": 1}),
        "MistralModel": ("MistralConfig", _HEADS | {"sliding_window": None}),
        "ModernBertModel": ("ModernBertConfig", {}),
        "ModernBertForSequenceClassification": ("ModernBertConfig", {"num_labels": 1}),
        "Qwen2Model": ("Qwen2Config", {}),
        "Qwen3Model": ("Qwen3Config", _HEADS),
        "Qwen3ForSequenceClassification": ("Qwen3Config", _HEADS | {"num_labels": 1}),
        "RobertaModel": ("RobertaConfig", {}),
        "XLMRobertaModel": (
            "XLMRobertaConfig",
            {"position_embedding_type": "absolute"},
        ),
        "XLMRobertaForSequenceClassification": ("XLMRobertaConfig", {"num_labels": 1}),
    },
    "Text models beside a tower": {
        "PaliGemmaForConditionalGeneration": (
            "PaliGemmaConfig",
            _parts("gemma", "siglip_vision_model") | {"projection_dim": 128},
        ),
    },
}
"""Kind -> architecture -> (class of its config, what differs from the common values)."""

CONFIGS = {name: config for kind in KINDS.values() for name, config in kind.items()}
_NO_FLOAT32 = "vLLM's linear attention on a CPU is for bfloat16 only"
_NO_SPARSE = "vLLM has no sparse attention for CPUs"
_NO_MAMBA_1 = "vLLM has no Mamba-1 for CPUs; its mixers stay in 16 bit anyway"
_NOTHING = "its mixers are Mamba-1, which stay in 16 bit: nothing to pack"
_NO_TORCHVISION = "vLLM's module needs torchvision, of which there is no CPU build"
_GPU_ONLY = "vLLM has this model for CUDA and ROCm only"
UNSERVED = {
    "DbrxForCausalLM": "transformers cannot build it",
    "DeepseekV32ForCausalLM": _NO_SPARSE,
    "DeepseekV4ForCausalLM": "vLLM's config refuses the `mlp_layer_types` that transformers writes",
    "FalconMambaForCausalLM": _NOTHING,
    "GPT2LMHeadModel": "stored as [inputs, outputs]: packed only while it loads",
    "Gemma3ForConditionalGeneration": f"{_NO_TORCHVISION}; its loading is tested",
    "GlmMoeDsaForCausalLM": _NO_SPARSE,
    "HYV4ForCausalLM": _GPU_ONLY,
    "InklingForCausalLM": _GPU_ONLY,
    "JambaForCausalLM": _NO_MAMBA_1,
    "KimiLinearForCausalLM": _GPU_ONLY,
    "LagunaForCausalLM": "vLLM routes its experts on GPUs only",
    "LongcatFlashForCausalLM": "vLLM routes its experts on GPUs only",
    "MambaForCausalLM": _NOTHING,
    "OlmoHybridForCausalLM": "vLLM's linear attention of this model needs Triton",
    "Qwen3NextForCausalLM": _NO_FLOAT32,
    "Qwen3_5ForCausalLM": f"{_NO_TORCHVISION}; its names are tested",
    "Qwen3_5ForConditionalGeneration": f"{_NO_TORCHVISION}; its names are tested",
    "Qwen3_5MoeForCausalLM": _NO_TORCHVISION,
    "Qwen4ExpForCausalLM": _GPU_ONLY,
}
"""Architecture -> why the sweep does not serve it."""

_MLA_ON_CPU = {"attention_backend": "CPU_MLA"}  # another one, for AMX, is for bfloat16 only
_POOLING = {"runner": "pooling"}
_TEXT_ONLY = {"limit_mm_per_prompt": {"image": 0}}
OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(KINDS["Latent attention"], _MLA_ON_CPU),
    **dict.fromkeys(KINDS["Embeddings and rerankers"], _POOLING),
    **dict.fromkeys(KINDS["Text models beside a tower"], _TEXT_ONLY),
}
"""Architecture -> options of vLLM's engine."""


def build(architecture: str, path: Path, **overrides: Any) -> Path:
    """Write a random bfloat16 model without a tokenizer and return its directory.

    Args:
        architecture: one of :data:`CONFIGS`.
        path: the directory.
        overrides: entries of the config that differ from those of the sweep.
    """
    config_class, differing = CONFIGS[architecture]
    config = getattr(transformers, config_class)(**(_COMMON | differing | overrides))
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():  # biases begin as zeros, which would hide a lost one
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def decoded_copy(source: Path, packed: Path, destination: Path) -> Path:
    """A copy of `source` in which the layers that `packed` packs hold its decoded values.

    float32 holds them exactly; so vLLM without the plugin computes from it what is right.
    """
    shutil.copytree(source, destination)
    opened, original = open_packed(packed), open_checkpoint(source)
    for file in destination.glob("*.safetensors"):
        tensors = load_file(file)
        for name in list(tensors):
            layers = original.layers_in(name)
            if not layers or layers[0] not in opened:
                continue
            values = {layer: dequantize(opened.read(layer)).float() for layer in layers}
            tensors[name] = _held(name, tensors[name].shape, values, original)
        save_file(tensors, file, {"format": "pt"})
    return destination


def _held(
    name: str, shape: torch.Size, values: Mapping[str, torch.Tensor], source: Checkpoint
) -> torch.Tensor:
    """The tensor of a checkpoint that holds these weights of layers, or of experts."""
    held = ExpertTensor.of(name)
    if held is None:
        [value] = values.values()
        return value
    tensor = torch.full(shape, torch.nan)
    for matrix in held.matrices(shape, layout_of([source.architecture])):
        matrix.cut(tensor).copy_(values[matrix.layer])
    return tensor
