"""Tiny models of LTX and LTX-2."""

import torch

from tests.video.support.family_checks import CONTEXT, VIDEO, Case, spread, touch_argument
from tests.video.support.tiny_parts import (
    GRID,
    attention_of,
    attentions,
    cross_attention,
    feed_forward,
    made,
    noise,
    self_attention,
    text_mask,
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
    ltx_case("LTX"),
    ltx_with_conditions(),
    ltx2("LTX-2"),
    ltx2("LTX-2 with a reference", beside=2),
)
