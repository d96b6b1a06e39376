"""EasyAnimate: joint attention over text and video, text first.

Most blocks have layers of their own for text. In the others one feed-forward network runs twice,
for video and for text: its tokens are rounded alone, because nothing tells the two apart.
"""

from __future__ import annotations

from ..grids import patched_grid
from ..layout import Blocks, Layout, Stream

__all__ = ["LAYOUTS"]

LAYOUTS = (
    Layout(
        name="easyanimate",
        models=("EasyAnimateTransformer3DModel",),
        kinds=(
            Blocks(
                path="transformer_blocks",
                streams=(
                    (r"attn1\.(to_[qkv]|to_out\.0)", Stream.VIDEO),
                    (r"attn1\.(add_[qkv]_proj|to_add_out)", Stream.TEXT),
                    (r"ff\.net\.(0\.proj|2)", Stream.VIDEO),
                    (r"txt_ff\.net\.(0\.proj|2)", Stream.TEXT),
                ),
                attention="attn1",
                text="first",
                having="txt_ff",
            ),
            Blocks(
                path="transformer_blocks",
                streams=(
                    (r"attn1\.to_[qkv]", Stream.JOINT),
                    (r"attn1\.to_out\.0", Stream.VIDEO),
                    (r"ff\.net\.(0\.proj|2)", Stream.CONTEXT),
                ),
                attention="attn1",
                text="first",
            ),
        ),
        grid=patched_grid(),
        modulation=(r"transformer_blocks\.\d+\.norm[12]\.linear", r"norm_out\.linear"),
    ),
)
