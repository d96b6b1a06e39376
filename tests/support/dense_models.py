"""Tiny random checkpoints of further dense architectures, and a copy that holds decoded weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from dialect_kernels.ops import dequantize
from dialect_plugin.checkpoint.reader import open_packed
from tests.support.served_models import VOCABULARY

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {"head_dim": 32}
_GPT = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
_MAMBA_2 = {"mamba_d_state": 32, "mamba_n_groups": 1, "mamba_chunk_size": 16}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ApertusForCausalLM": ("ApertusConfig", {}),
    "ArceeForCausalLM": ("ArceeConfig", _HEADS),
    "BloomForCausalLM": ("BloomConfig", {"n_layer": 2, "n_head": 4, "tie_word_embeddings": True}),
    "CohereForCausalLM": ("CohereConfig", {}),
    "Cohere2ForCausalLM": ("Cohere2Config", _HEADS),
    "Ernie4_5ForCausalLM": ("Ernie4_5Config", _HEADS),
    "Exaone4ForCausalLM": (
        "Exaone4Config",
        _HEADS | {"sliding_window": 64, "sliding_window_pattern": 2},
    ),
    "FalconForCausalLM": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "FalconH1ForCausalLM": (
        "FalconH1Config",
        _HEADS | _MAMBA_2 | {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    ),
    "GPTJForCausalLM": ("GPTJConfig", _GPT | {"n_inner": 256, "rotary_dim": 16}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {}),
    "GemmaForCausalLM": ("GemmaConfig", _HEADS),
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
    "HunYuanDenseV1ForCausalLM": ("HunYuanDenseV1Config", _HEADS),
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
    "Ministral3ForCausalLM": ("Ministral3Config", _HEADS | {"sliding_window": None}),
    "NemotronForCausalLM": ("NemotronConfig", _HEADS),
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
    "OlmoForCausalLM": ("OlmoConfig", {}),
    "Olmo2ForCausalLM": ("Olmo2Config", {}),
    "Olmo3ForCausalLM": ("Olmo3Config", {}),
    "PhiForCausalLM": ("PhiConfig", {"num_key_value_heads": 4}),
    "SeedOssForCausalLM": ("SeedOssConfig", _HEADS),
    "SmolLM3ForCausalLM": ("SmolLM3Config", {}),
    "StableLmForCausalLM": ("StableLmConfig", {}),
    "Starcoder2ForCausalLM": ("Starcoder2Config", {"sliding_window": None}),
}
"""Architecture -> (class of its config, what differs from the common values)."""


def make_dense_model(path: Path, architecture: str) -> Path:
    """Write a random bfloat16 model without a tokenizer and return its directory."""
    config_class, differing = CONFIGS[architecture]
    config = getattr(transformers, config_class)(**(_COMMON | differing))
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
    opened = open_packed(packed)
    for file in destination.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            layer = name.removesuffix(".weight")
            if layer in opened.layers:
                tensors[name] = dequantize(opened.read(layer)).float()
        save_file(tensors, file, {"format": "pt"})
    return destination
