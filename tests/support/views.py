"""The same numbers elsewhere in memory."""

import torch

__all__ = ["apart", "shifted", "transposed"]


def apart(x: torch.Tensor) -> torch.Tensor:
    """`x` with another number behind each of its elements."""
    wide = torch.empty(*x.shape, 2, dtype=x.dtype).fill_(1)
    wide[..., 0] = x
    return wide[..., 0]


def shifted(x: torch.Tensor) -> torch.Tensor:
    """`x`, contiguous, one element beyond where memory begins."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype).fill_(1)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """`x` of two or more dimensions whose columns lie in one piece."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)
