"""The layouts of the families we know, one file each."""

from __future__ import annotations

from ..layouts import register_layout
from . import wan

__all__: list[str] = []

for _family in (wan,):
    for _layout in _family.LAYOUTS:
        register_layout(_layout)
