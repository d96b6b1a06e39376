"""Products of a mixture of experts on a GPU: the kernels of :mod:`.gemm`, tiles in a schedule.

Tiles of rows never cross from one expert to the next. How many there are depends on the routing,
but a bound does not: that many are launched, and those beyond the last have nothing to do. The
schedule is computed on the GPU, by one launch that also brings each row the scale of its token, so
that no step waits for it and a CUDA graph can hold all of them.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..packed_experts import PackedExperts
from . import bound
from .gemm import RowTiles, launch_eight_bits, launch_sixteen_bits
from .launch import launch, zeroed
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
    (y,) = bound.results(
        experts.together,
        (tokens, rows, offsets, bias),
        ("experts", activation_format, how),
        lambda: (_product(tokens, rows, offsets, experts, bias, activation_format, how),),
    )
    return y


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
    count, features = len(tokens if rows is None else rows), experts.shape[1]
    y = zeroed(tokens.new_empty(count, features))
    rows, bias = (None if each is None else readable(each) for each in (rows, bias))
    scale = None
    if activation_format == "none":
        if experts.together.rotation != "none":
            tokens = rotate_tokens(tokens)
        x = readable_rows(tokens)
    else:
        x, scale = quantize_tokens(tokens, experts.together, activation_format, how)
    table, scale = _row_tiles(offsets, count, how.plan.tokens, rows, scale)
    tiles = RowTiles(table, rows)
    if how.eight_bits:
        assert scale is not None, "8-bit tokens have scales"
        launch_eight_bits(x, scale, experts.together, bias, y, how.plan, None, tiles)
    else:
        launch_sixteen_bits(x, scale, experts.together, bias, y, how.plan, None, how.exact, tiles)
    return y


@triton.jit(do_not_specialize=["experts"])
def _schedule_kernel(
    p_offsets,
    p_rows,
    p_scale,
    p_tiles,
    p_row_scale,
    experts,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile's expert, first row and end, and the scales of its rows. Grid (tiles,)."""
    tile = tl.program_id(0)
    o_expert = tl.arange(0, EXPERTS)
    m_expert = o_expert < experts
    first = tl.load(p_offsets + o_expert, mask=m_expert, other=0)
    end = tl.load(p_offsets + o_expert + 1, mask=m_expert, other=0)
    of_expert = (end - first + TILE - 1) // TILE
    tiles_before = tl.cumsum(of_expert, 0) - of_expert
    row = first + (tile - tiles_before) * TILE
    # at most one expert has this tile: the sums are its numbers, or 0
    own = m_expert & (tile >= tiles_before) & (row < end)
    row = tl.sum(tl.where(own, row, 0), 0)
    end = tl.sum(tl.where(own, end, 0), 0)
    tl.store(p_tiles + 3 * tile, tl.sum(tl.where(own, o_expert, 0), 0))
    tl.store(p_tiles + 3 * tile + 1, row)
    tl.store(p_tiles + 3 * tile + 2, end)
    if p_row_scale is not None:
        o_row = row + tl.arange(0, TILE)
        o_token = tl.load(p_rows + o_row, mask=o_row < end, other=0)
        tl.store(p_row_scale + o_row, tl.load(p_scale + o_token), mask=o_row < end)


def _row_tiles(
    offsets: torch.Tensor,
    count: int,
    tile: int,
    rows: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The schedule of R rows that are sorted by expert, and their scales.

    Args:
        offsets: int64 [E + 1], ascending in 0..R.
        count: R, at least 1.
        tile: rows of a tile, a power of two.
        rows: int64 [R], the token of each row, contiguous; None: row i is of token i.
        scale: float32 [T], scales of tokens, or None.

    Returns:
        (the table of :class:`.gemm.RowTiles`, int64 [tiles, 3], whose shape depends on E, R and
        `tile` only; float32 [R] or None): rows of no expert have any scale.
    """
    experts = len(offsets) - 1
    most = min(count, (count + experts * (tile - 1)) // tile)
    table = torch.empty(most, 3, dtype=torch.int64, device=offsets.device)
    own_scales = rows is not None and scale is not None
    row_scale = torch.empty(count, device=offsets.device) if own_scales else None
    gathered = (rows, scale) if own_scales else (None, None)
    launch(
        _schedule_kernel,
        (most,),
        (readable(offsets), *gathered, table, row_scale, experts),
        {"EXPERTS": 1 << (experts - 1).bit_length(), "TILE": tile},
        num_warps=1,
    )
    return table, row_scale if own_scales else scale


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
