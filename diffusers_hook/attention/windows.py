"""The windows of SeDA: the token grid cut into boxes, twice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["Tilings", "tilings"]


@dataclass(frozen=True)
class Tilings:
    """The tokens of every window of both tilings. Shared between calls: do not write to it.

    Attributes:
        members: int64 [windows, tokens of the largest window], the first tiling's windows first;
            tokens ascending in each row, then -1.
        slots: int64 [2, tokens]: where each tiling holds a token, as an index into `members`,
            flattened.
        tokens: tokens of the grid.
    """

    members: torch.Tensor
    slots: torch.Tensor
    tokens: int


@lru_cache(maxsize=32)
def tilings(grid: tuple[int, ...], window: tuple[int, ...], device: torch.device) -> Tilings:
    """Both tilings of a grid.

    The first starts at (0, 0, 0), the second is shifted by half a window (rounded down) in each
    axis. Windows are cut off at the borders; every token is in one window of each tiling.

    Args:
        grid: frames, rows and columns of the token grid; token (t, h, w) is ``(t*H + h)*W + w``.
        window: frames, rows and columns of a window.
        device: where the tensors are.

    Raises:
        ValueError: if a size is not positive.
    """
    for name, sizes in (("grid", grid), ("window", window)):
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"{name}: {sizes} is not allowed; give three positive sizes (T, H, W)")
    tokens = grid[0] * grid[1] * grid[2]
    width = 1
    for size, length in zip(grid, window, strict=True):
        width *= min(size, length)
    members, slots, offset = [], [], 0
    for shifted in (False, True):
        window_of = _window_of(grid, window, shifted)
        count = window_of.bincount()
        order = window_of.argsort(stable=True)
        start = (count.cumsum(0) - count)[window_of[order]]
        slot = torch.empty(tokens, dtype=torch.int64)
        slot[order] = window_of[order] * width + torch.arange(tokens) - start
        tokens_at = torch.full((len(count) * width,), -1)
        tokens_at[slot] = torch.arange(tokens)
        members.append(tokens_at.view(-1, width))
        slots.append(slot + offset)
        offset += len(tokens_at)
    return Tilings(torch.cat(members).to(device), torch.stack(slots).to(device), tokens)


def _window_of(grid: tuple[int, ...], window: tuple[int, ...], shifted: bool) -> torch.Tensor:
    """The number of each token's window in one tiling, int64 [tokens]."""
    number = torch.zeros(1, dtype=torch.int64)
    for size, length in zip(grid, window, strict=True):
        # shifted by half a window: the other part of a window lies before the first token
        block = (torch.arange(size) + shifted * (length - length // 2)) // length
        block -= int(block[0])
        number = (number.unsqueeze(-1) * (int(block[-1]) + 1) + block).flatten()
    return number
