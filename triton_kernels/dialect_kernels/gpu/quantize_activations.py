"""Activation quantizer: every token becomes an FP8 row that holds dialect values exactly.

    x [T, K] -> q E4M3 [T + S, Kp], scale float32 [T + S];  value = q * scale, scale = 2**(R - 5)

One program per output row. It reads the row twice, once for the row exponent R and once to round
it block by block (once in all, if the row fits into registers). Rows T + i are the residuals of
the salient tokens: their program rounds the token again and then rounds what was left of it.

Kp is K rounded up to whole blocks, the tail is zero. Columns leave in their natural order or in
that of the GEMM's operands (:mod:`.layout`), numbers as E4M3 or, for GPUs without FP8,
as bfloat16, which holds every E4M3 number.
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..arguments import check_matrix
from ..arithmetic import padded_columns
from ..formatbook import DIALECT_FP4, E4M3_WINDOW, Formatbook, Rotation
from ..packed import check_block_size
from ..rotation import check_rotation
from .launch import launch, zeroed
from .layout import (
    RowConfig,
    aligned,
    block_columns,
    clear,
    interpreted,
    operand_columns,
    readable,
    readable_rows,
    row_config,
    written_dtype,
)
from .rotation import load_activation
from .rounding import (
    block_largest,
    block_row,
    book_table,
    bytes_of_words,
    e4m3_values,
    e4m3_words,
    four,
    look_up,
    power_of_two,
    row_exponent,
    row_scale,
    scale_blocks,
    select_by_variant,
    select_online,
    variant_errors,
)

__all__ = ["quantize_activation"]

_WINDOW = tl.constexpr(E4M3_WINDOW)


@triton.jit
def _load_totals(e1, e2, e3, p_totals, first, columns, label, B: tl.constexpr):
    """The group's errors instead of the block's own, unless the token is free."""
    o_block = first // B + tl.arange(0, e1.shape[0])
    m_block = o_block < tl.where(label >= 0, tl.cdiv(columns, B), 0)
    p_total = p_totals + (tl.maximum(label, 0).to(tl.int64) * tl.cdiv(columns, B) + o_block) * 3
    return (
        tl.where(m_block, tl.load(p_total, mask=m_block, other=0), e1),
        tl.where(m_block, tl.load(p_total + 1, mask=m_block, other=0), e2),
        tl.where(m_block, tl.load(p_total + 2, mask=m_block, other=0), e3),
    )


@triton.jit
def _round(
    b_x,
    largest,
    first,
    columns,
    exponent,
    label,
    p_totals,
    p_book,
    DIALECTS: tl.constexpr,
    B: tl.constexpr,
    GROUPED: tl.constexpr,
    ASM: tl.constexpr,
):
    """E4M3 bytes of a chunk of a finite row by the book's online rule, int32 [G, B / 4]."""
    scale, delta, largest_cell = scale_blocks(largest, exponent, _WINDOW, ASM)
    row = block_row(largest_cell)
    x = four(b_x)
    differences, indices = look_up(x, scale, row, p_book, DIALECTS, ASM)
    if GROUPED:
        e1, e2, e3 = variant_errors(differences, B)
        e1, e2, e3 = _load_totals(e1, e2, e3, p_totals, first, columns, label, B)
        variant = select_by_variant(e1, e2, e3)
    else:
        variant = select_online(differences, B, DIALECTS)
    return e4m3_words(x, indices, delta, row, variant, p_book, DIALECTS, ASM)


