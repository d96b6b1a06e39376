"""Rotation ``hadamard_32``: every 32 columns times a Hadamard matrix (ours; format, section 9).

A layer may be stored rotated. Its weight is multiplied by H (32 x 32, entries 1 and -1, ``H @ H =
32``) before it is quantized, its input by ``H / 32`` before it is rounded::

    w' = w H,   x' = x H / 32,   sum x' w' = sum x w  but for rounding

so that no large value stands alone in a block. The product is computed as a butterfly of float32
additions whose order is part of the format, which gives every implementation the same bits.
"""

from __future__ import annotations

import torch

from .formatbook import ROTATION_GROUP, Rotation, rotation_by_name

__all__ = ["check_rotation", "energy_of_rotation", "rotate_activation", "rotate_weight"]


def rotate_weight(w: torch.Tensor, rotation: Rotation = "hadamard_32") -> torch.Tensor:
    """What ``quantize(w, rotation=...)`` rounds: ``w H`` in groups of 32 columns.

    Args:
        w: float32, bfloat16 or float16 [..., K], K a multiple of 32.
        rotation: ``"none"`` returns `w` itself.

    Returns:
        float32 [..., K]. Finite numbers above 2**122 may overflow.
    """
    return w if rotation == "none" else _butterfly(w)


def rotate_activation(x: torch.Tensor, rotation: Rotation = "hadamard_32") -> torch.Tensor:
    """What a rotated layer rounds instead of its input: ``x H / 32`` in groups of 32 columns.

    It also is the way back from a rotated weight, because ``H @ H = 32``:
    ``rotate_activation(rotate_weight(w))`` is `w`, but for the rounding of float32 sums.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 32.
        rotation: ``"none"`` returns `x` itself.

    Returns:
        float32 [..., K]. Finite numbers above 2**122 may overflow.
    """
    return x if rotation == "none" else _butterfly(x) * (1 / ROTATION_GROUP)


def energy_of_rotation(rotation: Rotation) -> int:
    """What :func:`rotate_weight` multiplies the sum of all squares by."""
    return 1 if rotation == "none" else ROTATION_GROUP


def check_rotation(rotation: str, columns: int, name: str = "tensor") -> None:
    """Raise ValueError unless a matrix of `columns` columns can have this rotation."""
    if rotation_by_name(rotation) != "none" and columns % ROTATION_GROUP:
        raise ValueError(
            f"{name}: has {columns} columns; rotation {rotation!r} needs a multiple of "
            f"{ROTATION_GROUP}: leave it unrotated"
        )


def _butterfly(x: torch.Tensor) -> torch.Tensor:
    """``x H`` by five rounds of float32 sums and differences, in the order of the format."""
    values = x.to(torch.float32)
    step = 1
    while step < ROTATION_GROUP:
        pairs = values.reshape(*x.shape[:-1], x.shape[-1] // (2 * step), 2, step)
        a, b = pairs.unbind(-2)
        values = torch.stack([a + b, a - b], dim=-2).reshape(x.shape)
        step *= 2
    return values
