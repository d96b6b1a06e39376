"""Tiny models of Wan and what grew out of it: VACE, Animate, SkyReels-V2, AnyFlow, Helios."""

import math

import torch

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
)
