"""The format in plain torch: exact, boring, and what every kernel is compared with.

Everything here follows docs/reference/format.md section by section. The functions of the public API
have the same names and signatures as in :mod:`dialect_kernels`; they return the same bytes and, in
the accumulation mode ``exact``, the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .arguments import (
    as_tokens,
    check_dtype,
    check_group,
    check_linear,
    check_matrix,
    check_quantize,
    check_semantic,
)
from .arithmetic import (
    block_exponents,
    blocks_of,
    double_power_of_two,
    flat_table,
    padded_columns,
    power_of_two,
    row_chunks,
    row_exponents,
    row_scale,
    take,
)
from .backend import BlockGrid
from .baselines import quantize_fp8
from .formatbook import (
    CELLS,
    DIALECT_FP4,
    E4M3_WINDOW,
    LARGEST_HALF_UNIT,
    NAN_ROW,
    SMALLEST_RANGE,
    Formatbook,
    Rotation,
)
from .gptq import feed_back_columns
from .packed import PackedTensor, check_block_size, pack_codes
from .rotation import check_rotation, energy_of_rotation, rotate_activation, rotate_weight

__all__ = [
    "blocks_below_window",
    "dialect_linear",
    "feed_back",
    "group_variants",
    "pack_rounded",
    "quantize",
    "round_activation",
    "rounding_loss",
    "semantic_linear",
    "variant_costs",
]


def quantize(
    x: torch.Tensor,
    book: Formatbook = DIALECT_FP4,
    block_size: int = 32,
    rule: str = "mse",
    window: int | None = None,
    name: str = "tensor",
    rotation: Rotation = "none",
) -> PackedTensor:
    """Quantize a matrix to a dialect format, in blocks along its columns.

    Args:
        x: float32, bfloat16 or float16 [N, K]; computed as float32. K is padded with zeros to
            whole blocks.
        book: the formatbook.
        block_size: 16, 32 or 64.
        rule: how a block's dialect is selected: ``"mse"`` (exact squared error; BlockDialect for
            weights), ``"two_stage"`` (BlockDialect for activations; DialectFP4 only) or ``"lut"``
            (SemanticDialect; 32-dialect book only).
        window: largest delta below the row's exponent, 0..13 for DialectFP4 and 0..7 for the
            32-dialect book (whose meta byte has 3 bits for it), default the largest (ours).
        name: what error messages call the tensor.
        rotation: ``"hadamard_32"`` quantizes :func:`~dialect_kernels.rotation.rotate_weight` of
            `x` (ours); products with the packed tensor rotate their activations too.

    Returns:
        The packed tensor [N, K].

    Raises:
        ValueError: if shape, dtype, block size, rule, window or rotation are not allowed, `x` holds
            NaN or Inf (naming the first position), or a row overflows when it is rotated.
    """
    window = check_quantize(x, book, block_size, rule, window, name, rotation)
    return pack_rounded(x, book, block_size, rule, window, rotation)


def pack_rounded(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int,
    rotation: Rotation,
) -> PackedTensor:
    """As :func:`quantize`, for arguments that have been checked."""
    rounded = _round(rotate_weight(x, rotation), book, block_size, rule, window)
    return PackedTensor(
        pack_codes(rounded.codes),
        (rounded.delta << book.id_bits) | rounded.dialect,
        rounded.row_exponent,
        (x.shape[0], x.shape[1]),
        book,
        block_size,
        rotation,
    )


def round_activation(
    x: torch.Tensor,
    book: Formatbook = DIALECT_FP4,
    block_size: int = 32,
    group: torch.Tensor | None = None,
    rotation: Rotation = "none",
) -> torch.Tensor:
    """Round activations per token as ``dialect_linear`` and ``semantic_linear`` do in flight.

    Args:
        x: float32, bfloat16 or float16 [..., K]; every row is a token.
        book: the weight's formatbook; its online rule selects the dialects (``two_stage`` for
            DialectFP4: BlockDialect; ``lut`` for the 32-dialect book: SemanticDialect).
        block_size: the weight's block size.
        group: integers [...]: tokens with the same number >= 0 share one variant per block of
            channels (SeDA; SemanticDialect), a token with -1 is free. 32-dialect book only.
        rotation: the weight's; :func:`~dialect_kernels.rotation.rotate_activation` of `x` is
            rounded then (ours).

    Returns:
        float32 [..., K], the rounded values; a token with NaN or Inf, or one that overflows when
        it is rotated, is all NaN.

    Raises:
        ValueError: if dtype, block size, group or rotation are not allowed.
    """
    check_dtype(x, "x")
    check_block_size(block_size)
    check_rotation(rotation, x.shape[-1], "x")
    tokens = rotate_activation(as_tokens(x), rotation)
    if group is not None:
        check_group(group, x.shape[:-1], book)
        group = group.flatten()
    rounded = _round_tokens(tokens, book, block_size, group)
    half_units = _signed_half_units(rounded, book, block_size).to(torch.float32)
    relative = power_of_two(4 - rounded.delta.to(torch.int32))
    scale = row_scale(rounded.row_exponent)
    values = half_units.view(*relative.shape, block_size) * relative[:, :, None]
    values = values.flatten(1)[:, : x.shape[-1]] * scale[:, None]
    return values.view(x.shape)


def feed_back(
    block: torch.Tensor,
    factor: torch.Tensor,
    grid: BlockGrid,
    book: Formatbook,
    errors: torch.Tensor,
) -> torch.Tensor:
    """Round one block of columns by rule ``gptq``, as :func:`~.gptq.feed_back_columns`.

    Args:
        block: float32 [B, N], columns of a weight, or [E, B, N], those of E weights; it keeps what
            was rounded.
        factor: float32 [B, B], or [E, B, B].
        grid: of the N rows, or of E times N.
        book: the formatbook.
        errors: float32, of the shape of `block`; written to.

    Returns:
        The codes, uint8, of the shape of `block`.
    """
    half_units = flat_table(book, "rounded_half_units", torch.float32, block.device)
    rows = *block.shape[:-2], block.shape[-1]
    table, quarter, unit = (
        part.view(rows) for part in (grid.dialect * CELLS, grid.quarter, grid.unit)
    )

    def cells(x: torch.Tensor, quarter: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        cell = (x.abs() * quarter).clamp_(max=CELLS - 1).to(torch.int32)
        return cell.add_(table)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return take(half_units, cells(x, quarter, table)).mul_(unit).copysign_(x)

    feed_back_columns(block, factor, errors, rounded)
    every = cells(block, quarter.unsqueeze(-2), table.unsqueeze(-2))
    index = take(flat_table(book, "index_lut", torch.uint8, block.device), every)
    index.masked_fill_(unit.unsqueeze(-2) == 0, 0)
    sign = ((block < 0) & (index > 0)).to(torch.uint8) << 3
    return index | sign


def blocks_below_window(
    x: torch.Tensor, block_size: int = 32, window: int = E4M3_WINDOW
) -> torch.Tensor:
    """Count, per row, the non-zero blocks that lie more than `window` binades below the row's top.

    Such a block is rounded on the grids at the window's edge (ours, section 2).

    Args:
        x: finite float32, bfloat16 or float16 [N, K].
        block_size: 16, 32 or 64.
        window: 0..13.

    Returns:
        int64 [N].
    """
    check_matrix(x, "x")
    check_block_size(block_size)
    largest = blocks_of(x, block_size).abs().amax(dim=-1)
    exponent = block_exponents(largest)
    gap = row_exponents(exponent)[:, None] - exponent
    below: torch.Tensor = (gap > window) & (largest > 0)
    return below.sum(dim=1)


def rounding_loss(x: torch.Tensor, p: PackedTensor) -> torch.Tensor:
    """The energy of a matrix, and of the error that rounding it to `p` made (ours).

    A rotated tensor is compared with the rotated matrix, whose energy is 32 times that of `x`; the
    result is that of `x`.

    Args:
        x: float32, bfloat16 or float16 [N, K].
        p: packed tensor [N, K].

    Returns:
        float64 [N, 2]: the sums of ``x**2`` and of ``(x - p)**2`` in every row.
    """
    exact = rotate_weight(x, p.rotation).to(torch.float64)
    error = exact - p.dequantize().to(torch.float64)
    energies = torch.stack([exact.square().sum(dim=1), error.square().sum(dim=1)], dim=1)
    return energies / energy_of_rotation(p.rotation)


@dataclass(frozen=True)
class _Rounded:
    """A rounded matrix before packing; shapes for N rows, Kp padded columns, blocks of B."""

    codes: torch.Tensor  # uint8 [N, Kp]
    dialect: torch.Tensor  # uint8 [N, Kp/B]
    delta: torch.Tensor  # uint8 [N, Kp/B]
    row_exponent: torch.Tensor  # int8 [N]


def _round(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int,
    variants: torch.Tensor | None = None,
) -> _Rounded:
    """Round a finite matrix, a chunk of rows at a time (rows are independent).

    `variants` [N, Kp/B] holds the variant that a block must take, -1 where the rule decides.
    """
    rows, columns = x.shape
    padded = padded_columns(columns, block_size)
    out = _Rounded(
        torch.empty(rows, padded, dtype=torch.uint8, device=x.device),
        torch.empty(rows, padded // block_size, dtype=torch.uint8, device=x.device),
        torch.empty(rows, padded // block_size, dtype=torch.uint8, device=x.device),
        torch.empty(rows, dtype=torch.int8, device=x.device),
    )
    for part in row_chunks(rows, padded):
        chosen = None if variants is None else variants[part]
        _round_rows(_scaled(x[part], block_size, window), book, rule, chosen, out, part)
    return out


@dataclass(frozen=True)
class _Scaled:
    """Rows cut into blocks and scaled by their effective exponents; n rows, blocks of B."""

    blocks: torch.Tensor  # float32 [n, Kp/B, B]
    quarters: torch.Tensor  # float32 [n, Kp/B, B], 4 m
    cell: torch.Tensor  # int32 [n, Kp/B, B], k
    largest_cell: torch.Tensor  # int32 [n, Kp/B]
    delta: torch.Tensor  # int32 [n, Kp/B]
    row_exponent: torch.Tensor  # int32 [n]


def _scaled(x: torch.Tensor, block_size: int, window: int) -> _Scaled:
    blocks = blocks_of(x, block_size)
    magnitude = blocks.abs()
    exponent = block_exponents(magnitude.amax(dim=-1))
    row_exponent = row_exponents(exponent)
    delta = (row_exponent[:, None] - exponent).clamp(max=window)
    effective = row_exponent[:, None] - delta
    quarters = magnitude * power_of_two(2 - effective)[:, :, None]
    cell = quarters.clamp(max=CELLS - 1).to(torch.int32)  # truncation is floor, 4 m >= 0
    return _Scaled(blocks, quarters, cell, cell.amax(dim=-1), delta, row_exponent)


def _round_rows(
    x: _Scaled,
    book: Formatbook,
    rule: str,
    variants: torch.Tensor | None,
    out: _Rounded,
    part: slice,
) -> None:
    if rule == "mse":
        dialect = _select_by_exact_error(x.quarters, x.cell, book)
    elif rule == "two_stage":
        dialect = _select_in_two_stages(x.cell, x.largest_cell, book)
    else:
        dialect = _select_by_lut(x.cell, x.largest_cell, book)
    if variants is not None:
        constrained = _first_dialect(x.largest_cell, book) + variants
        dialect = torch.where(variants >= 0, constrained, dialect)

    zero_block = x.largest_cell == 0
    dialect = dialect.masked_fill_(zero_block, 0)
    delta = x.delta.masked_fill(zero_block, 0)
    index_lut = flat_table(book, "index_lut", torch.uint8, dialect.device)
    index = take(index_lut, (dialect * CELLS)[:, :, None] + x.cell)
    sign = ((x.blocks < 0) & (index > 0)).to(torch.uint8) << 3

    out.codes[part] = (index | sign).flatten(1)
    out.dialect[part] = dialect.to(torch.uint8)
    out.delta[part] = delta.to(torch.uint8)
    out.row_exponent[part] = x.row_exponent.to(torch.int8)


def _round_tokens(
    tokens: torch.Tensor, book: Formatbook, block_size: int, group: torch.Tensor | None = None
) -> _Rounded:
    """Round [T, K] with the online rule and window 13; rows with NaN or Inf get R = -128."""
    finite = tokens.isfinite().all(dim=1)
    clean = torch.where(finite[:, None], tokens, torch.zeros_like(tokens))
    variants = None
    if group is not None:
        costs = variant_costs(clean, book, block_size)
        variants = group_variants(costs, torch.where(finite, group, -1))
    rounded = _round(clean, book, block_size, book.online_rule, E4M3_WINDOW, variants)
    rounded.row_exponent.masked_fill_(~finite, NAN_ROW)
    return rounded


def variant_costs(tokens: torch.Tensor, book: Formatbook, block_size: int) -> torch.Tensor:
    """The LUT error of every variant of each block's range, int32 [T, Kp/B, variants]."""
    blocks = padded_columns(tokens.shape[1], block_size) // block_size
    shape = (tokens.shape[0], blocks, book.variants)
    out = torch.empty(shape, dtype=torch.int32, device=tokens.device)
    for part in row_chunks(*tokens.shape):
        x = _scaled(tokens[part], block_size, E4M3_WINDOW)
        out[part] = _lut_costs(x.cell, x.largest_cell, book)
    return out


