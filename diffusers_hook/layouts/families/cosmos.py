"""Cosmos 1, 2 and 2.5: video self-attention, cross-attention to text and images. Cosmos 3."""

from __future__ import annotations

from ..grids import no_grid, patched_grid
from ..layout import Blocks, Layout, Stream

__all__ = ["LAYOUTS"]

LAYOUTS = (
    Layout(
        name="cosmos",
        models=("CosmosTransformer3DModel",),
        kinds=(
            Blocks(
                path="transformer_blocks",
                streams=(
                    (r"attn1\.(to_[qkv]|to_out\.0)", Stream.VIDEO),
                    (r"attn2\.(to_q|q_img|to_out\.0)", Stream.VIDEO),
                    (r"attn2\.(to_[kv]|[kv]_img)", Stream.CONTEXT),
                    (r"ff\.net\.(0\.proj|2)", Stream.VIDEO),
                ),
                attention="attn1",
            ),
        ),
        grid=patched_grid(),
        modulation=(
            r"transformer_blocks\.\d+\.norm[123]\.linear_[12]",
            r"norm_out\.linear_[12]",
        ),
    ),
    Layout(
        name="cosmos3",
        models=("Cosmos3OmniTransformer",),
        kinds=(
            Blocks(
                path="layers",
                streams=(
                    (
                        r"self_attn\.(to_[qkv]|to_out|add_[qkv]_proj|to_add_out)",
                        Stream.CONTEXT,
                    ),
                    (r"(mlp|mlp_moe_gen)\.(gate|up|down)_proj", Stream.CONTEXT),
                ),
                attention=None,
            ),
        ),
        grid=no_grid,
        timestep="vision_timesteps",
        remark="text, video, sound and actions share one packed sequence",
    ),
)
