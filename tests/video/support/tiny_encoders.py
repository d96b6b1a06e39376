"""Tiny random text and image encoders of transformers, as diffusers' pipelines have them."""

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = 16
WIDTH = 32
_SIZES = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip


def _t5(config, model):
    sizes = config(vocab_size=WORDS, d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
                   feed_forward_proj="gated-gelu")  # fmt: skip
    return model(sizes)


def _qwen():
    text = {**_SIZES, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
              "out_hidden_size": WIDTH, "fullatt_block_indexes": [0]}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config)


_ENCODERS = {
    "UMT5": lambda: _t5(UMT5Config, UMT5EncoderModel),
    "T5": lambda: _t5(T5Config, T5EncoderModel),
    "CLIP": lambda: CLIPTextModel(
        CLIPTextConfig(**_SIZES, max_position_embeddings=16, projection_dim=WIDTH)
    ),
    "CLIP with projection": lambda: CLIPTextModelWithProjection(
        CLIPTextConfig(**_SIZES, max_position_embeddings=16, projection_dim=WIDTH)
    ),
    "Llama": lambda: LlamaModel(LlamaConfig(**_SIZES, num_key_value_heads=2)),
    "Gemma 2": lambda: Gemma2Model(Gemma2Config(**_SIZES, num_key_value_heads=1, head_dim=16)),
    "Qwen2.5-VL": _qwen,
    "CLIP vision": lambda: CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            **{n: size for n, size in _SIZES.items() if n != "vocab_size"},
            image_size=8, patch_size=4, projection_dim=WIDTH,
        )
    ),
}  # fmt: skip

LINEAR_LAYERS = {
    "UMT5": 12, "T5": 12, "CLIP": 12, "CLIP with projection": 12, "Llama": 14, "Gemma 2": 14,
    "Qwen2.5-VL": 14 + 5, "CLIP vision": 12,
}  # fmt: skip
"""Name -> linear layers of its blocks that become 4 bit; T5's `wo` is none of them."""


def encoder(name, dtype=torch.float32):
    """The encoder of that name, the same weights every time."""
    torch.manual_seed(0)
    return _ENCODERS[name]().eval().to(dtype)


@torch.no_grad()
def encoded(model):
    """Its last hidden states for some tokens, or for a picture."""
    if hasattr(model.config, "image_size"):
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(1, 3, 8, 8, generator=generator).to(model.dtype)
        return model(pixel_values=pixels).last_hidden_state
    tokens = torch.tensor([[2, 3, 4, 5, 6, 7, 1]])
    output = model(input_ids=tokens, output_hidden_states=True)
    return output.hidden_states[-1]
