"""Whether SeDA and salient tokens reach their own aims, measured without a finished video (ours).

SeDA lets the tokens of a group share a grid, so that tokens which show the same thing are rounded
the same way. Two things can be measured: whether grouped tokens are alike at all, and whether their
rounding errors agree more when they share a grid. Decomposition is for the tokens that receive most
attention: whether the chosen ones are these is a recall, at the choice and until the next one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dialect_kernels.formatbook import Formatbook
from dialect_kernels.reference import round_activation
from dialect_kernels.rotation import rotate_activation
from diffusers_hook.attention.attention import Attention
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.layouts import Stream
from diffusers_hook.model.attach import attached
from diffusers_hook.tokens.block_state import BlockState
from diffusers_hook.tokens.token_rows import TokenRows

__all__ = ["Aims", "Consistency", "consistency", "recall", "watched"]

EVERY = 7
"""Calls of the transformer between two whose groups are measured; odd, to meet both branches."""


@dataclass(frozen=True)
class Consistency:
    """Of the grouped tokens of one layer's input, each beside its group's anchor.

    Attributes:
        likeness: mean cosine of a token and its anchor.
        of_any: mean cosine of two different tokens of one sample, over all pairs.
        alone: how far their rounding errors are apart if every token chooses its dialects alone:
            the root mean square of the difference, over that of the tokens.
        together: the same if the group shares sub-formatbooks.
    """

    likeness: float
    of_any: float
    alone: float
    together: float


@torch.no_grad()
def consistency(
    x: torch.Tensor, group: torch.Tensor, book: Formatbook, block_size: int
) -> Consistency | None:
    """How alike grouped tokens are, and how alike they are rounded (ours).

    Args:
        x: what is rounded, [B, T, K].
        group: integers [B, T]: the index of each token's anchor among the T, or -1.
        book: the 32-dialect book.
        block_size: elements per block.

    Returns:
        None where no token is grouped with another one.
    """
    (samples, tokens), rows = group.shape, x.float().flatten(0, 1)
    first = tokens * torch.arange(samples, device=group.device)[:, None]
    shared = torch.where(group >= 0, group + first, -1).flatten().to(torch.int64)
    member = ((shared >= 0) & (shared != torch.arange(len(rows), device=group.device))).nonzero()
    if not len(member):
        return None
    member = member[:, 0]
    anchor, energy = shared[member], rows[member].square().sum()

    def apart(group: torch.Tensor | None) -> float:
        error = round_activation(rows, book, block_size, group) - rows
        return math.sqrt((error[member] - error[anchor]).square().sum() / energy)

    unit = nn.functional.normalize(rows, dim=-1)
    every = unit.view(samples, tokens, -1).sum(1).square().sum() - unit.square().sum()
    return Consistency(
        likeness=float((unit[member] * unit[anchor]).sum(-1).mean()),
        of_any=float(every / (samples * tokens * (tokens - 1))),
        alone=apart(None),
        together=apart(shared),
    )


@torch.no_grad()
def recall(attention: Attention, chosen: torch.Tensor, video: slice) -> float:
    """Share of the tokens with the most received attention that are among the chosen (ours).

    Every query counts here; the hook samples some.

    Args:
        attention: over the whole video, of one call.
        chosen: int64 [B, S], the salient video tokens in force.
        video: the keys that are video tokens.
    """
    received: Any = 0
    for _, _, logits in attention.tiles():
        received = received + logits.softmax(-1).sum((1, 2))
    true = received[:, video].argsort(dim=1, descending=True, stable=True)[:, : chosen.shape[1]]
    return float((true[:, :, None] == chosen[:, None, :]).any(-1).float().mean())


@dataclass
class Aims:
    """What was measured during some calls.

    Attributes:
        consistencies: of every measured input of a block that has groups of several tokens.
        grouped: of every measured input, the share of its tokens that have another one as anchor.
        recalls: attention calls since the choice in force -> recalls of blocks and calls.
        first_input: the last input [B, T, K] of a first layer of a block.
    """

    consistencies: list[Consistency] = field(default_factory=list)
    grouped: list[float] = field(default_factory=list)
    recalls: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    first_input: torch.Tensor | None = None

    def block_input(self, *_: object) -> torch.Tensor:
        """What the block whose attention is observed rounded first, for `groupings.alike`."""
        assert self.first_input is not None
        return self.first_input


@contextmanager
def watched(transformer: nn.Module, aims: Aims) -> Iterator[None]:
    """Measure an enabled transformer whose attention is over the whole video.

    Args:
        transformer: the transformer.
        aims: receives the recalls of every attention call and, of every seventh call of the
            transformer, the consistencies with the groups in force.
    """
    hook = attached(transformer)
    assert hook is not None
    state = hook.state
    undo: list[Callable[[], object]] = []
    blocks = {id(block.slot): block for block in state.blocks}
    last: list[Any] = [None]

    def look(layer: DialectLinear, arguments: tuple[torch.Tensor, ...]) -> None:
        [x], block = arguments, blocks[id(layer.slot)]
        if x is last[0] or layer.stream == Stream.CONTEXT:  # q, k and v round their input once
            return
        last[0] = x
        group = state.generation.record(block.index).group
        if group is not None and state.meter.counts["calls"] % EVERY == 1:
            rounded = rotate_activation(x, layer.rotation)
            found = consistency(rounded, group, layer.packed.book, layer.block_size)
            aims.consistencies += [] if found is None else [found]
            token = torch.arange(group.shape[1], device=group.device)
            aims.grouped.append(float(((group >= 0) & (group != token)).float().mean()))

    def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        aims.first_input = arguments[0]

    def watch(block: BlockState) -> None:
        observe = block.observe

        def observed(attention: Attention) -> None:
            observe(attention)
            grid, record = state.generation.grid, state.generation.record(block.index)
            if grid is not None and record.salient is not None:
                video = TokenRows(block.kind, grid).video(attention.key.shape[2])
                age = (record.calls - 1) % hook.config.salient_refresh
                aims.recalls[age].append(recall(attention, record.salient, video))

        block.observe = observed  # type: ignore[method-assign]
        undo.append(lambda: vars(block).pop("observe"))

    first: dict[int, DialectLinear] = {}
    for layer in transformer.modules():
        if isinstance(layer, DialectLinear):
            first.setdefault(id(layer.slot), layer)
            undo.append(layer.register_forward_pre_hook(look).remove)
    undo += [layer.register_forward_pre_hook(keep).remove for layer in first.values()]
    for block in state.blocks:
        watch(block)
    try:
        yield
    finally:
        for step in undo:
            step()
