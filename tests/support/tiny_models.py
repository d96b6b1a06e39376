"""Tiny random checkpoints of every architecture in the table, with a tokenizer of their own."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

COMMON = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONFIGS = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "MistralForCausalLM": ("MistralConfig", {"sliding_window": None}),
    "Qwen2ForCausalLM": ("Qwen2Config", {"head_dim": None}),
    "Qwen3ForCausalLM": ("Qwen3Config", {}),
    "Gemma2ForCausalLM": ("Gemma2Config", {"query_pre_attn_scalar": 64}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {"query_pre_attn_scalar": 64}),
    "Phi3ForCausalLM": ("Phi3Config", {"head_dim": None}),
    "OPTForCausalLM": (
        "OPTConfig",
        {"ffn_dim": 256, "word_embed_proj_dim": 128, "head_dim": None},
    ),
    "MixtralForCausalLM": (
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}
TEXT = "def hello(name):\n    return f'hello {name}'\n" * 20


def make_model(path: Path, architecture: str, *, seed: int = 0, **overrides: object) -> Path:
    """Write a random bf16 model and return its directory; `shard` splits it into files."""
    config_class, own = CONFIGS[architecture]
    shard = overrides.pop("shard", None)
    settings = {**COMMON, **own, **overrides}
    settings = {key: value for key, value in settings.items() if value is not None}
    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config).to(torch.bfloat16)
    with torch.no_grad():  # biases begin as zeros, which would hide a lost one
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    make_tokenizer(settings["vocab_size"]).save_pretrained(path)
    return path


def make_tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
