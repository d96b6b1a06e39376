"""The layouts of the families we know, one file each."""

from __future__ import annotations

from ..registry import register_layout
from . import (
    allegro,
    anyflow,
    cogvideox,
    cosmos,
    easyanimate,
    helios,
    hunyuan,
    kandinsky,
    latte,
    ltx,
    minimax_h3,
    mochi,
    motif,
    open_sora,
    sana_video,
    wan,
)

__all__ = ["register_families"]

_FAMILIES = (
    wan,
    anyflow,
    helios,
    hunyuan,
    motif,
    ltx,
    cogvideox,
    mochi,
    latte,
    allegro,
    easyanimate,
    cosmos,
    kandinsky,
    sana_video,
    minimax_h3,
    open_sora,
)


def register_families() -> None:
    """Make the layouts of all families known; call it once."""
    for family in _FAMILIES:
        for layout in family.LAYOUTS:
            register_layout(layout)
