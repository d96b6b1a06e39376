"""AnyFlow: Wan's blocks, frames before channels in the input; FAR makes one chunk at a time."""

from __future__ import annotations

from ..grids import no_grid, patched_grid
from ..layout import Blocks, Layout, Stream
from .wan import BLOCK

__all__ = ["LAYOUTS"]

_MODULATION = (r"condition_embedder\.time_proj",)

LAYOUTS = (
    Layout(
        name="anyflow",
        models=("AnyFlowTransformer3DModel",),
        kinds=(Blocks(path="blocks", streams=BLOCK, attention="attn1"),),
        grid=patched_grid(axes="btchw"),
        modulation=_MODULATION,
    ),
    Layout(
        name="anyflow_far",
        models=("AnyFlowFARTransformer3DModel",),
        kinds=(
            Blocks(
                path="blocks",
                streams=tuple((pattern, Stream.CONTEXT) for pattern, _ in BLOCK),
                attention=None,
            ),
        ),
        grid=no_grid,
        modulation=_MODULATION,
        remark="it makes one chunk of frames after the other, with cached keys and a block mask",
    ),
)
