"""Tiny models whose salient tokens cannot be found.

Linear, packed, sparse and cached attention, and classes whose layout is not known.
"""

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from tests.video.support.family_checks import CONTEXT, VIDEO, Case, spread
from tests.video.support.tiny_parts import (
    GRID,
    TEXT_TOKENS,
    attention_of,
    call,
    cross_attention,
    feed_forward,
    made,
    noise,
    self_attention,
)
from tests.video.support.wan_cases import WAN, WAN_BLOCK, WAN_KEPT

UNSCORED = {"attentions": (), "grid": GRID, "touch_video": None}
TIMESTEP_EMBEDDER = (
    "time_embed.emb.timestep_embedder.linear_1",
    "time_embed.emb.timestep_embedder.linear_2",
)
CAPTION = ("caption_projection.linear_1", "caption_projection.linear_2")

SANA_VIDEO = Case(
    name="sana video",
    build=made(
        "SanaVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=32,
        mlp_ratio=2.0,
    ),
    arguments=call,
    streams=spread("transformer_blocks", 2, {**self_attention(VIDEO), **cross_attention()}),
    kept=(*TIMESTEP_EMBEDDER, *CAPTION, "proj_out"),
    modulation=("time_embed.linear",),
    **UNSCORED,
)


def sana_wm_arguments(batch):
    frames, rows, columns = GRID
    return {
        "hidden_states": noise(batch, 4, *GRID),
        "timestep": torch.full((batch, 1, frames), 500.0),
        "encoder_hidden_states": noise(batch, 1, TEXT_TOKENS, 32, seed=2),
        "mask": torch.ones(batch, TEXT_TOKENS),
        "chunk_plucker": noise(batch, 6, frames, rows, columns, seed=3),
    }


SANA_WM_BLOCK = {
    **attention_of("attn", VIDEO, "qkv", "proj", "output_gate"),
    **attention_of("attn", VIDEO, "q_proj_cam", "k_proj_cam", "v_proj_cam", "out_proj_cam"),
    **attention_of("cross_attn", VIDEO, "q_linear", "proj"),
    "cross_attn.kv_linear": CONTEXT,
    "plucker_proj": VIDEO,
}
SANA_WM = Case(
    name="sana wm",
    build=made(
        "SanaWMTransformer3DModel",
        awake=("final_layer.linear.weight", "plucker_embedder.proj.weight"),
        in_channels=4,
        num_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        linear_head_dim=32,
        softmax_every_n=2,
        caption_channels=32,
        chunk_plucker_channels=6,
        mlp_ratio=2.0,
    ),
    arguments=sana_wm_arguments,
    streams=spread("blocks", 2, SANA_WM_BLOCK),
    kept=(
        "t_embedder.linear_1",
        "t_embedder.linear_2",
        "y_embedder.y_proj.fc1",
        "y_embedder.y_proj.fc2",
        *(f"blocks.{i}.attn.{name}_proj" for i in range(2) for name in ("beta", "gate")),
        "final_layer.linear",
    ),
    modulation=("t_block.1",),
    **UNSCORED,
)


def refiner_arguments(batch):
    """24 tokens and their rotary embedding, as the pipeline's `build_rotary_emb...` shapes it."""
    angle = noise(batch, 24, 64, seed=3)
    return {
        "hidden_states": noise(batch, 24, 8),
        "encoder_hidden_states": noise(batch, TEXT_TOKENS, 32, seed=2),
        "timestep": torch.full((batch, 24), 500.0),
        "video_rotary_emb": (angle.cos(), angle.sin()),
    }


