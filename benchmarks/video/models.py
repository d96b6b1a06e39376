"""Video transformers by their dimensions: Wan 2.1 and Open-Sora 2.0, with random weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

__all__ = ["Place", "Shape", "generation", "shapes"]

Grid: TypeAlias = tuple[int, int, int]
"""Frames, rows and columns of video tokens."""


@dataclass(frozen=True)
class Place:
    """The part of a model that is measured on a kind of device.

    Attributes:
        grid: video tokens.
        text: text tokens.
        blocks: built of each of the model's lists.
    """

    grid: Grid
    text: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        build: makes the model with the given number of blocks in each of its lists.
        blocks: of the whole model, in each list; a `Place` has the same share of every list.
        arguments: (place, dtype) -> the arguments of a call by name, on the default device.
        timestep: the argument that changes from call to call; by how much; its first value.
        cpu, gpu: the part that is measured there.
        layout: for `diffusers_hook.enable`, where it does not follow from the model's class.
    """

    build: Callable[..., nn.Module]
    blocks: tuple[int, ...]
    arguments: Callable[[Place, torch.dtype], dict[str, Any]]
    timestep: tuple[str, float, float]
    cpu: Place
    gpu: Place
    layout: str | None = None

    def place(self, device: torch.device) -> Place:
        """The part that is measured on a device."""
        return self.gpu if device.type == "cuda" else self.cpu


_SMALL = (2, 15, 26)
"""780 tokens: what a CPU multiplies in seconds."""


def shapes() -> dict[str, Shape]:
    """The models by name; on a GPU with 81 frames at 480p and 720p, and 129 at 576 x 1024."""
    return {
        "Wan 2.1 1.3B": Shape(
            lambda layers: _wan(12, 8960, layers),
            (30,),
            _wan_call,
            ("timestep", -10.0, 999.0),
            cpu=Place(_SMALL, 64, (2,)),
            gpu=Place((21, 30, 52), 512, (10,)),
        ),
        "Wan 2.1 14B": Shape(
            lambda layers: _wan(40, 13824, layers),
            (40,),
            _wan_call,
            ("timestep", -10.0, 999.0),
            cpu=Place(_SMALL, 64, (1,)),
            gpu=Place((21, 45, 80), 512, (4,)),
        ),
        "Open-Sora 2.0": Shape(
            _open_sora,
            (19, 38),
            _open_sora_call,
            ("timesteps", -0.02, 0.98),
            cpu=Place(_SMALL, 64, (1, 2)),
            gpu=Place((33, 36, 64), 512, (2, 4)),
            layout="open_sora",
        ),
    }


def generation(
    model: nn.Module, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """The next call of the conditional branch of one generation, whenever it is called."""
    with torch.device(device):
        given = shape.arguments(shape.place(device), dtype)
    name, fall, first = shape.timestep
    steps = itertools.count()

    def call() -> object:
        step = next(steps)
        given[name] = torch.full((1,), first + fall * step, dtype=dtype, device=device)
        context: Any = getattr(model, "cache_context", lambda *_, **__: nullcontext())
        with context("cond", step_index=step):
            return model(**given)

    return call


def _wan(heads: int, ffn: int, layers: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    model: nn.Module = WanTransformer3DModel(
        num_attention_heads=heads, ffn_dim=ffn, num_layers=layers
    )
    return model


def _wan_call(place: Place, dtype: torch.dtype) -> dict[str, Any]:
    frames, rows, columns = place.grid
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * rows, 2 * columns, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, place.text, 4096, dtype=dtype),
    }


def _open_sora(double: int, single: int) -> nn.Module:
    from .open_sora_stand_in import MMDiTModel

    model: nn.Module = MMDiTModel(
        hidden=3072, heads=24, depth=double, single=single, channels=64, text=4096, pooled=768,
        axes=(16, 56, 56),
    )  # fmt: skip
    return model


def _open_sora_call(place: Place, dtype: torch.dtype) -> dict[str, Any]:
    places = torch.cartesian_prod(*map(torch.arange, place.grid)).to(dtype)[None]
    return {
        "img": torch.randn(1, places.shape[1], 64, dtype=dtype),
        "img_ids": places,
        "txt": torch.randn(1, place.text, 4096, dtype=dtype),
        "txt_ids": torch.zeros(1, place.text, 3, dtype=dtype),
        "y_vec": torch.randn(1, 768, dtype=dtype),
    }
