"""Tiny models whose text is attended to apart: Latte, Allegro, Cosmos."""

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

from tests.video.support.family_checks import (
    CONTEXT,
    VIDEO,
    Case,
    spread,
    touch_argument,
    touch_latents,
)
from tests.video.support.tiny_parts import (
    GRID,
    attentions,
    call,
    cross_attention,
    feed_forward,
    made,
    noise,
    self_attention,
)

PIXART_EMBEDDERS = (
    "adaln_single.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2",
    "caption_projection.linear_1",
    "caption_projection.linear_2",
    "proj_out",
)

LATTE_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "num_layers": 2,
    "cross_attention_dim": 64,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 32,
    "video_length": GRID[0],
}
LATTE = Case(
    name="latte",
    build=made("LatteTransformer3DModel", **LATTE_CONFIG),
    arguments=call,
    streams={
        **spread(
            "transformer_blocks",
            2,
            {**self_attention(VIDEO), **cross_attention(), **feed_forward(VIDEO)},
        ),
        **spread(
            "temporal_transformer_blocks", 2, {**self_attention(VIDEO), **feed_forward(VIDEO)}
        ),
    },
    kept=PIXART_EMBEDDERS,
    modulation=("adaln_single.linear",),
    attentions=attentions("transformer_blocks", "temporal_transformer_blocks"),
    grid=GRID,
    touch_video=touch_latents(),
    touch_text=touch_argument("encoder_hidden_states"),
)


def allegro_arguments(batch):
    """With the rotary embedding and a mask, as from the pipeline; the last column is padding."""
    frames, rows, columns = GRID
    t, h, w, *grids = get_3d_rotary_pos_embed_allegro(
        embed_dim=48,
        crops_coords=((0, 0), (rows, columns)),
        grid_size=(rows, columns),
        temporal_size=frames,
    )
    places = torch.cartesian_prod(*(grid.long() for grid in grids)).T.unsqueeze(1)
    rope = (t, h, w), tuple(places.contiguous())
    mask = torch.ones(batch, frames, 2 * rows, 2 * columns)
    mask[:, :, :, -2:] = 0
    return {**call(batch), "attention_mask": mask, "image_rotary_emb": rope}


ALLEGRO = Case(
    name="allegro",
    build=made(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=48,
        num_layers=2,
        cross_attention_dim=96,
        sample_height=8,
        sample_width=4,
        sample_frames=3,
        caption_channels=32,
    ),
    arguments=allegro_arguments,
    streams=spread(
        "transformer_blocks",
        2,
        {**self_attention(VIDEO), **cross_attention(), **feed_forward(VIDEO)},
    ),
    kept=PIXART_EMBEDDERS,
    modulation=("adaln_single.linear",),
    attentions=attentions("transformer_blocks"),
    grid=GRID,
    touch_video=touch_latents(),
    touch_text=touch_argument("encoder_hidden_states"),
)

COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 32,
    "adaln_lora_dim": 32,
    "max_size": (4, 16, 16),
    "concat_padding_mask": False,
}
COSMOS_BLOCK = {**self_attention(VIDEO), **cross_attention(), **feed_forward(VIDEO)}
COSMOS_KEPT = (
    "patch_embed.proj",
    "time_embed.t_embedder.linear_1",
    "time_embed.t_embedder.linear_2",
    "proj_out",
)


def cosmos_case(name, block=COSMOS_BLOCK, config=None, **more):
    settings = {
        "arguments": call,
        "kept": COSMOS_KEPT,
        "touch_text": touch_argument("encoder_hidden_states"),
    }
    return Case(
        name=name,
        build=made("CosmosTransformer3DModel", **COSMOS, **(config or {})),
        streams=spread("transformer_blocks", 2, block),
        modulation=(
            *(
                f"transformer_blocks.{i}.norm{n}.linear_{j}"
                for i in range(2)
                for n in (1, 2, 3)
                for j in (1, 2)
            ),
            "norm_out.linear_1",
            "norm_out.linear_2",
        ),
        attentions=attentions("transformer_blocks"),
        grid=GRID,
        touch_video=touch_latents(),
        **{**settings, **more},
    )


def text_and_image(batch):
    given = call(batch)
    return {**given, "encoder_hidden_states": (given["encoder_hidden_states"], noise(batch, 5, 32))}


def touch_text_and_image(arguments):
    seen = arguments["encoder_hidden_states"]
    return {**arguments, "encoder_hidden_states": tuple(noise(*x.shape, seed=9) for x in seen)}


def noise_per_frame(batch):
    """Cosmos 2.5 gives every frame a noise level of its own."""
    return {**call(batch), "timestep": torch.full((batch, 1, GRID[0], 1, 1), 0.5)}


CASES = (
    LATTE,
    ALLEGRO,
    cosmos_case("cosmos"),
    cosmos_case(
        "cosmos 2.5",
        block={
            **COSMOS_BLOCK,
            "attn2.q_img": VIDEO,
            "attn2.k_img": CONTEXT,
            "attn2.v_img": CONTEXT,
        },
        config={
            "img_context_dim_in": 32,
            "img_context_dim_out": 64,
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 32,
            "encoder_hidden_states_channels": 32,
        },
        arguments=lambda batch: {
            **text_and_image(batch),
            **{"timestep": noise_per_frame(batch)["timestep"]},
        },
        kept=(*COSMOS_KEPT, "crossattn_proj.0", "img_context_proj.0"),
        touch_text=touch_text_and_image,
        last="transformer_blocks.1.ff.net.2",
    ),
)
"""Cases that are supported in full."""
