"""Where video and text tokens lie in the sequence of each transformer family."""

from __future__ import annotations

from .grids import Grid
from .layout import Block, Blocks, Layout, LayoutError, Stream, without_adapters
from .registry import generic_layout, layout_for, layout_named, register_layout

__all__ = [
    "Block",
    "Blocks",
    "Grid",
    "Layout",
    "LayoutError",
    "Stream",
    "generic_layout",
    "layout_for",
    "layout_named",
    "register_layout",
    "without_adapters",
]
