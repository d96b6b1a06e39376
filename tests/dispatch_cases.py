"""Tiny models of Wan and its relatives, HunyuanVideo and its relatives, Motif, LTX and LTX-2."""

import math

import torch
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
from tiny_parts import (
    GRID,
    attention_of,
    attentions,
    call,
    cross_attention,
    feed_forward,
    made,
    noise,
    self_attention,
)

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}
WAN_BLOCK = {**self_attention(VIDEO), **cross_attention(), **feed_forward(VIDEO, "ffn")}
WAN_IMAGE_BLOCK = {**WAN_BLOCK, **attention_of("attn2", CONTEXT, "add_k_proj", "add_v_proj")}
WAN_KEPT = (
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "proj_out",
)
WAN_IMAGE_KEPT = (
    *WAN_KEPT,
    "condition_embedder.image_embedder.ff.net.0.proj",
    "condition_embedder.image_embedder.ff.net.2",
)


def touch_both(*touches):
    """Change the same token with several functions."""

    def touch(arguments, token):
        for one in touches:
            arguments = one(arguments, token)
        return arguments

    return touch


def wan_call(grid=GRID, channels=4, text=7, timestep=None, **shapes):
    """Arguments of a Wan call; `shapes`: more arguments, name -> shape of one sample."""

    def arguments(batch):
        given = call(batch, grid, text)
        frames, rows, columns = grid
        given["hidden_states"] = noise(batch, channels, frames, 2 * rows, 2 * columns)
        if timestep is not None:
            given["timestep"] = timestep.expand(batch, -1).contiguous()
        return {**given, **{name: noise(batch, *shape, seed=3) for name, shape in shapes.items()}}

    return arguments


def wan_case(name, model="WanTransformer3DModel", grid=GRID, config=None, **options):
    """A case of Wan; `options` replace its fields."""
    settings = {**WAN, **(config or {})}
    fields = {
        "build": made(model, **{k: v for k, v in settings.items() if v is not None}),
        "arguments": wan_call(grid),
        "streams": spread("blocks", 2, WAN_BLOCK),
        "kept": WAN_KEPT,
        "modulation": ("condition_embedder.time_proj",),
        "attentions": attentions("blocks"),
        "touch_video": touch_latents(),
        "touch_text": touch_argument("encoder_hidden_states"),
    }
    return Case(name=name, grid=grid, **{**fields, **options})


def image_to_video(name, model="WanTransformer3DModel"):
    """Wan 2.1's way: the image in more channels and as more context before 512 text tokens."""
    return wan_case(
        name,
        model,
        config={"in_channels": 12, "image_dim": 32, "added_kv_proj_dim": 64},
        arguments=wan_call(channels=12, text=512, encoder_hidden_states_image=(5, 32)),
        streams=spread("blocks", 2, WAN_IMAGE_BLOCK),
        kept=WAN_IMAGE_KEPT,
        last="blocks.1.ffn.net.2",
    )


def vace():
    return wan_case(
        "WanVACE",
        "WanVACETransformer3DModel",
        config={"vace_layers": [0, 1], "vace_in_channels": 8},
        arguments=wan_call(control_hidden_states=(8, GRID[0], 2 * GRID[1], 2 * GRID[2])),
        streams={
            **spread("blocks", 2, WAN_BLOCK),
            "vace_blocks.0.proj_in": VIDEO,
            **spread("vace_blocks", 2, {**WAN_BLOCK, "proj_out": VIDEO}),
        },
        attentions=attentions("vace_blocks") + attentions("blocks"),
        touch_video=touch_both(touch_latents(), touch_latents("control_hidden_states")),
        last="blocks.1.ffn.net.2",
    )


