"""Tiny models of HunyuanVideo, Framepack, HunyuanVideo 1.5 and Motif-Video."""

import torch

from tests.video.support.family_checks import (
    JOINT,
    TEXT,
    VIDEO,
    Case,
    spread,
    touch_argument,
    touch_latents,
)
from tests.video.support.tiny_parts import (
    GRID,
    attention_of,
    attentions,
    call,
    feed_forward,
    made,
    noise,
    self_attention,
    text_mask,
)

DUAL_BLOCK = {
    **self_attention(VIDEO, "attn"),
    **attention_of("attn", TEXT, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    **feed_forward(VIDEO),
    **feed_forward(TEXT, "ff_context"),
}
SINGLE_BLOCK = {
    **attention_of("attn", JOINT, "to_q", "to_k", "to_v"),
    "proj_mlp": JOINT,
    "proj_out": JOINT,
}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 32,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (8, 12, 12),
}
REFINER_KEPT = (
    *(
        f"context_embedder.time_text_embed.{part}.linear_{i}"
        for part in ("timestep_embedder", "text_embedder")
        for i in (1, 2)
    ),
    "context_embedder.proj_in",
    *(
        f"context_embedder.token_refiner.refiner_blocks.0.{name}"
        for name in (
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            *("ff.net.0.proj", "ff.net.2", "norm_out.linear"),
        )
    ),
)
HUNYUAN_KEPT = (
    *REFINER_KEPT,
    *(
        f"time_text_embed.{part}.linear_{i}"
        for part in ("timestep_embedder", "text_embedder", "guidance_embedder")
        for i in (1, 2)
    ),
    "proj_out",
)


def dual_modulation(dual=1, single=2):
    blocks = [f"transformer_blocks.{i}" for i in range(dual)]
    return (
        *(f"{block}.norm1.linear" for block in blocks),
        *(f"{block}.norm1_context.linear" for block in blocks),
        *(f"single_transformer_blocks.{i}.norm.linear" for i in range(single)),
        "norm_out.linear",
    )


def hunyuan_call(batch, text=7):
    return {
        **call(batch, text=text),
        "encoder_attention_mask": text_mask(batch, text),
        "pooled_projections": noise(batch, 32, seed=3),
        "guidance": torch.full((batch,), 6000.0),
    }


def hunyuan_case(name, model="HunyuanVideoTransformer3DModel", config=None, **options):
    fields = {
        "build": made(model, **{**HUNYUAN, **(config or {})}),
        "arguments": hunyuan_call,
        "streams": {
            **spread("transformer_blocks", 1, DUAL_BLOCK),
            **spread("single_transformer_blocks", 2, SINGLE_BLOCK),
        },
        "kept": HUNYUAN_KEPT,
        "modulation": dual_modulation(),
        "attentions": (
            "transformer_blocks.0.attn",
            *attentions("single_transformer_blocks", name="attn"),
        ),
        "touch_video": touch_latents(),
        "touch_text": touch_argument("encoder_hidden_states"),
    }
    return Case(name=name, grid=GRID, **{**fields, **options})


def framepack():
    def arguments(batch):
        given = hunyuan_call(batch)
        frames, rows, columns = GRID
        size = 2 * rows, 2 * columns
        given["image_embeds"] = noise(batch, 3, 32, seed=5)
        given["indices_latents"] = torch.arange(10, 10 + frames)
        parts = (
            ("latents_clean", 2, 8),
            ("latents_history_2x", 3, 5),
            ("latents_history_4x", 5, 0),
        )
        for part, count, first in parts:
            given[part] = noise(batch, 4, count, *size, seed=4 + count)
            given[f"indices_{part}"] = torch.arange(first, first + count)
        return given

    return hunyuan_case(
        "HunyuanVideo Framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        {"has_image_proj": True, "image_proj_dim": 32, "has_clean_x_embedder": True},
        arguments=arguments,
        kept=(*HUNYUAN_KEPT, "image_projection.up", "image_projection.down"),
        touch_text=touch_argument("encoder_hidden_states", "image_embeds"),
        beside=2 * 8 + 2 * 2 * 1 + 2 * 1 * 1,
    )


def hunyuan_15():
    def arguments(batch):
        return {
            **call(batch),
            "encoder_attention_mask": text_mask(batch, 7),
            "encoder_hidden_states_2": noise(batch, 5, 32, seed=3),
            "encoder_attention_mask_2": text_mask(batch, 5),
            "image_embeds": noise(batch, 2, 32, seed=4),
        }

    config = {**HUNYUAN, "num_layers": 2, "text_embed_2_dim": 32, "image_embed_dim": 32}
    for name in ("num_single_layers", "pooled_projection_dim"):
        del config[name]
    return hunyuan_case(
        "HunyuanVideo 1.5",
        build=made("HunyuanVideo15Transformer3DModel", **config),
        arguments=arguments,
        streams=spread("transformer_blocks", 2, DUAL_BLOCK),
        kept=(
            *REFINER_KEPT,
            *(f"context_embedder_2.linear_{i}" for i in (1, 2, 3)),
            *(f"image_embedder.linear_{i}" for i in (1, 2)),
            *(f"time_embed.timestep_embedder.linear_{i}" for i in (1, 2)),
            "proj_out",
        ),
        modulation=dual_modulation(2, 0),
        attentions=attentions("transformer_blocks", name="attn"),
        touch_text=touch_argument(
            "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"
        ),
    )


def motif():
    """One block of each kind: dual-stream, encoder, decoder; with cross-attention and an image."""
    cross = {
        **attention_of("cross_attn", VIDEO, "to_q"),
        **attention_of("cross_attn", TEXT, "to_k", "to_v"),
        **attention_of("cross_attn", VIDEO, "to_out.0"),
    }
    config = {
        **HUNYUAN,
        "num_decoder_layers": 1,
        "image_embed_dim": 32,
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    }
    for name in ("num_refiner_layers", "pooled_projection_dim"):
        del config[name]
    return hunyuan_case(
        "Motif-Video",
        build=made("MotifVideoTransformer3DModel", **config),
        arguments=lambda batch: {
            **call(batch),
            "encoder_attention_mask": text_mask(batch, 7),
            "image_embeds": noise(batch, 2, 32, seed=4),
        },
        streams={
            **spread("transformer_blocks", 1, {**DUAL_BLOCK, **cross}),
            **spread("single_transformer_blocks", 1, cross),
            **spread("single_transformer_blocks", 2, SINGLE_BLOCK),
        },
        kept=(
            *(f"context_embedder.linear_{i}" for i in (1, 2)),
            *(f"image_embedder.linear_{i}" for i in (1, 2)),
            *(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)),
            "proj_out",
        ),
        touch_text=touch_argument("encoder_hidden_states", "image_embeds"),
    )


CASES = (
    hunyuan_case("HunyuanVideo"),
    hunyuan_case("HunyuanVideo I2V", config={"image_condition_type": "token_replace"}),
    framepack(),
    hunyuan_15(),
    motif(),
)
