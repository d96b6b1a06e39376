"""The entry points of the CPU kernel as functions of tensors, called through ctypes.

Every function returns the bytes of its counterpart in :mod:`dialect_kernels.reference`, whatever
the processor, the batch and the number of threads; :func:`linear` does so in the mode ``exact``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import pairwise

import torch

from ..arithmetic import padded_columns
from ..backend import BlockGrid, Quantized
from ..formatbook import CELLS, LARGEST_HALF_UNIT, SMALLEST_RANGE, Formatbook, Rotation
from ..packed import PackedTensor, check_block_size
from ..packed_experts import PackedExperts
from ..rotation import check_rotation
from .library import call, instructions_or_best, threads_or_torch

__all__ = [
    "DTYPES",
    "book_tables",
    "decomposed_linear",
    "dequantize",
    "embedding",
    "feed_back",
    "grouped_linear",
    "linear",
    "quantize",
    "rounding_loss",
    "variant_costs",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMATS = {"dialect": 0, "fp8": 1, "none": 2}
_LEVELS = 32


def quantize(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int,
    rotation: Rotation = "none",
    threads: int | None = None,
    instructions: str | None = None,
) -> Quantized:
    """Quantize a matrix as ``reference.quantize`` does.

    Args:
        x: float32, bfloat16 or float16 [N, K] on CPU. The caller refuses NaN and Inf; here they
            make a row with the exponent -128.
        book: the formatbook.
        block_size: 16, 32 or 64.
        rule: one of the book's rules.
        window: largest delta, 0..book.largest_stored_delta.
        rotation: what the matrix is multiplied by before; it is not searched for rows that
            overflow, which get the exponent -128.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`~.library.features`.

    Raises:
        ValueError: if an argument is none of these.
    """
    if rule not in book.rules or not 0 <= window <= book.largest_stored_delta:
        raise ValueError(f"rule {rule!r}, window {window}: not defined for book {book.name!r}")
    x, _ = _tokens(x, None, x.shape[-1], block_size, book)
    rows, columns = x.shape
    packed = PackedTensor.empty((rows, columns), book, block_size, "cpu", rotation)
    below = torch.empty(rows, dtype=torch.int64, device="cpu")
    call(
        "dialect_quantize",
        x.data_ptr(),
        DTYPES[x.dtype],
        rows,
        columns,
        ctypes.byref(book_tables(book)),
        block_size,
        int(rule == book.online_rule),
        window,
        int(rotation != "none"),
        *(tensor.data_ptr() for tensor in (*packed.tensors, below)),
        threads_or_torch(threads),
        instructions_or_best(instructions),
    )
    return Quantized(packed, below)


def linear(
    x: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str = "exact",
    threads: int | None = None,
    instructions: str | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias`` as ``reference.dialect_linear`` computes it.

    Args:
        x: float32, bfloat16 or float16 [T, K] on CPU.
        p: packed weight [N, K] on CPU; any bytes are safe.
        bias: [N] or None.
        activation_format: ``"dialect"``, ``"fp8"`` or ``"none"``.
        accumulation: ``"exact"`` (the reference's bits) or ``"default"``: many tokens are
            multiplied panel by panel, exact products added in float32 in no particular order.
            Before the output is rounded it differs from the exact result by at most
            ``K * 2**-24 * sum |a b|``.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`~.library.features`.

    Returns:
        [T, N] in x's dtype.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    rows, columns = p.shape
    weight, kept = _weight(p)
    x, _ = _tokens(x, None, columns, p.block_size, p.book)
    if (bias := _bias(bias, rows)) is not None:
        bias = bias.to(torch.float32)
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device="cpu")
    call(
        "dialect_linear",
        x.data_ptr(),
        DTYPES[x.dtype],
        x.shape[0],
        ctypes.byref(weight),
        ctypes.byref(book_tables(p.book)),
        _FORMATS[activation_format],
        int(accumulation == "exact"),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        threads_or_torch(threads),
        instructions_or_best(instructions),
    )
    del kept
    return y


def grouped_linear(
    x: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    experts: PackedExperts,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str = "exact",
    threads: int | None = None,
    instructions: str | None = None,
) -> torch.Tensor:
    """Row by row, :func:`linear` of a token and the expert that the row belongs to.

    Args:
        x: float32, bfloat16 or float16 [T, K] on CPU.
        rows: int64 [R], the token of each row of the result; None: R = T and row i is of token i.
        offsets: int64 [E + 1], ascending in 0..R: expert e has rows offsets[e]..offsets[e+1]-1.
        experts: E packed weights [N, K] on CPU; any bytes are safe.
        bias: [E, N] or None.
        activation_format, accumulation: as for :func:`linear`.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`~.library.features`.

    Returns:
        [R, N] in x's dtype; 0 in rows of no expert.

    Raises:
        ValueError: if shapes, dtypes, rows or offsets do not fit.
    """
    count, features, columns = experts.shape
    weight, kept = _weight(experts.together)
    weight.rows = features
    x, _ = _tokens(x, None, columns, experts.together.block_size, experts.together.book)
    offsets = _numbers(offsets, "offsets", count + 1)
    rows = None if rows is None else _numbers(rows, "rows", rows.numel())
    bias = _bias(bias, count, features)
    y = torch.empty(len(x if rows is None else rows), features, dtype=x.dtype, device="cpu")
    if len(y) == 0:  # an empty tensor may have no address, which would mean that there is none
        return y
    call(
        "dialect_grouped",
        x.data_ptr(),
        DTYPES[x.dtype],
        len(x),
        None if rows is None else rows.data_ptr(),
        len(y),
        offsets.data_ptr(),
        count,
        ctypes.byref(weight),
        ctypes.byref(book_tables(experts.together.book)),
        _FORMATS[activation_format],
        int(accumulation == "exact"),
        None if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        y.data_ptr(),
        threads_or_torch(threads),
        instructions_or_best(instructions),
    )
    del kept
    return y


def decomposed_linear(
    x: torch.Tensor,
    p: PackedTensor,
    variants: torch.Tensor | None,
    salient: torch.Tensor,
    threads: int | None = None,
    instructions: str | None = None,
) -> torch.Tensor:
    """Products of rounded tokens, and of what rounding left over of some of them, mode ``exact``.

    Args:
        x: float32, bfloat16 or float16 [T, K] on CPU.
        p: packed weight [N, K] on CPU; any bytes are safe.
        variants: int8 [T, Kp/B], the variant that a block's group has chosen, -1 for a free
            block; None: all are free.
        salient: int64 [S], the tokens whose residuals are rounded and multiplied too, 0..T-1.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`~.library.features`.

    Returns:
        float32 [T + S, N].

    Raises:
        ValueError: if shapes, dtypes or tokens do not fit.
    """
    weight, kept = _weight(p)
    x, variants = _tokens(x, variants, p.shape[1], p.block_size, p.book)
    if salient.dtype != torch.int64 or salient.dim() != 1 or salient.device.type != "cpu":
        raise ValueError(
            f"salient: {salient.dtype} {list(salient.shape)} on {salient.device}; it must be "
            "torch.int64 [S] on cpu"
        )
    salient = salient.contiguous()
    if salient.numel() and not 0 <= int(salient.min()) <= int(salient.max()) < x.shape[0]:
        raise ValueError(f"salient: holds tokens outside 0..{x.shape[0] - 1}")
    rows = x.shape[0] + salient.numel()
    y = torch.empty(rows, p.shape[0], dtype=torch.float32, device="cpu")
    call(
        "dialect_decomposed",
        x.data_ptr(),
        DTYPES[x.dtype],
        x.shape[0],
        None if variants is None else variants.data_ptr(),
        salient.data_ptr(),
        salient.numel(),
        ctypes.byref(weight),
        ctypes.byref(book_tables(p.book)),
        y.data_ptr(),
        threads_or_torch(threads),
        instructions_or_best(instructions),
    )
    del kept
    return y


def variant_costs(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rotation: Rotation = "none",
    threads: int | None = None,
    instructions: str | None = None,
) -> torch.Tensor:
    """The cost of each variant of a block's range by the online rule.

    Args:
        x: float32, bfloat16 or float16 [T, K] on CPU.
        book: the formatbook.
        block_size: 16, 32 or 64.
        rotation: the weight's; the tokens are rotated before.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`~.library.features`.

    Returns:
        int32 [T, Kp/B, variants]; 0 for a token with NaN or Inf.
    """
    x, _ = _tokens(x, None, x.shape[-1], block_size, book)
    check_rotation(rotation, x.shape[1], "x")
    blocks = padded_columns(x.shape[1], block_size) // block_size
    shape = (x.shape[0], blocks, book.variants)
    out = torch.empty(shape, dtype=torch.int32, device="cpu")
    call(
        "dialect_costs",
        x.data_ptr(),
        DTYPES[x.dtype],
        *x.shape,
        ctypes.byref(book_tables(book)),
        block_size,
        int(rotation != "none"),
        out.data_ptr(),
        threads_or_torch(threads),
        instructions_or_best(instructions),
    )
    return out


def dequantize(p: PackedTensor, threads: int | None = None) -> torch.Tensor:
    """The values of a packed tensor, float32 [N, K]; a row with exponent -128 is NaN.

    Args:
        p: packed tensor [N, K] on CPU; any bytes are safe.
        threads: default: as many as torch uses.

    Raises:
        ValueError: if it is on another device.
    """
    weight, kept = _weight(p)
    out = torch.empty(p.shape, dtype=torch.float32, device="cpu")
    call(
        "dialect_dequantize",
        ctypes.byref(weight),
        ctypes.byref(book_tables(p.book)),
        out.data_ptr(),
        threads_or_torch(threads),
    )
    del kept
    return out


def embedding(
    ids: torch.Tensor, p: PackedTensor, dtype: torch.dtype, threads: int | None = None
) -> torch.Tensor:
    """Rows of a packed tensor, each rounded once.

    Args:
        ids: int64 [T] on CPU.
        p: packed tensor [V, K] on CPU; any bytes are safe.
        dtype: float32, bfloat16 or float16.
        threads: default: as many as torch uses.

    Returns:
        `dtype` [T, K]; a row with exponent -128 is NaN.

    Raises:
        IndexError: if an id is not a row.
        ValueError: if dtypes or devices do not fit.
    """
    weight, kept = _weight(p)
    if ids.dtype != torch.int64 or ids.dim() != 1 or ids.device.type != "cpu":
        raise ValueError(
            f"ids: {ids.dtype} {list(ids.shape)} on {ids.device}; it must be torch.int64 [T] on cpu"
        )
    if ids.numel():
        least, most = (int(end) for end in torch.aminmax(ids))
        if least < 0 or most >= p.shape[0]:
            raise IndexError(f"ids: hold {least}..{most}; allowed are 0..{p.shape[0] - 1}")
    ids = ids.contiguous()
    out = torch.empty(ids.shape[0], p.shape[1], dtype=dtype, device="cpu")
    call(
        "dialect_embedding",
        ids.data_ptr(),
        ids.shape[0],
        ctypes.byref(weight),
        ctypes.byref(book_tables(p.book)),
        DTYPES[dtype],
        out.data_ptr(),
        threads_or_torch(threads),
    )
    del kept
    return out


def rounding_loss(
    x: torch.Tensor,
    p: PackedTensor,
    threads: int | None = None,
    instructions: str | None = None,
) -> torch.Tensor:
    """What rounding a matrix to `p` lost.

    Args:
        x: float32, bfloat16 or float16 [N, K] on CPU, not rotated.
        p: packed tensor [N, K] on CPU; any bytes are safe.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`~.library.features`.

    Returns:
        float64 [N, 2]: the sums of ``x**2`` and of ``(x - p)**2`` in every row, those of a rotated
        tensor as ``reference.rounding_loss`` defines them; the same bits whatever the processor and
        the number of threads; NaN in a row with exponent -128.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    weight, kept = _weight(p)
    x, _ = _tokens(x, None, p.shape[1], p.block_size, p.book)
    if x.shape != p.shape:
        raise ValueError(f"x: has shape {list(x.shape)}; it must be {list(p.shape)}")
    out = torch.empty(x.shape[0], 2, dtype=torch.float64, device="cpu")
    call(
        "dialect_loss",
        x.data_ptr(),
        DTYPES[x.dtype],
        ctypes.byref(weight),
        ctypes.byref(book_tables(p.book)),
        out.data_ptr(),
        threads_or_torch(threads),
        instructions_or_best(instructions),
    )
    del kept
    return out


