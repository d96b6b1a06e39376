"""CogVideoX and ConsisID: joint attention over text and video, text first."""

from __future__ import annotations

from ..grids import patched_grid
from ..layout import Blocks, Layout, Stream

__all__ = ["LAYOUTS"]

LAYOUTS = (
    Layout(
        name="cogvideox",
        models=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        kinds=(
            Blocks(
                path="transformer_blocks",
                streams=(
                    (r"attn1\.(to_[qkv]|to_qkv|to_out\.0)", Stream.JOINT),
                    (r"ff\.net\.(0\.proj|2)", Stream.JOINT),
                ),
                attention="attn1",
                text="first",
            ),
        ),
        grid=patched_grid(axes="btchw"),
        modulation=(r"transformer_blocks\.\d+\.norm[12]\.linear", r"norm_out\.linear"),
    ),
)
