"""Wan 2.1 and 2.2, SkyReels-V2: video self-attention, cross-attention to text."""

from __future__ import annotations

from ..layouts import Blocks, Layout, Stream, patched_grid

__all__ = ["LAYOUTS"]

LAYOUTS = (
    Layout(
        name="wan",
        models=("WanTransformer3DModel", "SkyReelsV2Transformer3DModel"),
        kinds=(
            Blocks(
                path="blocks",
                streams=(
                    (r"attn1\.(to_[qkv]|to_qkv|to_out\.0)", Stream.VIDEO),
                    (r"attn2\.(to_q|to_out\.0)", Stream.VIDEO),
                    (r"attn2\.(to_[kv]|to_kv|add_[kv]_proj|to_added_kv)", Stream.CONTEXT),
                    (r"ffn\.net\.(0\.proj|2)", Stream.VIDEO),
                ),
                attention="attn1",
            ),
        ),
        grid=patched_grid(),
        modulation=(r"condition_embedder\.time_proj",),
    ),
)
