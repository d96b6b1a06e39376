"""HunyuanVideo, 1.5 and Framepack: joint attention, text (and images' features) last.

Dual-stream blocks have linear layers of their own for the text, single-stream blocks one sequence.
"""

from __future__ import annotations

from ..grids import grid_with_history, patched_grid, with_padded_text
from ..layout import Blocks, Layout, Stream

__all__ = ["DUAL", "DUAL_MODULATION", "LAYOUTS", "SINGLE", "SINGLE_MODULATION"]

DUAL = (
    (r"attn\.(to_[qkv]|to_out\.0)", Stream.VIDEO),
    (r"attn\.(add_[qkv]_proj|to_add_out)", Stream.TEXT),
    (r"ff\.net\.(0\.proj|2)", Stream.VIDEO),
    (r"ff_context\.net\.(0\.proj|2)", Stream.TEXT),
)
"""Linear layers of a dual-stream block."""

SINGLE = (
    (r"attn\.to_[qkv]", Stream.JOINT),
    (r"proj_(mlp|out)", Stream.JOINT),
)
"""Linear layers of a single-stream block."""

DUAL_MODULATION = (r"transformer_blocks\.\d+\.norm1(_context)?\.linear", r"norm_out\.linear")
SINGLE_MODULATION = (r"single_transformer_blocks\.\d+\.norm\.linear",)

_DUAL_BLOCKS = Blocks(path="transformer_blocks", streams=DUAL, attention="attn", text="last")
_SINGLE_BLOCKS = Blocks(
    path="single_transformer_blocks", streams=SINGLE, attention="attn", text="last"
)

LAYOUTS = (
    Layout(
        name="hunyuan_video",
        models=("HunyuanVideoTransformer3DModel",),
        kinds=(_DUAL_BLOCKS, _SINGLE_BLOCKS),
        grid=with_padded_text(patched_grid()),
        modulation=(*DUAL_MODULATION, *SINGLE_MODULATION),
    ),
    Layout(
        name="hunyuan_video_framepack",
        models=("HunyuanVideoFramepackTransformer3DModel",),
        kinds=(_DUAL_BLOCKS, _SINGLE_BLOCKS),
        grid=with_padded_text(
            grid_with_history(
                {
                    "latents_clean": ("indices_latents_clean", 1),
                    "latents_history_2x": ("indices_latents_history_2x", 2),
                    "latents_history_4x": ("indices_latents_history_4x", 4),
                }
            ),
            images="image_embeds",
        ),
        modulation=(*DUAL_MODULATION, *SINGLE_MODULATION),
    ),
    Layout(
        name="hunyuan_video_15",
        models=("HunyuanVideo15Transformer3DModel",),
        kinds=(_DUAL_BLOCKS,),
        grid=with_padded_text(
            patched_grid(),
            masks=("encoder_attention_mask", "encoder_attention_mask_2"),
            images="image_embeds",
            zeros_are_none=True,
        ),
        modulation=DUAL_MODULATION,
    ),
)
