"""Where the tokens are: one :class:`Layout` per family of video transformers.

A layout says which linear layers are quantized, which *stream* of tokens each of them sees, which
attention shows the salient tokens, and how video tokens lie on the (frames, rows, columns) grid.
The layouts are data, one file a family, in :mod:`diffusers_hook.layouts.families`; the rest of the
package knows streams and grids only.

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
from typing import Any, Literal

from torch import nn

from .grids import Grid

__all__ = ["Block", "Blocks", "Layout", "LayoutError", "Stream", "without_adapters"]


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


def _get(model: nn.Module, path: str) -> Any:
    module: Any = model
    for part in path.split("."):
        module = getattr(module, part, None)
    return module
