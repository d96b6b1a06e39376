"""Tiny image transformers of diffusers, none of which has a layout of ours."""

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

from tests.video.support.tiny_parts import noise


def _places(count, axes):
    return torch.zeros(count, axes)


def flux():
    sizes = {"attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": (8, 12, 12)}
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=3, joint_attention_dim=32,
        pooled_projection_dim=32, **sizes,
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(1, 16, 4, seed=1), "encoder_hidden_states": noise(1, 7, 32, seed=2),
        "pooled_projections": noise(1, 32, seed=3), "timestep": torch.tensor([0.5]),
        "img_ids": _places(16, 3), "txt_ids": _places(7, 3),
    }  # fmt: skip
    return model, arguments


def flux2():
    sizes = {"attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": (8, 8, 8, 8)}
    model = Flux2Transformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=3, joint_attention_dim=32,
        timestep_guidance_channels=32, guidance_embeds=False, **sizes,
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(1, 16, 4, seed=1), "encoder_hidden_states": noise(1, 7, 32, seed=2),
        "timestep": torch.tensor([0.5]), "img_ids": _places(16, 4), "txt_ids": _places(7, 4),
    }  # fmt: skip
    return model, arguments


def sd3():
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=32, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=64, pooled_projection_dim=32, pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(1, 4, 8, 8, seed=1),
        "encoder_hidden_states": noise(1, 7, 32, seed=2),
        "pooled_projections": noise(1, 32, seed=3), "timestep": torch.tensor([500]),
    }  # fmt: skip
    return model, arguments


def qwen():
    model = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(1, 16, 16, seed=1),
        "encoder_hidden_states": noise(1, 7, 32, seed=2),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.int64),
        "timestep": torch.tensor([0.5]), "img_shapes": [[(1, 4, 4)]],
    }  # fmt: skip
    return model, arguments


def hidream():
    """Its feed-forward networks are mixtures of experts; some get no token."""
    model = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=32, num_attention_heads=2, caption_channels=[32, 32], text_emb_dim=32,
        num_routed_experts=4, num_activated_experts=1, axes_dims_rope=(16, 8, 8),
        max_resolution=(8, 8), llama_layers=[0, 1, 1, 1],
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(1, 4, 8, 8, seed=1), "timesteps": torch.tensor([500]),
        "encoder_hidden_states_t5": noise(1, 7, 32, seed=2),
        "encoder_hidden_states_llama3": noise(2, 1, 7, 32, seed=3),
        "pooled_embeds": noise(1, 32, seed=4),
    }  # fmt: skip
    return model, arguments


def z_image():
    model = ZImageTransformer2DModel(
        in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=32, axes_dims=[8, 12, 12], axes_lens=[64, 32, 32],
    )  # fmt: skip
    arguments = {
        "x": [noise(4, 1, 8, 8, seed=1)], "t": torch.tensor([0.5]),
        "cap_feats": [noise(7, 32, seed=2)],
    }  # fmt: skip
    return model, arguments


def sana():
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64,
        caption_channels=32, sample_size=8,
    )  # fmt: skip
    arguments = {
        "hidden_states": noise(1, 4, 8, 8, seed=1),
        "encoder_hidden_states": noise(1, 7, 32, seed=2), "timestep": torch.tensor([500.0]),
    }  # fmt: skip
    return model, arguments


CASES = {
    "FLUX.1": (flux, ("transformer_blocks", "single_transformer_blocks")),
    "FLUX.2": (flux2, ("transformer_blocks", "single_transformer_blocks")),
    "Stable Diffusion 3": (sd3, ("transformer_blocks",)),
    "Qwen-Image": (qwen, ("transformer_blocks",)),
    "HiDream": (hidream, ("double_stream_blocks", "single_stream_blocks")),
    "Z-Image": (z_image, ("noise_refiner", "context_refiner", "layers")),
    "SANA": (sana, ("transformer_blocks",)),
}
"""Name -> (the model and the arguments of a call, its lists of blocks)."""
