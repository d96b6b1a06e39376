"""Helios: Wan's blocks; long, mid and short history before the video in self-attention."""

from __future__ import annotations

from ..grids import grid_with_history
from ..layout import Blocks, Layout
from .wan import BLOCK

__all__ = ["LAYOUTS"]

LAYOUTS = (
    Layout(
        name="helios",
        models=("HeliosTransformer3DModel",),
        kinds=(Blocks(path="blocks", streams=BLOCK, attention="attn1"),),
        grid=grid_with_history(
            {
                "latents_history_short": ("indices_latents_history_short", 1),
                "latents_history_mid": ("indices_latents_history_mid", 2),
                "latents_history_long": ("indices_latents_history_long", 4),
            }
        ),
        modulation=(r"condition_embedder\.time_proj",),
    ),
)
