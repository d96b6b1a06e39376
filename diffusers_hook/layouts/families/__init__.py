"""The layouts of the families we know, one file each."""

from __future__ import annotations

from ..layouts import register_layout
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

__all__: list[str] = []

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

for _family in _FAMILIES:
    for _layout in _family.LAYOUTS:
        register_layout(_layout)
