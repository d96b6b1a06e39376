"""MiniMax-H3: text, video and audio rows in one packed sequence."""

from __future__ import annotations

from ..grids import no_grid
from ..layout import Blocks, Layout, Stream

__all__ = ["LAYOUTS"]

_STREAMS = (
    (r"attn\.(to_[qkv]|to_qkv|to_out\.0)", Stream.CONTEXT),
    (r"ff\.net\.(0\.proj|2)", Stream.CONTEXT),
)

LAYOUTS = (
    Layout(
        name="minimax_h3",
        models=("MiniMaxH3Transformer3DModel",),
        kinds=(
            Blocks(path="transformer_blocks", streams=_STREAMS, attention=None),
            Blocks(path="token_refiner.refiner_blocks", streams=_STREAMS, attention=None),
        ),
        grid=no_grid,
        modulation=(r"transformer_blocks\.\d+\.adaln_proj\.linear", r"norm_out\.linear"),
        remark="text, video and audio share one packed sequence whose order the pipeline decides",
    ),
)
