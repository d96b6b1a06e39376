"""Motif-Video: HunyuanVideo's blocks with optional cross-attention to the text.

The last single-stream blocks, the decoder, see the encoder's video in the place of the text.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..grids import patched_grid, with_padded_text
from ..layout import Blocks, Layout, Stream
from .hunyuan import DUAL, DUAL_MODULATION, SINGLE, SINGLE_MODULATION

__all__ = ["LAYOUTS"]

_CROSS = (
    (r"cross_attn\.(to_q|to_out\.0)", Stream.VIDEO),
    (r"cross_attn\.to_[kv]", Stream.TEXT),
)


def _decoder(model: nn.Module, count: int) -> range:
    config: Any = model.config
    return range(count - config.num_decoder_layers, count)


LAYOUTS = (
    Layout(
        name="motif_video",
        models=("MotifVideoTransformer3DModel",),
        kinds=(
            Blocks(
                path="transformer_blocks",
                streams=(*DUAL, *_CROSS),
                attention="attn",
                text="last",
            ),
            Blocks(
                path="single_transformer_blocks",
                streams=SINGLE,
                attention="attn",
                only=_decoder,
            ),
            Blocks(
                path="single_transformer_blocks",
                streams=(*SINGLE, *_CROSS),
                attention="attn",
                text="last",
            ),
        ),
        grid=with_padded_text(patched_grid(), images="image_embeds"),
        modulation=(*DUAL_MODULATION, *SINGLE_MODULATION),
    ),
)
