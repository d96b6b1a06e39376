"""Open-Sora 2.0's MMDiT: joint attention over text and video, text first; not in diffusers.

::

    double_blocks   | text |  and  | video ...... |   own layers, one attention over both
    single_blocks   | text | video ...... |           attention and MLP side by side

The projections are fused (``qkv``, ``linear1``) or not (``q_proj``, ``k_proj``, ``v_proj``,
``v_mlp``); either way ``linear2`` takes the attention's output and the MLP's, side by side. The
rotary embedding is applied inside the model's own ``attention(q, k, v, pe)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..grids import Grid, remembered
from ..layout import Blocks, Layout, LayoutError, Stream

__all__ = ["LAYOUTS"]


def _grid(model: nn.Module, arguments: Mapping[str, Any]) -> Grid:
    return _grid_of_ids(arguments["img_ids"])


@remembered
def _grid_of_ids(ids: torch.Tensor) -> Grid:
    """The grid of `img_ids`, [batch, video tokens, (frame, row, column)].

    Raises:
        LayoutError: if the tokens do not follow each other frame by frame and row by row.
    """
    batch, tokens, _ = ids.shape
    places = ids[0].float().cpu()
    # run lengths, not largest values: bfloat16 counts to 256 only
    plane = _first_run(places[:, 0])
    columns = min(plane, _first_run(places[:, 1]))
    if tokens % plane == 0 and plane % columns == 0:
        grid = Grid(batch, tokens // plane, plane // columns, columns)
        if _in_order(places.view(*grid.shape, 3)):
            return grid
    raise LayoutError(
        f"img_ids: the {tokens} tokens do not follow each other frame by frame and row by row; "
        "use the order of Open-Sora's own sampling"
    )


def _in_order(places: torch.Tensor) -> bool:
    """Whether [frames, rows, columns, 3] holds on each axis what changes along it, ascending."""
    frame, row, column = places.unbind(-1)
    same = (frame == frame[:, :1, :1], row == row[:1, :, :1], column == column[:1, :1])
    ascending = (frame.diff(dim=0) >= 0, row.diff(dim=1) >= 0, column.diff(dim=2) >= 0)
    return all(bool(holds.all()) for holds in (*same, *ascending))


def _first_run(ids: torch.Tensor) -> int:
    """How many entries at the start are equal."""
    changes = (ids != ids[0]).nonzero()
    return int(changes[0]) if len(changes) else len(ids)


_DOUBLE = Blocks(
    path="double_blocks",
    streams=(
        (r"img_attn\.([qkv]_proj|qkv|proj)", Stream.VIDEO),
        (r"img_mlp\.[02]", Stream.VIDEO),
        (r"txt_attn\.([qkv]_proj|qkv|proj)", Stream.TEXT),
        (r"txt_mlp\.[02]", Stream.TEXT),
    ),
    attention="",
    text="first",
)

_SINGLE = Blocks(
    path="single_blocks",
    streams=((r"linear[12]|[qk]_proj|v_mlp", Stream.JOINT),),
    attention="",
    text="first",
)

LAYOUTS = (
    Layout(
        name="open_sora",
        models=("MMDiTModel",),
        kinds=(_DOUBLE, _SINGLE),
        grid=_grid,
        timestep="timesteps",
        modulation=(
            r"double_blocks\.\d+\.(img|txt)_mod\.lin",
            r"single_blocks\.\d+\.modulation\.lin",
            r"final_layer\.adaLN_modulation\.1",
        ),
    ),
)
