"""Where the tokens are: one :class:`Layout` per family of video transformers.

A layout says which linear layers are quantized, which *stream* of tokens each of them sees, whose
attention the salient tokens are read from, and how video tokens lie on the (frames, rows, columns)
grid. The layouts are data, one file a family, in :mod:`diffusers_hook.layouts.families`; the rest
of the package knows streams and grids only.

::

    JOINT, text first   | text | video ...... |      CogVideoX, EasyAnimate, Open-Sora
    JOINT, text last    | video ...... | text |      HunyuanVideo, Mochi
    VIDEO               | video ...... |             Wan, LTX, Allegro, Cosmos; dual-stream blocks
    TEXT                | text |                     the text half of dual-stream blocks
    CONTEXT             | anything else |            cross-attention's text, images, audio
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

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
    "no_grid",
    "patched_grid",
    "register_layout",
    "remembered",
    "without_adapters",
]

_GENERIC = r"(?i)(?!.*(norm|modulat|mod\b|ada_?ln|embed|lora_)).+"
"""Linear layers of a block that we know nothing about: all but norms, modulation and embedders."""


_Read = TypeVar("_Read")


class LayoutError(ValueError):
    """A model whose layout is unknown or does not fit; one sentence."""


class Stream(enum.StrEnum):
    """Which tokens the rows of a linear layer's input are."""

    VIDEO = "video"
    """The video tokens."""
    JOINT = "joint"
    """Video and text tokens in one sequence."""
    TEXT = "text"
    """The text tokens of a sequence that attends jointly with the video: always salient."""
    CONTEXT = "context"
    """Tokens of something else; they are rounded alone, without salient rows or groups."""


