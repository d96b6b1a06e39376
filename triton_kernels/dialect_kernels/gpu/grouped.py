"""Products of a mixture of experts on a GPU: the kernels of :mod:`.gemm`, tiles in a schedule.

Tiles of rows never cross from one expert to the next. How many there are depends on the routing,
but a bound does not: that many are launched, and those beyond the last have nothing to do. The
schedule is computed on the GPU, so that no step waits for it and a CUDA graph can hold all of them.
"""

from __future__ import annotations

import torch

from ..packed_experts import PackedExperts
from .gemm import RowTiles, launch_eight_bits, launch_sixteen_bits
from .layout import readable, readable_rows
from .linear import Route, compiled_for, covers, first_of_each_route, quantize_tokens, route
from .rotation import rotate_tokens
from .tuning import for_experts

__all__ = ["grouped_linear", "warm_up"]


def grouped_linear(
    tokens: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    experts: PackedExperts,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
) -> torch.Tensor:
    """See :class:`~dialect_kernels.backend.Backend`; never waits for the GPU.

    Each token is quantized once, whatever the number of its rows. Nothing checks that `rows` and
    `offsets` lie in their ranges.
    """
    count = len(tokens if rows is None else rows)
    if count == 0 or experts.shape[1] == 0:
        return tokens.new_zeros(count, experts.shape[1])
    how = _route(count, experts, activation_format, tokens.dtype, accumulation)
    return _product(tokens, rows, offsets, experts, bias, activation_format, how)


def warm_up(
    experts: PackedExperts,
    activation_format: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    """Compile every kernel that products with these experts can need, by running it.

    Experts of the same shapes share their kernels: only the first of them cost time.

    Args:
        experts: E packed weights [N, K].
        activation_format: ``"dialect"``, ``"fp8"`` or ``"none"``.
        dtype: of the tokens to come.
        bias_dtype: of the bias, if there is one.
    """
    count, features, columns = experts.shape
    p = experts.together
    facts = (count, *compiled_for(p), bias_dtype, dtype)
    x = torch.zeros(1, columns, dtype=dtype, device=p.device)
    if (*facts, activation_format) in _warm or not covers(x, p, activation_format, "default"):
        return
    bias = None
    if bias_dtype is not None:
        bias = torch.zeros(count, features, dtype=bias_dtype, device=p.device)
    offsets = torch.ones(count + 1, dtype=torch.int64, device=p.device)
    offsets[0] = 0
    each = first_of_each_route((features, columns), activation_format, dtype, p.device)
    routes = {_route(rows * count, experts, activation_format, dtype, "default") for rows in each}
    for how in routes:
        for rows in (None, torch.zeros(1, dtype=torch.int64, device=p.device)):
            _product(x, rows, offsets, experts, bias, activation_format, how)
    _warm.add((*facts, activation_format))


_warm: set[tuple[object, ...]] = set()


def _product(
    tokens: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    experts: PackedExperts,
    bias: torch.Tensor | None,
    activation_format: str,
    how: Route,
) -> torch.Tensor:
    """:func:`grouped_linear` of at least one row, by a route."""
    count = len(tokens if rows is None else rows)
    y = tokens.new_zeros(count, experts.shape[1])
    rows, bias = (None if each is None else readable(each) for each in (rows, bias))
    tiles = RowTiles(_row_tiles(offsets, count, how.plan.tokens), rows)
    if activation_format == "none":
        if experts.together.rotation != "none":
            tokens = rotate_tokens(tokens)
        tokens = readable_rows(tokens)
        launch_sixteen_bits(
            tokens, None, experts.together, bias, y, how.plan, None, how.exact, tiles
        )
        return y
    q, scale = quantize_tokens(tokens, experts.together, activation_format, how)
    scale = scale if rows is None else scale[rows]
    if how.eight_bits:
        launch_eight_bits(q, scale, experts.together, bias, y, how.plan, None, tiles)
    else:
        launch_sixteen_bits(q, scale, experts.together, bias, y, how.plan, None, how.exact, tiles)
    return y


def _row_tiles(offsets: torch.Tensor, rows: int, tile: int) -> torch.Tensor:
    """The schedule of R rows that are sorted by expert, see :class:`.gemm.RowTiles`.

    Args:
        offsets: int64 [E + 1], ascending in 0..R.
        rows: R.
        tile: rows of a tile.

    Returns:
        int64 [tiles, 3]; its shape depends on E, R and `tile` only.
    """
    count = len(offsets) - 1
    most = min(rows, (rows + count * (tile - 1)) // tile)
    of_expert = (offsets.diff() + (tile - 1)) // tile
    ends = of_expert.cumsum(0)
    number = torch.arange(most, device=offsets.device)
    expert = torch.searchsorted(ends, number, right=True)
    used = expert < count
    expert = expert.clamp(max=count - 1)
    first = offsets[expert] + (number - ends[expert] + of_expert[expert]) * tile
    table = torch.stack([expert, first, offsets[expert + 1]], dim=1)
    return table * used[:, None]


def _route(
    rows: int,
    experts: PackedExperts,
    activation_format: str,
    dtype: torch.dtype,
    accumulation: str,
) -> Route:
    """How an expert with its share of the rows is multiplied: in registers, with one split."""
    count, features, columns = experts.shape
    each, shape = -(-rows // count), (features, columns)
    how = route(each, shape, activation_format, dtype, experts.device, accumulation)
    return how._replace(plan=for_experts(how.plan))