def feed_back(
    block: torch.Tensor,
    factor: torch.Tensor,
    grid: BlockGrid,
    book: Formatbook,
    errors: torch.Tensor,
    threads: int | None = None,
    instructions: str | None = None,
) -> torch.Tensor:
    """Round the columns of a block as ``reference.feed_back`` does.

    Args:
        block: float32 [B, N] on CPU, contiguous; it keeps what was rounded.
        factor: float32 [B, B].
        grid: of the N rows.
        book: the formatbook.
        errors: float32 [B, N], contiguous; written to.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`~.library.features`.

    Returns:
        The codes, uint8 [B, N].

    Raises:
        ValueError: if shapes do not fit.
    """
    columns, rows = block.shape
    check_block_size(columns)
    fits = errors.shape == block.shape and factor.shape == (columns, columns)
    if not (fits and block.is_contiguous() and errors.is_contiguous()):
        raise ValueError(f"block {list(block.shape)}: factor and errors do not fit")
    codes = torch.empty(block.shape, dtype=torch.uint8, device="cpu")
    given = [factor.contiguous(), *(part.contiguous() for part in grid)]
    call(
        "dialect_feed_back",
        block.data_ptr(),
        *(tensor.data_ptr() for tensor in given),
        ctypes.byref(book_tables(book)),
        errors.data_ptr(),
        codes.data_ptr(),
        rows,
        columns,
        threads_or_torch(threads),
        instructions_or_best(instructions),
    )
    return codes


