"""Mochi: joint attention of a video and a text stream, text last.

Its attention runs once per sample, over the video and that sample's valid text tokens. Its timestep
is 0 for pure noise, so that it rises during a generation.
"""

from __future__ import annotations

from ..grids import patched_grid, with_padded_text
from ..layout import Blocks, Layout, Stream

__all__ = ["LAYOUTS"]

LAYOUTS = (
    Layout(
        name="mochi",
        models=("MochiTransformer3DModel",),
        kinds=(
            Blocks(
                path="transformer_blocks",
                streams=(
                    (r"attn1\.(to_[qkv]|to_out\.0)", Stream.VIDEO),
                    (r"attn1\.(add_[qkv]_proj|to_add_out)", Stream.TEXT),
                    (r"ff\.net\.(0\.proj|2)", Stream.VIDEO),
                    (r"ff_context\.net\.(0\.proj|2)", Stream.TEXT),
                ),
                attention="attn1",
                text="last",
                one_by_one=True,
            ),
        ),
        grid=with_padded_text(patched_grid()),
        timestep_rises=True,
        modulation=(
            r"transformer_blocks\.\d+\.norm1\.linear",
            r"transformer_blocks\.\d+\.norm1_context\.linear(_1)?",
            r"norm_out\.linear",
        ),
    ),
)