@dataclass(frozen=True)
class Grid:
    """The video tokens of one call of the transformer.

    Attributes:
        batch: samples.
        frames, rows, columns: sizes of the grid; token (t, h, w) is ``(t*rows + h)*columns + w``.
        before: tokens of another video, e.g. of an earlier part, that stand before these wherever
            the whole sequence is seen; they are never salient and in no group.
        after: the same, standing after them.
    """

    batch: int
    frames: int
    rows: int
    columns: int
    before: int = 0
    after: int = 0

    @property
    def tokens(self) -> int:
        """Video tokens per sample."""
        return self.frames * self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, rows, columns)."""
        return self.frames, self.rows, self.columns

    @property
    def sequence(self) -> int:
        """Tokens per sample with those of other videos."""
        return self.before + self.tokens + self.after


@dataclass(frozen=True)
class Blocks:
    """A list of equal transformer blocks.

    Attributes:
        path: the list's name from the model's root, e.g. ``"transformer_blocks"``.
        streams: (regular expression for a linear layer's whole name inside its block, stream), the
            first match counts; linear layers that match none stay in 16 bit.
        attention: name of the attention inside the block that the salient tokens are read from,
            ``""`` where the block itself has the processor, or None where none has a softmax.
        text: where a joint sequence has its text: ``"first"``, ``"last"`` or None; what such a
            sequence has after its video where it is None is neither salient nor grouped.
        attends: ``"all"`` (every video token sees every other), ``"frame"`` (only those of its own
            frame: the attention's batch is (batch, frames)) or ``"time"`` (only those at its own
            place: the batch is (batch, rows x columns) and tokens lie in that order).
        one_by_one: whether attention is computed for one sample after the other, each with its own
            number of text tokens.
        having: name of a module that a block must have to be of this kind, where a list holds
            several kinds; a block is of the first kind that it fits.
        only: (model, number of blocks in the list) -> the indices of the blocks of this kind, where
            the model's configuration says it.
    """

    path: str
    streams: tuple[tuple[str, Stream], ...]
    attention: str | None
    text: Literal["first", "last"] | None = None
    attends: Literal["all", "frame", "time"] = "all"
    one_by_one: bool = False
    having: str = ""
    only: Callable[[nn.Module, int], range] | None = None


@dataclass(frozen=True)
class Block:
    """One block of a model, as :meth:`Layout.blocks` finds it."""

    name: str
    module: nn.Module
    kind: Blocks

    def linears(self) -> Iterator[tuple[str, nn.Linear, Stream]]:
        """(name inside the block, module, stream) of every linear layer that is quantized."""
        for name, module in self.module.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            for pattern, stream in self.kind.streams:
                if re.fullmatch(pattern, without_adapters(name)):
                    yield name, module, stream
                    break


@dataclass(frozen=True)
class Layout:
    """How the tokens of a family of video transformers are laid out.

    Attributes:
        name: the family's name.
        models: class names of the transformers it fits.
        kinds: the model's lists of blocks.
        grid: (model, its call's arguments by name) -> the grid of that call, or None where its
            tokens lie on no grid; they are rounded alone then.
        timestep: name of the call's argument that holds the noise level.
        timestep_rises: whether it rises during a generation; in most families it falls.
        modulation: regular expressions for the whole names, from the model's root, of the adaLN
            modulation's linear layers.
        remark: what a user should know, e.g. why salient tokens are not available.
    """

    name: str
    models: tuple[str, ...]
    kinds: tuple[Blocks, ...]
    grid: Callable[[nn.Module, Mapping[str, Any]], Grid | None]
    timestep: str = "timestep"
    timestep_rises: bool = False
    modulation: tuple[str, ...] = ()
    remark: str = ""

    @property
    def has_saliency(self) -> bool:
        """Whether salient tokens and groups can be found in some kind of block."""
        return any(kind.attention is not None for kind in self.kinds)

    def blocks(self, model: nn.Module) -> list[Block]:
        """The blocks of a model.

        Raises:
            LayoutError: if the model has none of the lists of blocks.
        """
        found: dict[str, Block] = {}
        for kind in self.kinds:
            modules = _get(model, kind.path) or ()
            chosen = range(len(modules)) if kind.only is None else kind.only(model, len(modules))
            for index in chosen:
                name, module = f"{kind.path}.{index}", modules[index]
                if name not in found and (not kind.having or _get(module, kind.having) is not None):
                    found[name] = Block(name, module, kind)
        if not found:
            wanted = ", ".join(kind.path for kind in self.kinds)
            raise LayoutError(
                f"{type(model).__name__}: layout {self.name!r} found no blocks in it (looked for "
                f"{wanted}); pass the layout that fits the model"
            )
        return list(found.values())


def without_adapters(name: str) -> str:
    """A linear layer's name without what PEFT adds to it when it wraps the layer in an adapter."""
    return name.removesuffix(".base_layer")


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
    """A layout for a model whose own is not known, or None if it has no list of blocks.

    Its blocks are the list that holds most weights of linear layers. Whose tokens a layer sees
    cannot be told, so that all rows are rounded alone.
    """
    sizes = {
        name: sum(
            layer.in_features * layer.out_features
            for layer in part.modules()
            if isinstance(layer, nn.Linear)
        )
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList)
    }
    path = max(sizes, key=lambda name: sizes[name], default="")  # of equals the outermost
    if not sizes.get(path):
        return None
    return Layout(
        name="generic",
        models=(type(model).__name__,),
        kinds=(Blocks(path, streams=((_GENERIC, Stream.CONTEXT),), attention=None),),
        grid=no_grid,
        remark=f"its layout is not known, and only linear layers in {path} become 4 bit",
    )


def remembered(read: Callable[[torch.Tensor], _Read]) -> Callable[[torch.Tensor], _Read]:
    """`read`, asked once for every tensor object: reading values waits for a GPU.

    For tensors that a pipeline makes once and passes in every call, such as coordinates.
    """
    known: Any = WeakTensorKeyDictionary()

    def read_once(tensor: torch.Tensor) -> _Read:
        if tensor not in known:
            known[tensor] = read(tensor)
        found: _Read = known[tensor]
        return found

    return read_once


def patched_grid(
    argument: str = "hidden_states", axes: str = "bcthw"
) -> Callable[[nn.Module, Mapping[str, Any]], Grid]:
    """A grid read from a 5-D input and the model's ``config.patch_size``.

    Args:
        argument: name of the input.
        axes: its axes: b(atch), c(hannels), t(ime), h(eight), w(idth).
    """

    def grid(model: nn.Module, arguments: Mapping[str, Any]) -> Grid:
        video: torch.Tensor = arguments[argument]
        size = dict(zip(axes, video.shape, strict=True))
        patch = _patch(model)
        return Grid(size["b"], size["t"] // patch[0], size["h"] // patch[1], size["w"] // patch[2])

    return grid


def no_grid(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """The grid of models whose tokens lie on none that we know."""


def _patch(model: nn.Module) -> tuple[int, int, int]:
    """Frames, rows and columns of pixels per token, from the model's configuration."""
    config: Any = model.config
    size = config.patch_size
    if isinstance(size, int):
        return getattr(config, "patch_size_t", None) or 1, size, size
    return tuple(size)


def _get(model: nn.Module, path: str) -> Any:
    module: Any = model
    for part in path.split("."):
        module = getattr(module, part, None)
    return module