class _Book(ctypes.Structure):
    """Tables of a formatbook; the same layout as `Book` in the C++ file."""

    _fields_ = (
        ("dialects", ctypes.c_int32),
        ("id_bits", ctypes.c_int32),
        ("variants", ctypes.c_int32),
        ("level_count", ctypes.c_int32),
        ("levels", ctypes.c_int16 * _LEVELS),
        ("steps", ctypes.c_float * 32 * _LEVELS),
        ("index", ctypes.c_uint8 * CELLS * 32),
        ("half_units", ctypes.c_int8 * 16 * 32),
        ("online_cost", ctypes.c_uint8 * CELLS * 4 * 8),
    )


class _Weight(ctypes.Structure):
    """A packed weight; the same layout as `Weight` in the C++ file."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("meta", ctypes.c_void_p),
        ("row_exponent", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("block", ctypes.c_int32),
        ("rotated", ctypes.c_int32),
    )


def _weight(p: PackedTensor) -> tuple[_Weight, tuple[torch.Tensor, ...]]:
    """The weight as C++ sees it, and the tensors it points into.

    Raises:
        ValueError: if it is not on CPU.
    """
    if p.device.type != "cpu":
        raise ValueError(f"weight: is on {p.device}; it must be on cpu: move it there")
    pointers = (tensor.data_ptr() for tensor in p.tensors)
    rotated = int(p.rotation != "none")
    return _Weight(*pointers, *p.shape, p.block_size, rotated), p.tensors


def _tokens(
    x: torch.Tensor,
    variants: torch.Tensor | None,
    columns: int,
    block_size: int,
    book: Formatbook,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The activations and variants, contiguous.

    Raises:
        ValueError: if they do not fit.
    """
    check_block_size(block_size)
    if x.dtype not in DTYPES or x.device.type != "cpu":
        raise ValueError(
            f"x: {x.dtype} on {x.device}; it must be float32, bfloat16 or float16 on cpu"
        )
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"x: has shape {list(x.shape)}; it must be [T, {columns}]")
    if variants is None:
        return x.contiguous(), None
    blocks = padded_columns(columns, block_size) // block_size
    wanted = (torch.int8, (x.shape[0], blocks), "cpu")
    if (variants.dtype, tuple(variants.shape), variants.device.type) != wanted:
        raise ValueError(
            f"variants: {variants.dtype} {list(variants.shape)} on {variants.device}; it must be "
            f"torch.int8 [{x.shape[0]}, {blocks}] on cpu"
        )
    if variants.numel():
        least, most = int(variants.min()), int(variants.max())
        if least < -1 or most >= book.variants:
            raise ValueError(
                f"variants: holds {least}..{most}; allowed are -1..{book.variants - 1}"
            )
    return x.contiguous(), variants.contiguous()


