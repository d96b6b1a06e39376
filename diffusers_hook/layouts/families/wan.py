"""Wan 2.1 and 2.2 and what grew out of it: video self-attention, cross-attention to text.

VACE adds blocks over the tokens of a control video, Animate adds cross-attention to a face.
"""

from __future__ import annotations

from ..grids import no_grid, patched_grid
from ..layout import Blocks, Layout, Stream

__all__ = ["BLOCK", "LAYOUTS"]

BLOCK = (
    (r"attn1\.(to_[qkv]|to_qkv|to_out\.0)", Stream.VIDEO),
    (r"attn2\.(to_q|to_out\.0)", Stream.VIDEO),
    (r"attn2\.(to_[kv]|to_kv|add_[kv]_proj|to_added_kv)", Stream.CONTEXT),
    (r"ffn\.net\.(0\.proj|2)", Stream.VIDEO),
)
"""Linear layers of a Wan block."""

_MODULATION = (r"condition_embedder\.time_proj",)

LAYOUTS = (
    Layout(
        name="wan",
        models=(
            "WanTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "ChronoEditTransformer3DModel",
        ),
        kinds=(Blocks(path="blocks", streams=BLOCK, attention="attn1"),),
        grid=patched_grid(),
        modulation=_MODULATION,
    ),
    Layout(
        name="wan_vace",
        models=("WanVACETransformer3DModel",),
        kinds=(
            Blocks(path="blocks", streams=BLOCK, attention="attn1"),
            Blocks(
                path="vace_blocks",
                streams=(*BLOCK, (r"proj_(in|out)", Stream.VIDEO)),
                attention="attn1",
            ),
        ),
        grid=patched_grid(),
        modulation=_MODULATION,
    ),
    Layout(
        name="wan_animate",
        models=("WanAnimateTransformer3DModel",),
        kinds=(
            Blocks(path="blocks", streams=BLOCK, attention="attn1"),
            Blocks(
                path="face_adapter",
                streams=((r"to_(q|out)", Stream.VIDEO), (r"to_[kv]", Stream.CONTEXT)),
                attention=None,
            ),
        ),
        grid=patched_grid(),
        modulation=_MODULATION,
    ),
    Layout(
        name="wan_animate_2",
        models=("WanAnimate2Transformer3DModel",),
        kinds=(
            Blocks(
                path="blocks",
                streams=(
                    (r"self_attn\.(to_[qkv]|to_qkv|to_out\.0)", Stream.CONTEXT),
                    (
                        r"cross_attn\.(to_[qkv]|to_kv|add_[kv]_proj|to_added_kv|to_out\.0)",
                        Stream.CONTEXT,
                    ),
                    (r"ffn\.[02]", Stream.CONTEXT),
                ),
                attention=None,
            ),
        ),
        grid=no_grid,
        modulation=(r"time_projection\.1",),
        remark="its video attends through a block mask to padded frames and to a cached reference",
    ),
)
