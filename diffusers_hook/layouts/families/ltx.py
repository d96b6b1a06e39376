"""LTX and the video stream of LTX-2: video self-attention, cross-attention to text and audio.

The input is packed already, [batch, tokens, channels]. Pipelines tell the grid's sizes or the place
of every token; pictures to be kept are more tokens, before the video in LTX and after it in LTX-2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..grids import Grid, remembered
from ..layout import Blocks, Layout, Stream

__all__ = ["LAYOUTS"]


def _packed_grid(video_last: bool) -> Callable[[nn.Module, Mapping[str, Any]], Grid | None]:
    """A grid from the tokens' coordinates or, without them, from the grid's sizes."""

    @remembered
    def raster(coordinates: torch.Tensor) -> tuple[int, int, int]:
        # [batch, 3, tokens] or, from start to end, [batch, 3, tokens, 2]
        starts = coordinates[0] if coordinates.ndim == 3 else coordinates[0, ..., 0]
        return _raster((-starts.flip(1) if video_last else starts).cpu())

    def grid(model: nn.Module, arguments: Mapping[str, Any]) -> Grid | None:
        batch, tokens = arguments["hidden_states"].shape[:2]
        coordinates = arguments.get("video_coords")
        sizes = _sizes(model, arguments) if coordinates is None else raster(coordinates)
        count = sizes[0] * sizes[1] * sizes[2]
        if not 0 < count <= tokens:
            return None
        beside = tokens - count
        return Grid(batch, *sizes, *((beside, 0) if video_last else (0, beside)))

    return grid


def _sizes(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    config: Any = model.config
    patch = config.patch_size
    frames = arguments["num_frames"] // config.patch_size_t
    return frames, arguments["height"] // patch, arguments["width"] // patch


def _raster(starts: torch.Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of the grid that coordinates [3, tokens] on the CPU begin with."""
    time, row, column = starts
    columns = _rising(column)
    rows = _rising(row[::columns])
    frame = rows * columns
    places = torch.cartesian_prod(row[::columns][:rows], column[:columns])
    frames = _rising(time[::frame])
    for t in range(frames):
        here = starts[:, t * frame : (t + 1) * frame]
        if not torch.equal(here[1:].T, places) or (here[0] != here[0, 0]).any():
            return t, rows, columns
    return frames, rows, columns


def _rising(values: torch.Tensor) -> int:
    """How many values rise from the first one on."""
    falls = (values[1:] <= values[:-1]).nonzero()
    return int(falls[0]) + 1 if len(falls) else len(values)


_VIDEO = (
    (r"attn1\.(to_[qkv]|to_out\.0)", Stream.VIDEO),
    (r"attn2\.(to_q|to_out\.0)", Stream.VIDEO),
    (r"attn2\.to_[kv]", Stream.CONTEXT),
    (r"ff\.net\.(0\.proj|2)", Stream.VIDEO),
)

_AUDIO = (
    (r"audio_attn[12]\.(to_[qkv]|to_out\.0)", Stream.CONTEXT),
    (r"audio_to_video_attn\.(to_q|to_out\.0)", Stream.VIDEO),
    (r"audio_to_video_attn\.to_[kv]", Stream.CONTEXT),
    (r"video_to_audio_attn\.(to_q|to_out\.0)", Stream.CONTEXT),
    (r"video_to_audio_attn\.to_[kv]", Stream.VIDEO),
    (r"audio_ff\.net\.(0\.proj|2)", Stream.CONTEXT),
)

LAYOUTS = (
    Layout(
        name="ltx",
        models=("LTXVideoTransformer3DModel",),
        kinds=(Blocks(path="transformer_blocks", streams=_VIDEO, attention="attn1"),),
        grid=_packed_grid(video_last=True),
        modulation=(r"time_embed\.linear",),
    ),
    Layout(
        name="ltx2",
        models=("LTX2VideoTransformer3DModel",),
        kinds=(Blocks(path="transformer_blocks", streams=_VIDEO + _AUDIO, attention="attn1"),),
        grid=_packed_grid(video_last=False),
        modulation=(
            r"(audio_)?time_embed\.linear",
            r"av_cross_attn_(video|audio)_scale_shift\.linear",
            r"av_cross_attn_(video_a2v|audio_v2a)_gate\.linear",
            r"(audio_)?prompt_adaln\.linear",
        ),
    ),
)