def group_variants(costs: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """The variant that each block's group chooses: the least sum of costs, ties to the smallest.

    Args:
        costs: int32 [T, blocks, variants].
        group: integers [T]; -1 for a free token.

    Returns:
        int8 [T, blocks]; -1 for a free token.
    """
    member = (group >= 0).nonzero()[:, 0]
    numbers, position = torch.unique(group[member], return_inverse=True)
    sums = costs.new_zeros(numbers.numel(), *costs.shape[1:], dtype=torch.int64)
    sums.index_add_(0, position, costs[member].to(torch.int64))
    out = torch.full(costs.shape[:2], -1, dtype=torch.int8, device=costs.device)
    out[member] = sums.argmin(dim=-1).to(torch.int8)[position]
    return out


def _select_by_exact_error(
    quarters: torch.Tensor, cell: torch.Tensor, book: Formatbook
) -> torch.Tensor:
    """Rule ``mse``: argmin over all ids of ``C = sum h (h - 4 m)``, ties to the lowest id.

    Per block, the elements are first collected by cell: with ``n_k`` elements in cell k whose
    scaled magnitudes sum to ``s_k = sum 4 m``, ``C_id = sum_k h_id(k)**2 n_k - h_id(k) s_k``. Every
    term and partial sum is exact in float64 (at most 38 bits), in whatever order they are added.
    """
    rows, count, block_size = cell.shape
    index = cell.view(-1, block_size).to(torch.int64)
    values = quarters.view(-1, block_size).to(torch.float64)
    per_cell = values.new_zeros(2, rows * count, CELLS)
    per_cell[0].scatter_add_(1, index, torch.ones_like(values))
    per_cell[1].scatter_add_(1, index, values)
    rounded = flat_table(book, "rounded_half_units", torch.float64, cell.device).view(-1, CELLS)
    cost = per_cell[0] @ rounded.square().T - per_cell[1] @ rounded.T
    return cost.argmin(dim=1).view(rows, count).to(torch.int32)


def _select_in_two_stages(
    cell: torch.Tensor, largest_cell: torch.Tensor, book: Formatbook
) -> torch.Tensor:
    """Rule ``two_stage``: the pair by M, then the larger count of beneficial cells; ties even."""
    beneficial = flat_table(book, "beneficial_cells", torch.int32, cell.device)
    even = 2 * (LARGEST_HALF_UNIT - _range(largest_cell))
    row = (even * CELLS)[:, :, None] + cell
    count_even = take(beneficial, row).sum(dim=-1)
    count_odd = take(beneficial, row + CELLS).sum(dim=-1)
    odd_wins: torch.Tensor = count_odd > count_even
    return even + odd_wins.to(torch.int32)


def _select_by_lut(
    cell: torch.Tensor, largest_cell: torch.Tensor, book: Formatbook
) -> torch.Tensor:
    """Rule ``lut``: the variant of M with the smallest summed LUT error, ties to the smallest."""
    cost = _lut_costs(cell, largest_cell, book)
    return _first_dialect(largest_cell, book) + cost.argmin(dim=-1).to(torch.int32)


def _lut_costs(cell: torch.Tensor, largest_cell: torch.Tensor, book: Formatbook) -> torch.Tensor:
    """The summed LUT error of every variant of each block's M, [n, Kp/B, variants]."""
    error = flat_table(book, "error_lut", torch.int32, cell.device)
    row = (_first_dialect(largest_cell, book) * CELLS)[:, :, None] + cell
    return torch.stack(
        [take(error, row + v * CELLS).sum(dim=-1) for v in range(book.variants)], dim=-1
    )


def _first_dialect(largest_cell: torch.Tensor, book: Formatbook) -> torch.Tensor:
    """The id of variant 0 of each block's M."""
    return book.variants * (LARGEST_HALF_UNIT - _range(largest_cell))


def _range(largest_cell: torch.Tensor) -> torch.Tensor:
    """M, the block's largest half-unit."""
    return ((largest_cell + 1) >> 1).clamp(SMALLEST_RANGE, LARGEST_HALF_UNIT)


def dialect_linear(
    x: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None = None,
    activation_format: str = "dialect",
    accumulation: str = "default",
) -> torch.Tensor:
    """``x @ p.T + bias`` in the accumulation mode ``exact``, whatever `accumulation` says.

    Block sums are formed exactly, scaled and added in float32, blocks ascending; the row and token
    scales are applied with one rounding to float32, the bias is added in float32 and the result is
    rounded once to x's dtype.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        p: packed weight [N, K]; the activations of a rotated one are rotated before they are
            rounded.
        bias: [N] or None; taken as float32.
        activation_format: ``"dialect"`` (W4A4; BlockDialect), ``"fp8"`` (W4A8; ours) or ``"none"``
            (W4A16; ours).
        accumulation: ``"default"`` or ``"exact"``.

    Returns:
        [..., N] in x's dtype. With ``"dialect"`` and ``"fp8"`` a token that holds NaN or Inf, or
        overflows when it is rotated, gives a row of NaN; ``"none"`` is plain IEEE arithmetic.

    Raises:
        ValueError: if shapes, dtypes or options do not fit.
    """
    check_linear(x, p, bias, activation_format, accumulation)
    tokens = rotate_activation(as_tokens(x), p.rotation)
    if activation_format == "none":
        tokens = tokens.to(x.dtype)
    accumulate = {"dialect": _linear_dialect, "fp8": _linear_fp8, "none": _linear_none}
    y = accumulate[activation_format](tokens, p)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype).view(*x.shape[:-1], p.shape[0])


