"""Kandinsky 5 and 6: video self-attention, cross-attention to text and audio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..grids import Grid, no_grid, patched_grid
from ..layout import Blocks, Layout, Stream

__all__ = ["LAYOUTS"]

_frames_first = patched_grid(axes="bthwc")


def _dense_grid(model: nn.Module, arguments: Mapping[str, Any]) -> Grid | None:
    """Sparse attention reorders the tokens into tiles and never shows a token's attention."""
    sparse = arguments.get("sparse_params") is not None
    return None if sparse else _frames_first(model, arguments)


_KANDINSKY5_TEXT = Blocks(
    path="text_transformer_blocks",
    streams=(
        (r"self_attention\.(to_(query|key|value)|out_layer)", Stream.CONTEXT),
        (r"feed_forward\.(in|out)_layer", Stream.CONTEXT),
    ),
    attention=None,
)

_KANDINSKY6_TEXT = tuple(
    Blocks(
        path=f"{part}_text_transformer_blocks",
        streams=(
            (r"attn\.(to_(query|key|value)|out_layer)", Stream.CONTEXT),
            (r"feed_forward\.net\.(0\.proj|2)", Stream.CONTEXT),
        ),
        attention=None,
    )
    for part in ("video", "audio")
)

LAYOUTS = (
    Layout(
        name="kandinsky5",
        models=("Kandinsky5Transformer3DModel",),
        kinds=(
            Blocks(
                path="visual_transformer_blocks",
                streams=(
                    (r"self_attention\.(to_(query|key|value)|out_layer)", Stream.VIDEO),
                    (r"cross_attention\.(to_query|out_layer)", Stream.VIDEO),
                    (r"cross_attention\.to_(key|value)", Stream.CONTEXT),
                    (r"feed_forward\.(in|out)_layer", Stream.VIDEO),
                ),
                attention="self_attention",
            ),
            _KANDINSKY5_TEXT,
        ),
        grid=_dense_grid,
        modulation=(
            r"(text|visual)_transformer_blocks\.\d+\.(text|visual)_modulation\.out_layer",
            r"out_layer\.modulation\.out_layer",
        ),
        remark="sparse attention (NABLA) runs without salient tokens and groups",
    ),
    Layout(
        name="kandinsky6",
        models=("Kandinsky6Transformer3DModel",),
        kinds=(
            Blocks(
                path="visual_transformer_blocks",
                streams=(
                    (
                        r"video_dec_block\.self_attention\.(to_(query|key|value)|out_layer)",
                        Stream.VIDEO,
                    ),
                    (r"video_dec_block\.cross_attention\.(to_query|out_layer)", Stream.VIDEO),
                    (r"video_dec_block\.cross_attention\.to_(key|value)", Stream.CONTEXT),
                    (r"video_dec_block\.feed_forward\.net\.(0\.proj|2)", Stream.VIDEO),
                    (r"va_cross_attention\.(to_query|out_layer)", Stream.VIDEO),
                    (r"va_cross_attention\.to_(key|value)", Stream.CONTEXT),
                    (r"av_cross_attention\.(to_query|out_layer)", Stream.CONTEXT),
                    (r"av_cross_attention\.to_(key|value)", Stream.VIDEO),
                    (
                        r"audio_dec_block\.(self|cross)_attention\.(to_(query|key|value)|out_layer)",
                        Stream.CONTEXT,
                    ),
                    (r"audio_dec_block\.feed_forward\.net\.(0\.proj|2)", Stream.CONTEXT),
                ),
                attention="video_dec_block.self_attention",
            ),
            *_KANDINSKY6_TEXT,
        ),
        grid=_frames_first,
        modulation=(
            r"visual_transformer_blocks\.\d+\.(video|audio)_dec_block\.visual_modulation\.out_layer",
            r"visual_transformer_blocks\.\d+\.(va|av)_modulation\.out_layer",
            r"(video|audio)_text_transformer_blocks\.\d+\.text_modulation\.out_layer",
            r"(audio_)?out_layer\.modulation\.out_layer",
        ),
    ),
    Layout(
        name="kandinsky6_sr",
        models=("Kandinsky6SRTransformer3DModel",),
        kinds=(
            Blocks(
                path="visual_transformer_blocks",
                streams=(
                    (r"self_attention\.(to_(query|key|value)|out_layer)", Stream.CONTEXT),
                    (r"feed_forward\.net\.(0\.proj|2)", Stream.CONTEXT),
                ),
                attention=None,
            ),
        ),
        grid=no_grid,
        modulation=(
            r"visual_transformer_blocks\.\d+\.visual_modulation\.out_layer",
            r"out_layer\.modulation\.out_layer",
        ),
        remark="its attention is sparse over tiles of tokens",
    ),
)