REFINER_BLOCK = {
    name: CONTEXT
    for attention in (
        "attn1",
        "audio_attn1",
        "attn2",
        "audio_attn2",
        "audio_to_video_attn",
        "video_to_audio_attn",
    )
    for name in self_attention(CONTEXT, attention)
} | {**feed_forward(CONTEXT), **feed_forward(CONTEXT, "audio_ff")}
REFINER_MODULATIONS = (
    "time_embed",
    "audio_time_embed",
    "av_cross_attn_video_scale_shift",
    "av_cross_attn_audio_scale_shift",
    "av_cross_attn_video_a2v_gate",
    "av_cross_attn_audio_v2a_gate",
)
SANA_WM_REFINER = Case(
    name="sana wm refiner",
    build=made(
        "SanaWMLTX2RefinerTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ),
    arguments=refiner_arguments,
    streams=spread("transformer_blocks", 2, REFINER_BLOCK),
    kept=(
        "proj_in",
        "audio_proj_in",
        *CAPTION,
        *(f"audio_{name}" for name in CAPTION),
        *(
            f"{name}.emb.timestep_embedder.linear_{i}"
            for name in REFINER_MODULATIONS
            for i in (1, 2)
        ),
        "proj_out",
        "audio_proj_out",
    ),
    modulation=tuple(f"{name}.linear" for name in REFINER_MODULATIONS),
    **UNSCORED,
)


def minimax_arguments(batch):
    """Seven text rows, 24 video rows, five audio rows, in this order."""
    text, video, audio = torch.arange(36).split([7, 24, 5])
    tags = torch.tensor([1] * 7 + [0] * 24 + [2] * 5)
    return {
        "hidden_states": noise(batch, 24, 16),
        "audio_hidden_states": noise(batch, 5, 8, seed=2),
        "encoder_hidden_states": noise(batch, 7, 32, seed=3),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros(36, dtype=torch.long),
        "token_tags": tags,
        "position_ids": noise(36, 3, seed=4),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


MINIMAX_BLOCK = {**self_attention(CONTEXT, "attn"), **feed_forward(CONTEXT)}
MINIMAX_H3 = Case(
    name="minimax h3",
    build=made(
        "MiniMaxH3Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=32,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=64,
        in_channels=4,
        audio_in_channels=8,
        text_dim=32,
        freq_dim=32,
        time_embed_hidden_dim=32,
        time_embed_dim=32,
        rope_freq_dim=4,
    ),
    arguments=minimax_arguments,
    streams={
        **spread("transformer_blocks", 2, MINIMAX_BLOCK),
        **spread("token_refiner.refiner_blocks", 1, MINIMAX_BLOCK),
    },
    kept=(
        "proj_in",
        "audio_proj_in",
        "context_embedder",
        "time_embedder.linear_1",
        "time_embedder.linear_2",
        "proj_out",
        "audio_proj_out",
    ),
    modulation=(
        "transformer_blocks.0.adaln_proj.linear",
        "transformer_blocks.1.adaln_proj.linear",
        "norm_out.linear",
    ),
    **UNSCORED,
)


def cosmos3_arguments(batch):
    """Seven text tokens, then one video of 3 x 4 x 2 tokens; the model knows no batches."""
    frames, rows, columns = GRID
    tokens = frames * rows * columns
    places = torch.arange(7, 7 + tokens)
    return {
        "input_ids": torch.arange(7),
        "text_indexes": torch.arange(7),
        "position_ids": torch.arange(7 + tokens).expand(3, -1),
        "und_len": 7,
        "sequence_length": 7 + tokens,
        "vision_tokens": [noise(1, 4, frames, 2 * rows, 2 * columns)],
        "vision_token_shapes": [GRID],
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places,
        "vision_timesteps": torch.full((tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
    }


COSMOS3_BLOCK = {
    **attention_of("self_attn", CONTEXT, "to_q", "to_k", "to_v", "to_out"),
    **attention_of("self_attn", CONTEXT, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    **attention_of("mlp", CONTEXT, "gate_proj", "up_proj", "down_proj"),
    **attention_of("mlp_moe_gen", CONTEXT, "gate_proj", "up_proj", "down_proj"),
}
COSMOS3 = Case(
    name="cosmos 3",
    build=made(
        "Cosmos3OmniTransformer",
        head_dim=32,
        hidden_size=64,
        intermediate_size=128,
        latent_channel=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        patch_latent_dim=16,
        vocab_size=32,
        rope_axes_dim=(6, 5, 5),
    ),
    arguments=cosmos3_arguments,
    streams=spread("layers", 2, COSMOS3_BLOCK),
    kept=("lm_head", "proj_in", "proj_out", "time_embedder.linear_1", "time_embedder.linear_2"),
    output=lambda answer: answer[0][0],
    timestep="vision_timesteps",
    **UNSCORED,
)

KANDINSKY6_SR = Case(
    name="kandinsky 6 sr",
    build=made(
        "Kandinsky6SRTransformer3DModel",
        in_visual_dim=4,
        out_visual_dim=8,
        time_dim=32,
        model_dim=64,
        ff_dim=128,
        num_visual_blocks=2,
        axes_dims=(8, 12, 12),
    ),
    arguments=lambda batch: {
        "hidden_states": noise(batch, 1, 8, 8, 9),
        "timestep": torch.full((batch,), 500.0),
    },
    streams=spread(
        "visual_transformer_blocks",
        2,
        {
            **attention_of("self_attention", CONTEXT, "to_query", "to_key", "to_value"),
            "self_attention.out_layer": CONTEXT,
            **feed_forward(CONTEXT, "feed_forward"),
        },
    ),
    kept=(
        "time_embeddings.timestep_embedder.linear_1",
        "time_embeddings.timestep_embedder.linear_2",
        "visual_embeddings.in_layer",
        "out_layer.out_layer",
    ),
    modulation=(
        "visual_transformer_blocks.0.visual_modulation.out_layer",
        "visual_transformer_blocks.1.visual_modulation.out_layer",
        "out_layer.modulation.out_layer",
    ),
    **UNSCORED,
)


def anyflow_far_arguments(batch):
    """Three chunks of one frame; the first stands for more pixels per token."""
    frames, rows, columns = GRID
    return {
        **call(batch),
        "hidden_states": noise(batch, frames, 4, 2 * rows, 2 * columns),
        "timestep": torch.full((batch, frames), 500.0),
        "r_timestep": torch.full((batch, frames), 400.0),
        "chunk_partition": [1] * frames,
    }


ANYFLOW_FAR = Case(
    name="anyflow far",
    build=made("AnyFlowFARTransformer3DModel", **WAN, full_chunk_limit=2),
    arguments=anyflow_far_arguments,
    streams=spread("blocks", 2, dict.fromkeys(WAN_BLOCK, CONTEXT)),
    kept=(*WAN_KEPT, *(f"condition_embedder.delta_embedder.linear_{i}" for i in (1, 2))),
    modulation=("condition_embedder.time_proj",),
    **UNSCORED,
)


def wan_animate_2_arguments(batch):
    """The pass over the reference, which fills the cache; the other needs a compiled mask."""
    frames, rows, columns = GRID
    video = noise(batch, 4, frames, 2 * rows, 2 * columns)
    return {
        "hidden_states": list(video),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": list(noise(batch, TEXT_TOKENS, 32, seed=2)),
        "encoder_hidden_states_image": noise(batch, 5, 1280, seed=3),
        "condition_latents": list(noise(*video.shape, seed=4)),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": frames * rows * columns,
        "offset_grid_sizes": torch.tensor([GRID] * batch),
    }


WAN_ANIMATE_2_BLOCK = {
    **self_attention(CONTEXT, "self_attn"),
    **self_attention(CONTEXT, "cross_attn"),
    **attention_of("cross_attn", CONTEXT, "add_k_proj", "add_v_proj"),
    **attention_of("ffn", CONTEXT, "0", "2"),
}
WAN_ANIMATE_2 = Case(
    name="wan animate 2",
    build=made(
        "WanAnimate2Transformer3DModel",
        in_dim=8,
        dim=64,
        ffn_dim=128,
        freq_dim=32,
        text_dim=32,
        text_len=TEXT_TOKENS,
        out_dim=4,
        num_heads=2,
        num_layers=2,
    ),
    arguments=wan_animate_2_arguments,
    streams=spread("blocks", 2, WAN_ANIMATE_2_BLOCK),
    kept=(
        *(f"{name}_embedding.{i}" for name in ("text", "time") for i in (0, 2)),
        *(f"img_emb.proj.{i}" for i in (1, 3)),
        "head.head",
    ),
    modulation=("time_projection.1",),
    output=lambda answer: torch.stack(answer[0]),
    **UNSCORED,
)


def patches_of_pictures(batch):
    """A picture to be made and one to be edited, 4 x 2 patches each."""
    pictures = [(1, 4, 2), (1, 4, 2)]
    return {
        "hidden_states": noise(batch, 16, 4, 1, 2, 2),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, TEXT_TOKENS, 32, seed=2),
        "shape_list": [pictures] * batch,
    }


JOYIMAGE_BLOCK = {
    **attention_of("attn", CONTEXT, "img_attn_qkv", "img_attn_proj"),
    **attention_of("attn", CONTEXT, "txt_attn_qkv", "txt_attn_proj"),
    **feed_forward(CONTEXT, "img_mlp"),
    **feed_forward(CONTEXT, "txt_mlp"),
}


def joyimage(name, model, arguments):
    """Models for pictures that are video transformers by name only; they have no layout."""
    return Case(
        name=name,
        build=made(
            model,
            in_channels=4,
            hidden_size=64,
            num_attention_heads=2,
            text_dim=32,
            num_layers=2,
            rope_dim_list=[8, 12, 12],
        ),
        arguments=arguments,
        streams=spread("double_blocks", 2, JOYIMAGE_BLOCK),
        kept=(
            *(f"condition_embedder.time_embedder.linear_{i}" for i in (1, 2)),
            *(f"condition_embedder.text_embedder.linear_{i}" for i in (1, 2)),
            "condition_embedder.time_proj",
            "proj_out",
        ),
        **UNSCORED,
    )


JOYIMAGE_EDIT = joyimage("joyimage edit", "JoyImageEditTransformer3DModel", call)
JOYIMAGE_EDIT_PLUS = joyimage(
    "joyimage edit plus", "JoyImageEditPlusTransformer3DModel", patches_of_pictures
)

CASES = (
    SANA_VIDEO,
    SANA_WM,
    SANA_WM_REFINER,
    MINIMAX_H3,
    COSMOS3,
    KANDINSKY6_SR,
    ANYFLOW_FAR,
    WAN_ANIMATE_2,
    JOYIMAGE_EDIT,
    JOYIMAGE_EDIT_PLUS,
)
"""Cases that are quantized without salient tokens and groups."""
