"""Tiny random models, and what a quantized model must compute, without vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from dialect_kernels import PackedTensor, baselines, quantize, reference
from dialect_kernels.formatbook import SEMANTIC_32, Formatbook, Rotation
from dialect_kernels.rotation import rotate_activation

VOCABULARY = 500  # vLLM pads it to 512
PROMPT = [1, 17, 300, 42, 499, 8, 8, 123, 77, 250, 3]

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
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

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", _HEADS),
    "MistralForCausalLM": ("MistralConfig", _HEADS | {"sliding_window": None}),
    "Qwen2ForCausalLM": ("Qwen2Config", {"tie_word_embeddings": True}),
    "Qwen3ForCausalLM": ("Qwen3Config", _HEADS),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        _HEADS | {"query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
    "Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        _HEADS | {"query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
    "Phi3ForCausalLM": ("Phi3Config", {}),
    "OPTForCausalLM": (
        "OPTConfig",
        {
            "ffn_dim": 192,
            "word_embed_proj_dim": 128,
            "init_std": 0.1,
            "activation_function": "relu",
        },
    ),
    "MixtralForCausalLM": (
        "MixtralConfig",
        _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}
"""Architecture -> (class of its config, what differs from the common values)."""

QUANTIZED_LEAVES = {
    "LlamaForCausalLM": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "MistralForCausalLM": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "Qwen2ForCausalLM": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "Qwen3ForCausalLM": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "Gemma2ForCausalLM": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "Gemma3ForCausalLM": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "Phi3ForCausalLM": "qkv_proj o_proj gate_up_proj down_proj",
    "OPTForCausalLM": "q_proj k_proj v_proj out_proj fc1 fc2",
    "MixtralForCausalLM": "q_proj k_proj v_proj o_proj w1 w2 w3",
}
"""Written out a second time, so that an error in the plugin's table shows."""


def build(architecture: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random bfloat16 model of `architecture` in `directory`, in several shards."""
    torch.manual_seed(seed)
    config_class, differing = CONFIGS[architecture]
    config = getattr(transformers, config_class)(**(COMMON | differing | changes))
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="300KB")
    return directory


def is_quantized(architecture: str, name: str) -> bool:
    """Whether a module's or weight's name is one of a quantized layer."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    return ".layers." in f".{name}" and leaf in QUANTIZED_LEAVES[architecture].split()


def expected_logprobs(
    directory: Path,
    architecture: str,
    activation_format: str = "dialect",
    book: Formatbook = SEMANTIC_32,
    block_size: Callable[[str], int | None] = lambda name: 32,
    lm_head: bool = False,
    adapter: dict[str, torch.Tensor] | None = None,
    adapter_scale: float = 1.0,
    rotation: Rotation = "none",
    embeddings: bool = False,
) -> torch.Tensor:
    """Log-probabilities [len(PROMPT), VOCABULARY] of the quantized model, float32.

    transformers computes the model; the quantized layers get decoded weights and rounded inputs.
    `block_size` says None for layers that stay in 16 bit. `adapter` holds a LoRA adapter's tensors,
    which see the inputs before they are rotated and rounded.
    """
    model = getattr(transformers, architecture).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    if embeddings:
        matrix = model.get_input_embeddings().weight
        matrix.data = quantize(matrix.data, book).dequantize()
    for name, module in model.named_modules():
        size = block_size(name)
        if name.endswith(".experts") and size is not None:
            settings = (book, size, rotation)
            module.forward = _expert_by_expert(module, activation_format, settings)
        wanted = is_quantized(architecture, name) or (name == "lm_head" and lm_head)
        if not isinstance(module, torch.nn.Linear) or not wanted or size is None:
            continue
        if adapter is not None:
            down = adapter[f"base_model.model.{name}.lora_A.weight"]
            up = adapter[f"base_model.model.{name}.lora_B.weight"]
            module.register_forward_hook(_add_adapter(down, up, adapter_scale))
        packed = quantize(module.weight.data, book, size, rotation=rotation)
        module.weight.data = packed.dequantize()
        module.forward = _on_rounded_input(module.forward, activation_format, packed)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :, :VOCABULARY]
    return torch.log_softmax(logits, dim=-1)


def _on_rounded_input(
    forward: Callable[..., torch.Tensor], activation_format: str, weight: PackedTensor
) -> Callable[..., torch.Tensor]:
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return forward(
            _rounded(x.reshape(-1, x.shape[-1]), activation_format, weight).view(x.shape)
        )

    return rounded


def _rounded(x: torch.Tensor, activation_format: str, weight: PackedTensor) -> torch.Tensor:
    tokens = rotate_activation(x, weight.rotation)
    if activation_format == "dialect":
        tokens = reference.round_activation(tokens, weight.book, weight.block_size)
    elif activation_format == "fp8":
        codes, scale = baselines.quantize_fp8(tokens)
        tokens = codes.to(torch.float32) * scale[:, None]
    return tokens


def _expert_by_expert(
    module: Any, activation_format: str, settings: tuple[Formatbook, int, Rotation]
) -> Callable[..., torch.Tensor]:
    """What transformers' stacked experts compute, each token and each expert by itself."""
    book, size, rotation = settings
    stacks = [
        [reference.quantize(weight, book, size, rotation=rotation) for weight in stack.detach()]
        for stack in (module.gate_up_proj, module.down_proj)
    ]

    def product(x: torch.Tensor, weight: PackedTensor) -> torch.Tensor:
        return _rounded(x, activation_format, weight) @ weight.dequantize().T

    def forward(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for token in range(len(x)):
            for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                gate, up = product(x[token : token + 1], stacks[0][expert]).chunk(2, dim=-1)
                inner = torch.nn.functional.silu(gate) * up
                result[token] += weight * product(inner, stacks[1][expert])[0]
        return result

    return forward


def _add_adapter(down: torch.Tensor, up: torch.Tensor, scale: float) -> Callable[..., Any]:
    def hook(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + scale * (inputs[0] @ down.T @ up.T)

    return hook


def checkpoint_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors
