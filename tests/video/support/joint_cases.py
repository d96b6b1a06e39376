"""Tiny models whose text and video attend jointly: CogVideoX, ConsisID, Mochi, EasyAnimate."""

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn

from tests.video.support.family_checks import (
    CONTEXT,
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
    TEXT_TOKENS,
    attention_of,
    attentions,
    call,
    feed_forward,
    made,
    self_attention,
)


def frames_before_channels(batch, grid=GRID, seconds=1):
    given = call(batch, (seconds * grid[0], *grid[1:]))
    return {**given, "hidden_states": given["hidden_states"].transpose(1, 2).contiguous()}


def with_rope(arguments, head=32):
    """The rotary embedding that the pipeline would pass."""

    def rotated(batch):
        frames, rows, columns = GRID
        crops = ((0, 0), (rows, columns))
        rope = get_3d_rotary_pos_embed(head, crops, (rows, columns), frames)
        return {**arguments(batch), "image_rotary_emb": rope}

    return rotated


COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_height": 8,
    "sample_width": 4,
    "sample_frames": 9,
    "max_text_seq_length": TEXT_TOKENS,
}
COGVIDEOX_BLOCK = {**self_attention(JOINT), **feed_forward(JOINT)}
TIME_EMBEDDING = ("time_embedding.linear_1", "time_embedding.linear_2")


def cogvideox_case(name, model="CogVideoXTransformer3DModel", config=None, patch=(1, 2, 2), **more):
    settings = {
        "arguments": frames_before_channels,
        "kept": ("patch_embed.text_proj", *TIME_EMBEDDING, "proj_out"),
    }
    return Case(
        name=name,
        build=made(model, **COGVIDEOX, **(config or {})),
        streams=spread("transformer_blocks", 2, COGVIDEOX_BLOCK),
        modulation=(
            *(f"transformer_blocks.{i}.norm{n}.linear" for i in range(2) for n in (1, 2)),
            "norm_out.linear",
        ),
        attentions=attentions("transformer_blocks"),
        grid=GRID,
        touch_video=touch_latents(patch=patch, time=1),
        touch_text=touch_argument("encoder_hidden_states"),
        **{**settings, **more},
    )


def mochi_arguments(batch):
    """The second sample has two text tokens less."""
    valid = torch.ones(batch, TEXT_TOKENS)
    valid[1:, -2:] = 0
    return {**call(batch), "encoder_attention_mask": valid}


MOCHI_BLOCK = {
    **self_attention(VIDEO),
    **attention_of("attn1", TEXT, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    **feed_forward(VIDEO),
    **feed_forward(TEXT, "ff_context"),
}
MOCHI_LAST = {n: s for n, s in MOCHI_BLOCK.items() if not n.startswith(("ff_c", "attn1.to_add"))}


def mochi():
    """Its timestep embedding does not see the text, which would change every token."""
    model = made(
        "MochiTransformer3DModel",
        awake=("pos_frequencies",),
        num_attention_heads=2,
        attention_head_dim=48,
        num_layers=2,
        pooled_projection_dim=96,
        in_channels=4,
        text_embed_dim=32,
        time_embed_dim=32,
    )()
    nn.init.zeros_(model.time_embed.pooler.to_out.weight)
    return model


MOCHI = Case(
    name="mochi",
    build=mochi,
    one_by_one=True,
    later=1.5,  # its timestep is 0 for pure noise
    arguments=mochi_arguments,
    streams={
        **{f"transformer_blocks.0.{n}": s for n, s in MOCHI_BLOCK.items()},
        **{f"transformer_blocks.1.{n}": s for n, s in MOCHI_LAST.items()},
    },
    kept=(
        "time_embed.timestep_embedder.linear_1",
        "time_embed.timestep_embedder.linear_2",
        "time_embed.pooler.to_kv",
        "time_embed.pooler.to_q",
        "time_embed.pooler.to_out",
        "time_embed.caption_proj",
        "proj_out",
    ),
    modulation=(
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "transformer_blocks.1.norm1.linear",
        "transformer_blocks.1.norm1_context.linear_1",
        "norm_out.linear",
    ),
    attentions=attentions("transformer_blocks"),
    grid=GRID,
    touch_video=touch_latents(),
    touch_text=touch_argument("encoder_hidden_states"),
)

EASYANIMATE = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 2,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
}
EASYANIMATE_BLOCK = {
    **self_attention(VIDEO),
    **attention_of("attn1", TEXT, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    **feed_forward(TEXT, "txt_ff"),
    **feed_forward(VIDEO),
}
EASYANIMATE_SHARED_BLOCK = {
    **attention_of("attn1", JOINT, "to_q", "to_k", "to_v"),
    **attention_of("attn1", VIDEO, "to_out.0"),
    **feed_forward(CONTEXT),
}


def easyanimate_case(name, second, **config):
    """`second`: the layers of the second block."""
    return Case(
        name=name,
        build=made("EasyAnimateTransformer3DModel", **EASYANIMATE, **config),
        arguments=call,
        streams={
            **{f"transformer_blocks.0.{n}": s for n, s in EASYANIMATE_BLOCK.items()},
            **{f"transformer_blocks.1.{n}": s for n, s in second.items()},
        },
        kept=(*TIME_EMBEDDING, "text_proj", "proj_out"),
        modulation=(
            *(f"transformer_blocks.{i}.norm{n}.linear" for i in range(2) for n in (1, 2)),
            "norm_out.linear",
        ),
        attentions=attentions("transformer_blocks"),
        grid=GRID,
        touch_video=touch_latents(),
        touch_text=touch_argument("encoder_hidden_states"),
    )


CASES = (
    cogvideox_case("cogvideox"),
    cogvideox_case(
        "cogvideox 1.5",
        config={
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "ofs_embed_dim": 32,
        },
        patch=(2, 2, 2),
        arguments=with_rope(
            lambda batch: {
                **frames_before_channels(batch, seconds=2),
                "ofs": torch.full((batch,), 2.0),
            }
        ),
        kept=(
            "patch_embed.proj",
            "patch_embed.text_proj",
            *TIME_EMBEDDING,
            "ofs_embedding.linear_1",
            "ofs_embedding.linear_2",
            "proj_out",
        ),
    ),
    cogvideox_case("consisid", model="ConsisIDTransformer3DModel"),
    MOCHI,
    easyanimate_case("easyanimate", EASYANIMATE_BLOCK, mmdit_layers=2),
)
"""Cases that are supported in full."""

EASYANIMATE_SHARED = easyanimate_case(
    "easyanimate, shared block", EASYANIMATE_SHARED_BLOCK, mmdit_layers=1
)
"""A model whose second block has no layers of its own for text."""
