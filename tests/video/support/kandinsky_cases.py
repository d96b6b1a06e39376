"""Tiny models of Kandinsky 5 and 6."""

import torch

from tests.video.support.family_checks import CONTEXT, VIDEO, Case, spread, touch_argument
from tests.video.support.tiny_parts import GRID, TEXT_TOKENS, attention_of, made, noise


def projections(name, query, context=None):
    """Linear layers of an attention: whose tokens ask, and whose are asked."""
    context = context or query
    return {
        **attention_of(name, query, "to_query"),
        **attention_of(name, context, "to_key", "to_value"),
        **attention_of(name, query, "out_layer"),
    }


def touch_place(arguments, token):
    """Change the pixels of one token of a video [batch, frames, rows, columns, channels]."""
    t, h, w = token
    video = arguments["hidden_states"].clone()
    place = video[:, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
    place.copy_(noise(*place.shape, seed=9))
    return {**arguments, "hidden_states": video}


def call5(batch, grid=GRID):
    frames, rows, columns = grid
    return {
        "hidden_states": noise(batch, frames, 2 * rows, 2 * columns, 4),
        "encoder_hidden_states": noise(batch, TEXT_TOKENS, 32, seed=2),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": noise(batch, 32, seed=3),
        "visual_rope_pos": tuple(map(torch.arange, grid)),
        "text_rope_pos": torch.arange(TEXT_TOKENS),
    }


def call6(batch):
    """Five audio tokens, so that their number is not that of video or text tokens."""
    given = call5(batch)
    del given["visual_rope_pos"], given["text_rope_pos"]
    return {**given, "audio_hidden_states": noise(batch, 5, 8, seed=4)}


SIZES = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 32,
    "in_text_dim2": 32,
    "time_dim": 32,
    "model_dim": 64,
    "ff_dim": 128,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (8, 12, 12),
}
TEXT_BLOCK5 = {
    **projections("self_attention", CONTEXT),
    "feed_forward.in_layer": CONTEXT,
    "feed_forward.out_layer": CONTEXT,
}
VISUAL_BLOCK5 = {
    **projections("self_attention", VIDEO),
    **projections("cross_attention", VIDEO, CONTEXT),
    "feed_forward.in_layer": VIDEO,
    "feed_forward.out_layer": VIDEO,
}

KANDINSKY5 = Case(
    name="kandinsky 5",
    build=made("Kandinsky5Transformer3DModel", awake=("modulation.out_layer.weight",), **SIZES),
    arguments=call5,
    streams={
        **spread("text_transformer_blocks", 1, TEXT_BLOCK5),
        **spread("visual_transformer_blocks", 2, VISUAL_BLOCK5),
    },
    kept=(
        "time_embeddings.in_layer",
        "time_embeddings.out_layer",
        "text_embeddings.in_layer",
        "pooled_text_embeddings.in_layer",
        "visual_embeddings.in_layer",
        "out_layer.out_layer",
    ),
    modulation=(
        "text_transformer_blocks.0.text_modulation.out_layer",
        "visual_transformer_blocks.0.visual_modulation.out_layer",
        "visual_transformer_blocks.1.visual_modulation.out_layer",
        "out_layer.modulation.out_layer",
    ),
    attentions=tuple(f"visual_transformer_blocks.{i}.self_attention" for i in range(2)),
    grid=GRID,
    touch_video=touch_place,
    touch_text=touch_argument("encoder_hidden_states"),
    output=lambda answer: answer,
)

TEXT_BLOCK6 = {
    **projections("attn", CONTEXT),
    "feed_forward.net.0.proj": CONTEXT,
    "feed_forward.net.2": CONTEXT,
}
VISUAL_BLOCK6 = {
    **projections("video_dec_block.self_attention", VIDEO),
    **projections("video_dec_block.cross_attention", VIDEO, CONTEXT),
    "video_dec_block.feed_forward.net.0.proj": VIDEO,
    "video_dec_block.feed_forward.net.2": VIDEO,
    **projections("audio_dec_block.self_attention", CONTEXT),
    **projections("audio_dec_block.cross_attention", CONTEXT),
    "audio_dec_block.feed_forward.net.0.proj": CONTEXT,
    "audio_dec_block.feed_forward.net.2": CONTEXT,
    **projections("av_cross_attention", CONTEXT, VIDEO),
    **projections("va_cross_attention", VIDEO, CONTEXT),
}

KANDINSKY6 = Case(
    name="kandinsky 6",
    build=made(
        "Kandinsky6Transformer3DModel",
        **SIZES,
        visual_cond=False,
        in_audio_dim=8,
        out_audio_dim=8,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
    ),
    arguments=call6,
    streams={
        **spread("video_text_transformer_blocks", 1, TEXT_BLOCK6),
        **spread("audio_text_transformer_blocks", 1, TEXT_BLOCK6),
        **spread("visual_transformer_blocks", 2, VISUAL_BLOCK6),
    },
    kept=(
        *(
            f"{m}_time_embeddings.timestep_embedder.linear_{i}"
            for m in ("video", "audio")
            for i in (1, 2)
        ),
        *(f"{m}{p}_text_embeddings.in_layer" for m in ("video", "audio") for p in ("", "_pooled")),
        "visual_embeddings.in_layer",
        "audio_embeddings.in_layer",
        "out_layer.out_layer",
        "audio_out_layer.out_layer",
    ),
    modulation=(
        *(f"{m}_text_transformer_blocks.0.text_modulation.out_layer" for m in ("video", "audio")),
        *(
            f"visual_transformer_blocks.{i}.{name}.out_layer"
            for i in range(2)
            for name in (
                "video_dec_block.visual_modulation",
                "audio_dec_block.visual_modulation",
                "va_modulation",
                "av_modulation",
            )
        ),
        "out_layer.modulation.out_layer",
        "audio_out_layer.modulation.out_layer",
    ),
    attentions=tuple(
        f"visual_transformer_blocks.{i}.video_dec_block.self_attention" for i in range(2)
    ),
    grid=GRID,
    touch_video=touch_place,
    touch_text=touch_argument("encoder_hidden_states"),
    last="visual_transformer_blocks.1.video_dec_block.feed_forward.net.2",
)

CASES = (KANDINSKY5, KANDINSKY6)
"""Cases that are supported in full."""