def animate():
    frames = GRID[0] - 1
    return wan_case(
        "WanAnimate",
        "WanAnimateTransformer3DModel",
        config={
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 32,
            "added_kv_proj_dim": 64,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        arguments=wan_call(
            channels=12,
            text=512,
            encoder_hidden_states_image=(5, 32),
            pose_hidden_states=(4, frames, 2 * GRID[1], 2 * GRID[2]),
            face_pixel_values=(3, 4 * frames, 16, 16),
        ),
        streams={
            **spread("blocks", 2, WAN_IMAGE_BLOCK),
            "face_adapter.0.to_q": VIDEO,
            "face_adapter.0.to_k": CONTEXT,
            "face_adapter.0.to_v": CONTEXT,
            "face_adapter.0.to_out": VIDEO,
        },
        kept=(*WAN_IMAGE_KEPT, "face_encoder.out_proj"),
        last="blocks.1.ffn.net.2",
    )


def skyreels(name, **config):
    return wan_case(name, "SkyReelsV2Transformer3DModel", config=config)


def anyflow():
    def arguments(batch):
        given = wan_call()(batch)
        given["hidden_states"] = given["hidden_states"].transpose(1, 2).contiguous()
        given["timestep"] = torch.full((batch, GRID[0]), 500.0)
        given["r_timestep"] = torch.full((batch, GRID[0]), 400.0)
        return given

    return wan_case(
        "AnyFlow",
        "AnyFlowTransformer3DModel",
        arguments=arguments,
        kept=(
            *WAN_KEPT,
            "condition_embedder.delta_embedder.linear_1",
            "condition_embedder.delta_embedder.linear_2",
        ),
        touch_video=touch_latents(time=1),
    )


def helios(name, **config):
    """History of 2 frames as they are, 3 at half and 5 at a quarter of the resolution."""

    def arguments(batch):
        given = wan_call()(batch)
        frames, rows, columns = GRID
        size = 2 * rows, 2 * columns
        for part, count, first in (("short", 2, 8), ("mid", 3, 5), ("long", 5, 0)):
            given[f"latents_history_{part}"] = noise(batch, 4, count, *size, seed=4 + count)
            indices = torch.arange(first, first + count).expand(batch, -1)
            given[f"indices_latents_history_{part}"] = indices
        given["indices_hidden_states"] = torch.arange(10, 10 + frames).expand(batch, -1)
        return given

    _, rows, columns = GRID
    mid = 2 * math.ceil(rows / 2) * math.ceil(columns / 2)
    long = 2 * math.ceil(rows / 4) * math.ceil(columns / 4)
    return wan_case(
        name,
        "HeliosTransformer3DModel",
        config={"rope_max_seq_len": None, "rope_dim": (12, 10, 10), **config},
        arguments=arguments,
        beside=2 * rows * columns + mid + long,
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


def text_mask(batch, tokens):
    """The last sample of several has three tokens less."""
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    if batch > 1:
        mask[-1, -3:] = 0
    return mask


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


LTX = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "cross_attention_dim": 64,
    "num_layers": 2,
    "caption_channels": 32,
}
LTX_BLOCK = {**self_attention(VIDEO), **cross_attention(), **feed_forward(VIDEO)}


def packed(latents):
    """[batch, channels, frames, rows, columns] -> [batch, tokens, channels], as pipelines do it."""
    from diffusers import LTXPipeline

    return LTXPipeline._pack_latents(latents)


def touch_packed(before=0):
    """Change one token of a packed input, by way of the latents it was packed from."""

    def touch(arguments, token):
        video = arguments["hidden_states"]
        frames, rows, columns = GRID
        changed = torch.zeros(1, video.shape[2], frames, rows, columns)
        changed[:, :, token[0], token[1], token[2]] = 1.0
        tokens = frames * rows * columns
        video = video.clone()
        video[:, before : before + tokens] += packed(changed)
        return {**arguments, "hidden_states": video}

    return touch


def ltx_call(batch, beside=0, channels=8):
    """`beside` more tokens stand after the video."""
    video = packed(noise(batch, channels, *GRID))
    frames, rows, columns = GRID
    return {
        "hidden_states": torch.cat([video, noise(batch, beside, channels, seed=5)], dim=1),
        "encoder_hidden_states": noise(batch, 7, 32, seed=2),
        "encoder_attention_mask": text_mask(batch, 7),
        "timestep": torch.full((batch, 1), 500.0),
        "num_frames": frames,
        "height": rows,
        "width": columns,
    }


def coordinates(grid, step=(8, 32, 32), first=(0, 0, 0)):
    """float32 [3, tokens], where the tokens of a grid begin, in pixels."""
    axes = [f + s * torch.arange(n) for n, s, f in zip(grid, step, first, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).float()


def ltx_case(name, arguments=ltx_call, **options):
    fields = {
        "build": made("LTXVideoTransformer3DModel", **LTX),
        "streams": spread("transformer_blocks", 2, LTX_BLOCK),
        "kept": (
            "proj_in",
            *(f"time_embed.emb.timestep_embedder.linear_{i}" for i in (1, 2)),
            *(f"caption_projection.linear_{i}" for i in (1, 2)),
            "proj_out",
        ),
        "modulation": ("time_embed.linear",),
        "attentions": attentions("transformer_blocks"),
        "touch_video": touch_packed(),
        "touch_text": touch_argument("encoder_hidden_states"),
    }
    return Case(name=name, arguments=arguments, grid=GRID, **{**fields, **options})


def ltx_with_conditions():
    """As LTXConditionPipeline calls it: tokens of a kept frame first, coordinates, no sizes."""

    def arguments(batch):
        given = ltx_call(batch)
        kept = coordinates((1, 4, 2), first=(16, 0, 0))
        given["hidden_states"] = torch.cat([noise(batch, 8, 8, seed=6), given["hidden_states"]], 1)
        given["video_coords"] = torch.cat([kept, coordinates(GRID)], 1).expand(batch, -1, -1)
        return {k: v for k, v in given.items() if k not in ("num_frames", "height", "width")}

    return ltx_case("LTX with kept frames", arguments, touch_video=touch_packed(8), beside=8)


LTX2 = {
    **LTX,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
}
LTX2_BLOCK = {
    **self_attention(VIDEO),
    **self_attention(CONTEXT, "audio_attn1"),
    **cross_attention(),
    **self_attention(CONTEXT, "audio_attn2"),
    **cross_attention("audio_to_video_attn"),
    **attention_of("video_to_audio_attn", CONTEXT, "to_q", "to_out.0"),
    **attention_of("video_to_audio_attn", VIDEO, "to_k", "to_v"),
    **feed_forward(VIDEO),
    **feed_forward(CONTEXT, "audio_ff"),
}
LTX2_EMBEDDERS = (
    "time_embed",
    "audio_time_embed",
    "av_cross_attn_video_scale_shift",
    "av_cross_attn_audio_scale_shift",
    "av_cross_attn_video_a2v_gate",
    "av_cross_attn_audio_v2a_gate",
)


def ltx2(name, beside=0):
    """`beside`: tokens of a reference at half the resolution after the video, with coordinates."""

    def arguments(batch):
        given = ltx_call(batch, beside)
        if beside:
            places = torch.cat([coordinates(GRID), coordinates((1, 2, 1), step=(8, 64, 64))], 1)
            given["video_coords"] = torch.stack([places, places + 8], -1).expand(batch, -1, -1, -1)
        return {
            **given,
            "audio_hidden_states": noise(batch, 5, 4, seed=3),
            "audio_encoder_hidden_states": noise(batch, 7, 32, seed=4),
            "audio_timestep": torch.full((batch,), 500.0),
            "audio_encoder_attention_mask": text_mask(batch, 7),
            "audio_num_frames": 5,
        }

    return ltx_case(
        name,
        arguments,
        build=made("LTX2VideoTransformer3DModel", **LTX2),
        streams=spread("transformer_blocks", 2, LTX2_BLOCK),
        kept=(
            *("proj_in", "audio_proj_in", "proj_out", "audio_proj_out"),
            *(
                f"{part}.emb.timestep_embedder.linear_{i}"
                for part in LTX2_EMBEDDERS
                for i in (1, 2)
            ),
            *(f"{p}caption_projection.linear_{i}" for p in ("", "audio_") for i in (1, 2)),
        ),
        modulation=tuple(f"{part}.linear" for part in LTX2_EMBEDDERS),
        touch_text=touch_argument("encoder_hidden_states", "audio_encoder_hidden_states"),
        beside=beside,
        last="transformer_blocks.1.ff.net.2",
    )


CASES = (
    wan_case("Wan"),
    image_to_video("Wan 2.1 I2V"),
    wan_case(
        "Wan 2.2 TI2V",
        arguments=wan_call(timestep=torch.arange(math.prod(GRID)) * 7.0),
    ),
    image_to_video("ChronoEdit", "ChronoEditTransformer3DModel"),
    vace(),
    animate(),
    skyreels("SkyReels-V2"),
    skyreels("SkyReels-V2, causal", num_frame_per_block=3),
    anyflow(),
    helios("Helios"),
    helios("Helios, louder history", is_amplify_history=True, guidance_cross_attn=False),
    hunyuan_case("HunyuanVideo"),
    hunyuan_case("HunyuanVideo I2V", config={"image_condition_type": "token_replace"}),
    framepack(),
    hunyuan_15(),
    motif(),
    ltx_case("LTX"),
    ltx_with_conditions(),
    ltx2("LTX-2"),
    ltx2("LTX-2 with a reference", beside=2),
)
