"""Latte: blocks over the places of one frame and blocks over the frames of one place, in turn."""

from __future__ import annotations

from ..grids import patched_grid
from ..layout import Blocks, Layout, Stream

__all__ = ["LAYOUTS"]

LAYOUTS = (
    Layout(
        name="latte",
        models=("LatteTransformer3DModel",),
        kinds=(
            Blocks(
                path="transformer_blocks",
                streams=(
                    (r"attn1\.(to_[qkv]|to_out\.0)", Stream.VIDEO),
                    (r"attn2\.(to_q|to_out\.0)", Stream.VIDEO),
                    (r"attn2\.to_[kv]", Stream.CONTEXT),
                    (r"ff\.net\.(0\.proj|2)", Stream.VIDEO),
                ),
                attention="attn1",
                attends="frame",
            ),
            Blocks(
                path="temporal_transformer_blocks",
                streams=(
                    (r"attn1\.(to_[qkv]|to_out\.0)", Stream.VIDEO),
                    (r"ff\.net\.(0\.proj|2)", Stream.VIDEO),
                ),
                attention="attn1",
                attends="time",
            ),
        ),
        grid=patched_grid(),
        modulation=(r"adaln_single\.linear",),
    ),
)
