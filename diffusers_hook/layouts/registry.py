"""Which layout a transformer has: by its class, by a name, or guessed from its modules."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from .grids import no_grid
from .layout import Blocks, Layout, LayoutError, Stream

__all__ = ["generic_layout", "layout_for", "layout_named", "register_layout"]

_GENERIC = r"(?i)(?!.*(norm|modulat|mod\b|ada_?ln|embed|lora_)).+"
"""Linear layers of a block that we know nothing about: all but norms, modulation and embedders."""

_OF_CONVOLUTIONS = ("down_blocks", "up_blocks")
"""Lists that diffusers' U-Nets and autoencoders have."""

_layouts: dict[str, Layout] = {}
_by_model: dict[str, Layout] = {}


def register_layout(layout: Layout) -> Layout:
    """Make a layout known for the classes it names.

    Raises:
        ValueError: if its name or one of its classes is taken.
    """
    if layout.name in _layouts:
        raise ValueError(f"layout: {layout.name!r} is registered already; choose another name")
    taken = [name for name in layout.models if name in _by_model]
    if taken:
        raise ValueError(
            f"layout: {layout.name!r} names {taken[0]}, which belongs to "
            f"{_by_model[taken[0]].name!r}; pass the layout to enable() instead"
        )
    _layouts[layout.name] = layout
    _by_model.update(dict.fromkeys(layout.models, layout))
    return layout


def layout_named(name: str) -> Layout:
    """The registered layout of that name.

    Raises:
        LayoutError: if there is none.
    """
    if name not in _layouts:
        known = ", ".join(map(repr, _layouts))
        raise LayoutError(f"layout: {name!r} is not known; known are {known}")
    return _layouts[name]


def layout_for(model: nn.Module) -> Layout | None:
    """The layout registered for a model's class or one of its base classes, or None."""
    for base in type(model).__mro__:
        if base.__name__ in _by_model:
            return _by_model[base.__name__]
    return None


def generic_layout(model: nn.Module) -> Layout | None:
    """A layout for a model of an unknown class, or None if it has no list of blocks.

    Its blocks are those of all lists whose members hold two linear layers or more, but for lists
    in embedders and the like. Nothing says which tokens a layer sees, so all rows are rounded
    alone.

    Raises:
        LayoutError: if it is a U-Net or an autoencoder.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, part in model.named_modules():
        if not isinstance(part, nn.ModuleList):
            continue
        if name.rpartition(".")[2] in _OF_CONVOLUTIONS:
            raise LayoutError(
                f"{type(model).__name__}: has {name}, as U-Nets and autoencoders do, which are not "
                "supported; give a transformer, or pass a layout as layout="
            )
        if not any(name.startswith(f"{outer}.") for outer in lists) and _holds_blocks(name, part):
            lists[name] = part
    if not lists:
        return None
    kinds = (Blocks(path, streams=((_GENERIC, Stream.CONTEXT),), attention=None) for path in lists)
    return Layout(
        name="generic",
        models=(type(model).__name__,),
        kinds=tuple(kinds),
        grid=no_grid,
        remark=f"its layout is not known, and only linear layers in {_joined(lists)} become 4 bit",
    )


def _holds_blocks(name: str, parts: nn.ModuleList) -> bool:
    """Whether a list is one of transformer blocks."""
    layers = [
        inner
        for inner, layer in parts.named_modules()
        if isinstance(layer, nn.Linear) and re.fullmatch(_GENERIC, inner)
    ]
    return len(layers) >= 2 * len(parts) > 0 and re.fullmatch(_GENERIC, name) is not None


def _joined(names: Iterable[str]) -> str:
    """``a, b and c``."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
