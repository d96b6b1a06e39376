"""SANA-Video and SANA-WM: linear self-attention, which has no attention map to score tokens by."""

from __future__ import annotations

from ..grids import no_grid, patched_grid
from ..layout import Blocks, Layout, Stream

__all__ = ["LAYOUTS"]

_LINEAR = "its self-attention is linear: there is no softmax whose attention a token receives"

LAYOUTS = (
    Layout(
        name="sana_video",
        models=("SanaVideoTransformer3DModel",),
        kinds=(
            Blocks(
                path="transformer_blocks",
                streams=(
                    (r"attn1\.(to_[qkv]|to_out\.0)", Stream.VIDEO),
                    (r"attn2\.(to_q|to_out\.0)", Stream.VIDEO),
                    (r"attn2\.to_[kv]", Stream.CONTEXT),
                ),
                attention=None,
            ),
        ),
        grid=patched_grid(),
        modulation=(r"time_embed\.linear",),
        remark=_LINEAR,
    ),
    Layout(
        name="sana_wm",
        models=("SanaWMTransformer3DModel",),
        kinds=(
            Blocks(
                path="blocks",
                streams=(
                    (r"attn\.(qkv|proj|output_gate|[qkv]_proj_cam|out_proj_cam)", Stream.VIDEO),
                    (r"cross_attn\.(q_linear|proj)", Stream.VIDEO),
                    (r"cross_attn\.kv_linear", Stream.CONTEXT),
                    (r"plucker_proj|mlp\.fc[12]", Stream.VIDEO),
                ),
                attention=None,
            ),
        ),
        grid=patched_grid(),
        modulation=(r"t_block\.1",),
        remark=_LINEAR,
    ),
    Layout(
        name="sana_wm_refiner",
        models=("SanaWMLTX2RefinerTransformer3DModel",),
        kinds=(
            Blocks(
                path="transformer_blocks",
                streams=(
                    (r"(audio_)?attn[12]\.(to_[qkv]|to_out\.0)", Stream.CONTEXT),
                    (r"(audio_to_video|video_to_audio)_attn\.(to_[qkv]|to_out\.0)", Stream.CONTEXT),
                    (r"(audio_)?ff\.net\.(0\.proj|2)", Stream.CONTEXT),
                ),
                attention=None,
            ),
        ),
        grid=no_grid,
        modulation=(
            r"(audio_)?(time_embed|prompt_adaln)\.linear",
            r"av_cross_attn_\w+\.linear",
        ),
        remark="it refines a window of frames after the other, with keys kept from earlier ones",
    ),
)
