"""Tiny models of CogVideoX, Mochi, Latte, Allegro, EasyAnimate, Cosmos and Kandinsky."""

import torch
from diffusers.models.embeddings import (
    get_3d_rotary_pos_embed,
    get_3d_rotary_pos_embed_allegro,
)
from family_checks import (
    CONTEXT,
    JOINT,
    TEXT,
    VIDEO,
    Case,
    spread,
    touch_argument,
    touch_latents,
)
from torch import nn

GRID = (3, 4, 2)
TEXT_TOKENS = 7


def made(name, awake=(), **config):
    """Builds diffusers' class of that name, with the same weights every time.

    `awake`: endings of parameters' names that are zero at first, which would hide the rest.
    """

    def build():
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, name)(**config).eval()
        for path, parameter in model.named_parameters():
            if path.endswith(tuple(awake)):
                nn.init.normal_(parameter, std=0.2)
        return model

    return build


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention_of(name, stream, *linears):
    return {f"{name}.{linear}": stream for linear in linears}


def self_attention(stream, name="attn1"):
    return attention_of(name, stream, "to_q", "to_k", "to_v", "to_out.0")


def cross_attention(name="attn2"):
    return {
        **attention_of(name, VIDEO, "to_q"),
        **attention_of(name, CONTEXT, "to_k", "to_v"),
        **attention_of(name, VIDEO, "to_out.0"),
    }


def feed_forward(stream, name="ff"):
    return {f"{name}.net.0.proj": stream, f"{name}.net.2": stream}


def attentions(*paths, count=2, name="attn1"):
    return tuple(f"{path}.{i}.{name}" for i in range(count) for path in paths)


def call(batch, grid=GRID, text=TEXT_TOKENS, width=32):
    """Arguments that most families have in common: patches of 1 x 2 x 2 pixels."""
    frames, rows, columns = grid
    return {
        "hidden_states": noise(batch, 4, frames, 2 * rows, 2 * columns),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, text, width, seed=2),
    }


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


FACE_LAYERS = (
    *(f"perceiver_cross_attention.0.{n}" for n in ("to_q", "to_kv", "to_out")),
    *(f"local_facial_extractor.layers.{i}.0.{n}" for i in range(1) for n in ("to_q", "to_kv")),
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

PIXART_EMBEDDERS = (
    "adaln_single.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2",
    "caption_projection.linear_1",
    "caption_projection.linear_2",
    "proj_out",
)

LATTE = Case(
    name="latte",
    build=made(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        num_layers=2,
        cross_attention_dim=64,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=32,
        video_length=GRID[0],
    ),
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
    LATTE,
    ALLEGRO,
    easyanimate_case("easyanimate", EASYANIMATE_BLOCK, mmdit_layers=2),
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

EASYANIMATE_SHARED = easyanimate_case(
    "easyanimate, shared block", EASYANIMATE_SHARED_BLOCK, mmdit_layers=1
)
"""A model whose second block has no layers of its own for text."""