def _bias(bias: torch.Tensor | None, *shape: int) -> torch.Tensor | None:
    """The bias, contiguous and of a dtype that C++ reads.

    Raises:
        ValueError: if it does not have this shape, or is not on CPU.
    """
    if bias is None:
        return None
    if tuple(bias.shape) != shape or bias.device.type != "cpu":
        raise ValueError(
            f"bias: has shape {list(bias.shape)} on {bias.device}; it must be {list(shape)} on cpu"
        )
    return (bias if bias.dtype in DTYPES else bias.to(torch.float32)).contiguous()


def _numbers(numbers: torch.Tensor, name: str, count: int) -> torch.Tensor:
    """Numbers of tokens or rows, contiguous.

    Raises:
        ValueError: if they are not `count` int64 on CPU.
    """
    wanted = (torch.int64, (count,), "cpu")
    if (numbers.dtype, tuple(numbers.shape), numbers.device.type) != wanted:
        raise ValueError(
            f"{name}: {numbers.dtype} {list(numbers.shape)} on {numbers.device}; it must be "
            f"torch.int64 [{count}] on cpu"
        )
    return numbers.contiguous()


@cache
def book_tables(book: Formatbook) -> _Book:
    out = _Book(dialects=len(book), id_bits=book.id_bits, variants=book.variants)
    for id_, (index, signed) in enumerate(zip(book.index_lut, book.signed_half_units, strict=True)):
        out.index[id_][:] = index
        out.half_units[id_][:] = signed
    levels = _levels(book)
    out.level_count = len(levels)
    for number, (threshold, steps) in enumerate(levels.items()):
        out.levels[number] = threshold << 7
        out.steps[number][: len(book)] = steps
    for group in range(LARGEST_HALF_UNIT - SMALLEST_RANGE + 1):
        for variant, costs in enumerate(_online_costs(book, group)):
            out.online_cost[group][variant][:] = costs
    return out


def _levels(book: Formatbook) -> dict[int, list[int]]:
    """Thresholds at which not all dialects take the same step -> the step of each dialect there.

    A step is what the half-unit grows by; it is 0 in a dialect without this threshold.
    """
    steps = {threshold: [0] * len(book) for threshold in range(CELLS)}
    for id_, (thresholds, dialect) in enumerate(zip(book.thresholds, book.half_units, strict=True)):
        for threshold, (low, high) in zip(thresholds, pairwise(dialect), strict=True):
            steps[threshold][id_] = high - low
    return {threshold: taken for threshold, taken in steps.items() if len(set(taken)) > 1}


def _online_costs(book: Formatbook, group: int) -> tuple[tuple[int, ...], ...]:
    """The cost of an element in each cell for each variant of one M; the least sum wins.

    For the two-stage rule the cost of a dialect is 1 in its partner's beneficial cells: the larger
    count wins and a tie goes to the even id, as the rule says.
    """
    first = book.variants * group
    if book.online_rule == "two_stage":
        return (book.beneficial_cells[first + 1], book.beneficial_cells[first])
    return book.error_lut[first : first + book.variants]