def semantic_linear(
    x: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None = None,
    salient: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ p.T + bias`` with decomposed salient tokens and grouped dialects (SemanticDialect).

    ``Q1 = round(x)``; a salient token t adds ``round(x_t - Q1_t) @ p.T``, with exponents and
    dialects of its own that no group constrains. Both are accumulated in the mode ``exact``, added
    in float32 before the bias, and rounded once (formulas: ours).

    Args:
        x: float32, bfloat16 or float16 [B, T, K] or [T, K]; B samples of T tokens.
        p: packed weight [N, K]; of a rotated one, `x` is the rotated activation in all that
            follows.
        bias: [N] or None; taken as float32.
        salient: int64 [B, S] or [S], the tokens of each sample that are decomposed; -1 entries are
            ignored, and a token named twice counts once.
        group: integers [B, T] or [T]: tokens of a sample with the same number >= 0 share one
            variant per block of channels, a token with -1 is free. 32-dialect book only.

    Returns:
        [B, T, N] or [T, N] in x's dtype. A token that holds NaN or Inf gives a row of NaN.

    Raises:
        ValueError: if shapes, dtypes or options do not fit.
    """
    check_semantic(x, p, bias, salient, group)
    tokens = rotate_activation(as_tokens(x), p.rotation)
    rows = _salient_rows(salient, x)
    groups = None if group is None else _group_numbers(group)
    y = _linear_dialect(tokens, p, groups)
    if rows.numel():
        rounded = round_activation(tokens, p.book, p.block_size, groups)[rows]
        y[rows] += _linear_dialect(tokens[rows].to(torch.float32) - rounded, p)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype).view(*x.shape[:-1], p.shape[0])


def _salient_rows(salient: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The rows of ``as_tokens(x)`` that `salient` names, each once, ascending; int64 [n]."""
    if salient is None:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    salient = salient if salient.dim() == 2 else salient[None]
    sample = torch.arange(salient.shape[0], device=salient.device)[:, None]
    rows = salient + sample * x.shape[-2]
    named: torch.Tensor = torch.unique(rows[salient >= 0])
    return named


def _group_numbers(group: torch.Tensor) -> torch.Tensor:
    """Group numbers [B * T] that no two samples share; -1 stays."""
    if group.dim() == 1:
        return group
    group = group.to(torch.int64)  # a narrow type has no room for other samples' numbers
    count = group.amax().clamp(min=0) + 1 if group.numel() else 1
    sample = torch.arange(group.shape[0], device=group.device)[:, None]
    return torch.where(group >= 0, group + sample * count, -1).flatten()


def _linear_dialect(
    tokens: torch.Tensor, p: PackedTensor, group: torch.Tensor | None = None
) -> torch.Tensor:
    rounded = _round_tokens(tokens, p.book, p.block_size, group)
    operand = _signed_half_units(rounded, p.book, p.block_size).to(torch.float64)
    y = _sum_blocks(operand, power_of_two(-rounded.delta.to(torch.int32)), p)
    exponent = rounded.row_exponent.to(torch.int64)[:, None] + p.row_exponent.to(torch.int64)
    y = (y.to(torch.float64) * double_power_of_two(exponent - 2)).to(torch.float32)
    return y.masked_fill(_nan_rows(rounded.row_exponent, p), torch.nan)


def _linear_fp8(tokens: torch.Tensor, p: PackedTensor) -> torch.Tensor:
    q, scale = quantize_fp8(tokens)
    padding = p.codes.shape[1] * 2 - p.shape[1]
    operand = F.pad(q.to(torch.float64), (0, padding))
    y = _sum_blocks(operand, None, p)
    weight_scale = double_power_of_two(p.row_exponent.to(torch.int64) - 1)
    y = (y.to(torch.float64) * (scale.to(torch.float64)[:, None] * weight_scale)).to(torch.float32)
    return y.masked_fill((p.row_exponent == NAN_ROW)[None, :], torch.nan)


def _linear_none(tokens: torch.Tensor, p: PackedTensor) -> torch.Tensor:
    """Products and block sums in float64, elements ascending; each block sum scaled to float32."""
    operand = F.pad(tokens.to(torch.float64), (0, p.codes.shape[1] * 2 - p.shape[1]))
    weight = p.signed_half_units().to(torch.float64)
    weight_scale = p.block_scale().to(torch.float64)
    y = torch.zeros(tokens.shape[0], p.shape[0], dtype=torch.float32, device=tokens.device)
    for block in range(weight_scale.shape[1]):
        block_sum = y.new_zeros(y.shape, dtype=torch.float64)
        for i in range(block * p.block_size, (block + 1) * p.block_size):
            block_sum += operand[:, i, None] * weight[None, :, i]
        y += (block_sum * weight_scale[None, :, block]).to(torch.float32)
    return y


def _sum_blocks(
    operand: torch.Tensor, operand_scale: torch.Tensor | None, p: PackedTensor
) -> torch.Tensor:
    """Sum of ``float32(block sum) * 2**-(deltas)`` in float32, blocks ascending, [T, N].

    Block sums are exact in float64 in any order: the operands (float64 [T, Kp]) have at most 18
    significant bits over a block, the weights four.
    """
    block_size = p.block_size
    weight = p.signed_half_units().to(torch.float64)
    weight_scale = power_of_two(-p.deltas().to(torch.int32))
    y = torch.zeros(operand.shape[0], p.shape[0], dtype=torch.float32, device=operand.device)
    for block in range(weight_scale.shape[1]):
        part = slice(block * block_size, (block + 1) * block_size)
        block_sum = (operand[:, part] @ weight[:, part].T).to(torch.float32)
        scale = weight_scale[None, :, block]
        if operand_scale is not None:
            scale = operand_scale[:, block, None] * scale
        y += block_sum * scale
    return y


def _nan_rows(row_exponent: torch.Tensor, p: PackedTensor) -> torch.Tensor:
    tokens: torch.Tensor = row_exponent == NAN_ROW
    return tokens[:, None] | (p.row_exponent == NAN_ROW)[None, :]


def _signed_half_units(rounded: _Rounded, book: Formatbook, block_size: int) -> torch.Tensor:
    """Signed half-units of unpacked codes, int8 [N, Kp]."""
    table = flat_table(book, "signed_half_units", torch.int8, rounded.codes.device)
    codes = rounded.codes.view(*rounded.dialect.shape, block_size)
    index = (rounded.dialect.to(torch.int32) * 16)[:, :, None] + codes
    return take(table, index).flatten(1)