@triton.jit
def _store(p_out, words, first, padded, B: tl.constexpr, CHUNK: tl.constexpr, OPERANDS):
    """Write the bytes of a chunk, four at a time, or the numbers themselves."""
    if p_out.dtype.element_ty == tl.bfloat16:
        o_column = block_columns(first, B, CHUNK)
        o_place = operand_columns(o_column, padded) if OPERANDS else o_column
        b_q = e4m3_values(bytes_of_words(words)).to(tl.bfloat16)
        tl.store(p_out + o_place, b_q, mask=o_column < padded)
    else:
        o_column = block_columns(first, B, CHUNK, 4)
        o_place = operand_columns(o_column, padded) if OPERANDS else o_column
        p_words = p_out.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(p_words + o_place // 4, words, mask=o_column < padded)


@triton.jit
def _source(
    p_row,
    first,
    columns,
    residual,
    exponent,
    label,
    p_totals,
    p_book,
    DIALECTS: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    SALIENT: tl.constexpr,
    GROUPED: tl.constexpr,
    ROTATED: tl.constexpr,
    ASM: tl.constexpr,
):
    """The numbers that a row's program rounds: a chunk of the token or of its residual.

    A token with NaN or Inf has no residual and is returned as it is.
    """
    b_x = load_activation(p_row, first, columns, B, CHUNK, ROTATED)
    if SALIENT:  # noqa: SIM102 (decided while compiling)
        if residual:
            words = _round(
                b_x, block_largest(b_x), first, columns, exponent, label, p_totals, p_book,
                DIALECTS, B, GROUPED, ASM,
            )  # fmt: skip
            b_x = b_x - e4m3_values(bytes_of_words(words)) * power_of_two(exponent - 5)  # exact
    return b_x


# Longer than other functions by its 22 arguments, one a line, and by two chains of passes over the
# row that share a decomposed token: a helper would have to return its registers.
@triton.jit(do_not_specialize=["tokens", "columns", "padded", "stride", "zeros"])
def _quantize_activation_kernel(
    p_x,
    p_q,
    p_scale,
    p_salient,
    p_group,
    p_totals,
    p_book,
    p_zeros,
    tokens,
    columns,
    padded,
    stride,
    zeros,
    DIALECTS: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    OPERANDS: tl.constexpr,
    SALIENT: tl.constexpr,
    GROUPED: tl.constexpr,
    ROTATED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
):
    padded = padded // 16 * 16
    if ALIGNED:
        columns = columns // 16 * 16
        stride = stride // 16 * 16
    i_row = tl.program_id(0)
    clear(p_zeros, zeros)
    token = i_row
    residual = i_row >= tokens
    if SALIENT:  # noqa: SIM102 (decided while compiling)
        if residual:
            token = tl.load(p_salient + (i_row - tokens)).to(tl.int32)
    used = (token >= 0) & (token < tokens)
    token = tl.where(used, token, 0)
    p_row = p_x + token.to(tl.int64) * stride
    p_out = p_q + i_row.to(tl.int64) * padded
    label = -1
    if GROUPED:
        label = tl.load(p_group + token)
        label = tl.where(label < tokens, label, -1)
    own_label = tl.where(residual, -1, label)

    first_exponent = 0
    if SALIENT:  # noqa: SIM102 (decided while compiling)
        if residual:
            largest = tl.zeros((CHUNK // B,), tl.int32)
            for first in range(0, columns, CHUNK):
                b_x = load_activation(p_row, first, columns, B, CHUNK, ROTATED)
                largest = tl.maximum(largest, block_largest(b_x))
            first_exponent, finite = row_exponent(tl.max(largest, axis=0))
            residual = finite != 0

    # with constant ends, a loop of one step is none
    end, padded_end = (CHUNK, CHUNK) if ONE_CHUNK else (columns, padded)
    b_x = tl.zeros((CHUNK // B, B), tl.float32)
    largest = tl.zeros((CHUNK // B,), tl.int32)
    for first in range(0, end, CHUNK):
        b_x = _source(
            p_row, first, columns, residual, first_exponent, label, p_totals, p_book,
            DIALECTS, B, CHUNK, SALIENT, GROUPED, ROTATED, ASM,
        )  # fmt: skip
        largest = tl.maximum(largest, block_largest(b_x))
    exponent, finite = row_exponent(tl.max(largest, axis=0))
    tl.store(p_scale + i_row, tl.where(used, row_scale(exponent, finite), 1.0))
    if used & (finite != 0):
        for first in range(0, padded_end, CHUNK):
            if not ONE_CHUNK:
                b_x = _source(
                    p_row, first, columns, residual, first_exponent, label, p_totals, p_book,
                    DIALECTS, B, CHUNK, SALIENT, GROUPED, ROTATED, ASM,
                )  # fmt: skip
                largest = block_largest(b_x)
            words = _round(
                b_x, largest, first, columns, exponent, own_label, p_totals, p_book,
                DIALECTS, B, GROUPED, ASM,
            )  # fmt: skip
            _store(p_out, words, first, padded, B, CHUNK, OPERANDS)
    else:
        for first in range(0, padded_end, CHUNK):
            words = tl.zeros((CHUNK // B, B // 4), tl.int32)
            _store(p_out, words, first, padded, B, CHUNK, False)


@triton.jit(do_not_specialize=["tokens", "columns", "stride"])
def _group_errors_kernel(
    p_x,
    p_group,
    p_totals,
    p_book,
    tokens,
    columns,
    stride,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add the LUT errors of every grouped token to its group's totals [T, blocks, 3], int32.

    They are those of :func:`.rounding.variant_errors`. A token with NaN or Inf adds nothing.

    Integers: the order of the additions does not matter.
    """
    if ALIGNED:
        columns = columns // 16 * 16
        stride = stride // 16 * 16
    i_token = tl.program_id(0)
    label = tl.load(p_group + i_token)
    if (label >= 0) & (label < tokens):
        p_row = p_x + i_token.to(tl.int64) * stride
        largest = tl.zeros((CHUNK // B,), tl.int32)
        for first in range(0, columns, CHUNK):
            b_x = load_activation(p_row, first, columns, B, CHUNK, ROTATED)
            largest = tl.maximum(largest, block_largest(b_x))
        exponent, finite = row_exponent(tl.max(largest, axis=0))
        blocks = tl.cdiv(columns, B)
        if finite != 0:
            for first in range(0, columns, CHUNK):
                b_x = load_activation(p_row, first, columns, B, CHUNK, ROTATED)
                largest = block_largest(b_x)
                scale, _, largest_cell = scale_blocks(largest, exponent, _WINDOW, ASM)
                row = block_row(largest_cell)
                differences, _ = look_up(four(b_x), scale, row, p_book, 32, ASM)
                e1, e2, e3 = variant_errors(differences, B)
                o_block = first // B + tl.arange(0, CHUNK // B)
                p_total = p_totals + (label.to(tl.int64) * blocks + o_block) * 3
                m_block = o_block < blocks
                tl.atomic_add(p_total, e1, mask=m_block, sem="relaxed")
                tl.atomic_add(p_total + 1, e2, mask=m_block, sem="relaxed")
                tl.atomic_add(p_total + 2, e3, mask=m_block, sem="relaxed")


def _launch_quantize_activation(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    q: torch.Tensor,
    scale: torch.Tensor,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
    operand_order: bool,
    zeros: torch.Tensor | None,
    rotation: Rotation,
    config: RowConfig,
) -> None:
    """Fill `q` (uint8 or bfloat16 [T + S, Kp]) and `scale`; one launch, three with `group`."""
    rows = q.shape[0]
    if rows == 0:
        return
    salient, group = (None if each is None else readable(each) for each in (salient, group))
    tokens, columns = x.shape
    table = book_table(book, x.device)
    shape = {
        "B": block_size,
        "CHUNK": config.chunk,
        "ROTATED": rotation != "none",
        "ALIGNED": aligned(x),
        "ASM": not interpreted(),
    }
    totals = None
    if group is not None:
        blocks = q.shape[1] // block_size
        totals = zeroed(torch.empty(tokens, blocks, 3, dtype=torch.int32, device=x.device))
        launch(
            _group_errors_kernel,
            (tokens,),
            (x, group, totals, table, tokens, columns, x.stride(0)),
            shape,
            num_warps=config.num_warps,
        )
    sizes = (tokens, columns, q.shape[1], x.stride(0), 0 if zeros is None else zeros.numel())
    launch(
        _quantize_activation_kernel,
        (rows,),
        (x, q, scale, salient, group, totals, table, zeros, *sizes),
        {
            "DIALECTS": len(book),
            "ONE_CHUNK": q.shape[1] <= config.chunk,
            "OPERANDS": operand_order,
            "SALIENT": salient is not None,
            "GROUPED": group is not None,
            **shape,
        },
        num_warps=config.num_warps,
    )


def quantize_activation(
    x: torch.Tensor,
    book: Formatbook = DIALECT_FP4,
    block_size: int = 32,
    *,
    salient: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    operand_order: bool = False,
    zeros: torch.Tensor | None = None,
    rotation: Rotation = "none",
    config: RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round tokens as ``reference.round_activation`` does, to FP8 rows that hold them exactly.

    Args:
        x: float32, bfloat16 or float16 [T, K].
        book: the weight's formatbook; its online rule selects the dialects (``two_stage``:
            BlockDialect, ``lut``: SemanticDialect).
        block_size: 16, 32 or 64.
        salient: int32 or int64 [S], rows of x whose residual is rounded too (decomposition of
            SemanticDialect; formulas ours); an index outside 0..T-1 is an unused place.
        group: int32 [T], labels 0..T-1 of tokens that share the shape of their dialects in each
            channel block (SemanticDialect's SeDA; formulas ours; 32-dialect book only); any other
            label is a free token, as all residuals are.
        dtype: of q: float8_e4m3fn, or bfloat16 with the same numbers.
        operand_order: write the columns in the order of the GEMM's operands, see above.
        zeros: int32, contiguous: memory that the same launch fills with zeros if T > 0.
        rotation: the weight's; tokens are rotated before anything else.
        config: how a program works; any gives the same bytes.

    Returns:
        (q [T + S, Kp], float32 scale [T + S]): a value is ``q * scale``. Kp is K in whole blocks;
        the tail is zero. A row with NaN or Inf is zeros with the scale NaN, an unused place with 1.

    Raises:
        ValueError: if dtypes, shapes, devices or options do not fit.
    """
    check_matrix(x, "x")
    check_block_size(block_size)
    _check_rows(x, salient, group, book, rotation)
    x = readable_rows(x)
    padded = padded_columns(x.shape[1], block_size)
    rows = x.shape[0] + (0 if salient is None else salient.shape[0])
    q = torch.empty(rows, padded, dtype=written_dtype(dtype), device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    _launch_quantize_activation(
        x,
        book,
        block_size,
        q,
        scale,
        salient,
        group,
        operand_order,
        zeros,
        rotation,
        config or row_config(padded),
    )
    return q.view(dtype), scale


def _check_rows(
    x: torch.Tensor,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
    book: Formatbook,
    rotation: Rotation,
) -> None:
    check_rotation(rotation, x.shape[1], "x")
    if salient is not None and (
        salient.dtype not in (torch.int32, torch.int64) or salient.dim() != 1
    ):
        raise ValueError(
            f"salient: {salient.dtype} {list(salient.shape)}; it must be int32 or int64 [S]"
        )
    if group is not None and (group.dtype != torch.int32 or group.shape != x.shape[:1]):
        raise ValueError(
            f"group: {group.dtype} {list(group.shape)}; it must be torch.int32 [{x.shape[0]}], one "
            "label for each row of x"
        )
    if group is not None and book.variants != 4:
        raise ValueError(
            f"group: not defined for book {book.name!r}; groups share a variant of 'semantic_32'"
        )
    for name, tensor in (("salient", salient), ("group", group)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, x on {x.device}; move it there")
