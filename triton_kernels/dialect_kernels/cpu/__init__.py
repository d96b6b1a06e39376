"""The CPU kernel: quantizer, decoder and linear layer in C++, called through ctypes.

The library is built when the package is installed. In a source tree, or where that was not possible
then, it is built on first use into the user's cache folder. Without a compiler :func:`available` is
false, one log line says why, and callers use torch. ``BLOCKDIALECT_CPU_KERNEL=0`` asks for that.

Every function returns the bytes of its counterpart in :mod:`dialect_kernels.reference`, whatever
the processor, the batch and the number of threads.
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from ..formatbook import CELLS, LARGEST_HALF_UNIT, SMALLEST_RANGE, Formatbook
from ..packed import check_block_size, padded_columns
from .build import build as _build
from .build import library_name

__all__ = [
    "INSTRUCTIONS",
    "Quantized",
    "available",
    "decomposed_linear",
    "dequantize",
    "describe",
    "features",
    "linear",
    "quantize",
    "round_activation",
    "variant_costs",
    "why_not",
]

INSTRUCTIONS = ("scalar", "avx2", "avx512_vnni", "amx_int8")
"""What the kernel can be run with; the position is its number in C++."""

_log = logging.getLogger(__name__)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMATS = {"dialect": 0, "fp8": 1, "none": 2}
_SWITCH = "BLOCKDIALECT_CPU_KERNEL"


class Quantized(NamedTuple):
    """A quantized matrix [N, K]; Kp is K rounded up to blocks of B."""

    codes: torch.Tensor
    """uint8 [N, Kp/2]."""
    meta: torch.Tensor
    """uint8 [N, Kp/B]."""
    row_exponent: torch.Tensor
    """int8 [N]."""
    blocks_below_window: torch.Tensor
    """int64 [N], as :func:`dialect_kernels.reference.blocks_below_window`."""


def available() -> bool:
    """Whether the kernel can be used; builds and loads it on the first call."""
    return _library().handle is not None


def why_not() -> str | None:
    """Why the kernel cannot be used, or None."""
    return _library().problem


def features() -> str:
    """The instruction set the kernel uses on this processor, one of :data:`INSTRUCTIONS`."""
    return INSTRUCTIONS[_handle().dialect_features()]


def describe() -> str:
    """The kernel as it runs when this thread calls it: instructions, threads and whose they are."""
    threads = torch.get_num_threads()
    whose = "PyTorch's OpenMP" if _handle().dialect_uses_openmp(threads) else "its own"
    cpus = _handle().dialect_cpus(threads)
    return f"{features()}, {threads} threads ({whose}) on {cpus} CPUs"


def quantize(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int,
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
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`features`.

    Raises:
        ValueError: if an argument is none of these.
    """
    if rule not in book.rules or not 0 <= window <= book.largest_stored_delta:
        raise ValueError(f"rule {rule!r}, window {window}: not defined for book {book.name!r}")
    x, _ = _tokens(x, None, x.shape[-1], block_size, book)
    rows, columns = x.shape
    padded = padded_columns(columns, block_size)
    out = Quantized(
        torch.empty(rows, padded // 2, dtype=torch.uint8),
        torch.empty(rows, padded // block_size, dtype=torch.uint8),
        torch.empty(rows, dtype=torch.int8),
        torch.empty(rows, dtype=torch.int64),
    )
    _call(
        "dialect_quantize",
        x.data_ptr(),
        _DTYPES[x.dtype],
        rows,
        columns,
        ctypes.byref(_book(book)),
        block_size,
        int(rule == book.online_rule),
        window,
        *(tensor.data_ptr() for tensor in out),
        _threads(threads),
        _instructions(instructions),
    )
    return out


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    columns: int,
    book: Formatbook,
    block_size: int,
    activation_format: str,
    bias: torch.Tensor | None = None,
    threads: int | None = None,
    instructions: str | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias`` as ``reference.dialect_linear`` computes it in mode ``exact``.

    Args:
        x: float32, bfloat16 or float16 [T, K] on CPU.
        codes, meta, row_exponent: the packed weight [N, K]; any bytes are safe.
        columns: K.
        book: the weight's formatbook.
        block_size: the weight's block size.
        activation_format: ``"dialect"``, ``"fp8"`` or ``"none"``.
        bias: [N] or None.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`features`.

    Returns:
        [T, N] in x's dtype.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    rows = codes.shape[0]
    weight, kept = _weight(codes, meta, row_exponent, columns, block_size)
    x, _ = _tokens(x, None, columns, block_size, book)
    if bias is not None:
        if tuple(bias.shape) != (rows,) or bias.device.type != "cpu":
            raise ValueError(
                f"bias: has shape {list(bias.shape)} on {bias.device}; it must be [{rows}] on cpu"
            )
        bias = bias.to(torch.float32).contiguous()
    y = torch.empty(x.shape[0], rows, dtype=x.dtype)
    _call(
        "dialect_linear",
        x.data_ptr(),
        _DTYPES[x.dtype],
        x.shape[0],
        ctypes.byref(weight),
        ctypes.byref(_book(book)),
        _FORMATS[activation_format],
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        _threads(threads),
        _instructions(instructions),
    )
    del kept
    return y


def decomposed_linear(
    x: torch.Tensor,
    variants: torch.Tensor | None,
    salient: torch.Tensor,
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    columns: int,
    book: Formatbook,
    block_size: int,
    threads: int | None = None,
    instructions: str | None = None,
) -> torch.Tensor:
    """Products of rounded tokens, and of what rounding left over of some of them, mode ``exact``.

    Args:
        x: float32, bfloat16 or float16 [T, K] on CPU.
        variants: int8 [T, Kp/B], the variant that a block's group has chosen, -1 for a free
            block; None: all are free.
        salient: int64 [S], the tokens whose residuals are rounded and multiplied too, 0..T-1.
        codes, meta, row_exponent: the packed weight [N, K]; any bytes are safe.
        columns: K.
        book: the weight's formatbook.
        block_size: the weight's block size.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`features`.

    Returns:
        float32 [T + S, N].

    Raises:
        ValueError: if shapes, dtypes or tokens do not fit.
    """
    weight, kept = _weight(codes, meta, row_exponent, columns, block_size)
    x, variants = _tokens(x, variants, columns, block_size, book)
    if salient.dtype != torch.int64 or salient.dim() != 1 or salient.device.type != "cpu":
        raise ValueError(
            f"salient: {salient.dtype} {list(salient.shape)} on {salient.device}; it must be "
            "torch.int64 [S] on cpu"
        )
    salient = salient.contiguous()
    if salient.numel() and not 0 <= int(salient.min()) <= int(salient.max()) < x.shape[0]:
        raise ValueError(f"salient: holds tokens outside 0..{x.shape[0] - 1}")
    y = torch.empty(x.shape[0] + salient.numel(), codes.shape[0], dtype=torch.float32)
    _call(
        "dialect_decomposed",
        x.data_ptr(),
        _DTYPES[x.dtype],
        x.shape[0],
        None if variants is None else variants.data_ptr(),
        salient.data_ptr(),
        salient.numel(),
        ctypes.byref(weight),
        ctypes.byref(_book(book)),
        y.data_ptr(),
        _threads(threads),
        _instructions(instructions),
    )
    del kept
    return y


def round_activation(
    x: torch.Tensor,
    variants: torch.Tensor | None,
    book: Formatbook,
    block_size: int,
    threads: int | None = None,
    instructions: str | None = None,
) -> torch.Tensor:
    """The rounded values of activations, float32 [T, K]; arguments as `decomposed_linear`."""
    x, variants = _tokens(x, variants, x.shape[-1], block_size, book)
    out = torch.empty(x.shape, dtype=torch.float32)
    _call(
        "dialect_round",
        x.data_ptr(),
        _DTYPES[x.dtype],
        *x.shape,
        None if variants is None else variants.data_ptr(),
        ctypes.byref(_book(book)),
        block_size,
        out.data_ptr(),
        _threads(threads),
        _instructions(instructions),
    )
    return out


def variant_costs(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    threads: int | None = None,
    instructions: str | None = None,
) -> torch.Tensor:
    """What each variant of a block's range costs by the online rule.

    Args:
        x: float32, bfloat16 or float16 [T, K] on CPU.
        book: the formatbook.
        block_size: 16, 32 or 64.
        threads: default: as many as torch uses.
        instructions: default: the best this processor has, see :func:`features`.

    Returns:
        int32 [T, Kp/B, variants]; 0 for a token with NaN or Inf.
    """
    x, _ = _tokens(x, None, x.shape[-1], block_size, book)
    blocks = padded_columns(x.shape[1], block_size) // block_size
    out = torch.empty(x.shape[0], blocks, book.variants, dtype=torch.int32)
    _call(
        "dialect_costs",
        x.data_ptr(),
        _DTYPES[x.dtype],
        *x.shape,
        ctypes.byref(_book(book)),
        block_size,
        out.data_ptr(),
        _threads(threads),
        _instructions(instructions),
    )
    return out


def dequantize(
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    columns: int,
    book: Formatbook,
    block_size: int,
    threads: int | None = None,
) -> torch.Tensor:
    """The values of a packed tensor, float32 [N, K]; a row with exponent -128 is NaN."""
    weight, kept = _weight(codes, meta, row_exponent, columns, block_size)
    out = torch.empty(codes.shape[0], columns, dtype=torch.float32)
    _call(
        "dialect_dequantize",
        ctypes.byref(weight),
        ctypes.byref(_book(book)),
        out.data_ptr(),
        _threads(threads),
    )
    del kept
    return out


class _Book(ctypes.Structure):
    """Tables of a formatbook; the same layout as `Book` in the C++ file."""

    _fields_ = (
        ("dialects", ctypes.c_int32),
        ("id_bits", ctypes.c_int32),
        ("variants", ctypes.c_int32),
        ("thresholds", ctypes.c_uint8 * 7 * 32),
        ("steps", ctypes.c_uint8 * 7 * 32),
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
    )


def _weight(
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    columns: int,
    block_size: int,
) -> tuple[_Weight, tuple[torch.Tensor, ...]]:
    """The weight as C++ sees it, and the tensors it points into.

    Raises:
        ValueError: if the shapes or dtypes do not fit.
    """
    check_block_size(block_size)
    rows = codes.shape[0]
    padded = padded_columns(columns, block_size)
    for name, tensor, dtype, shape in (
        ("codes", codes, torch.uint8, (rows, padded // 2)),
        ("meta", meta, torch.uint8, (rows, padded // block_size)),
        ("row_exponent", row_exponent, torch.int8, (rows,)),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device.type != "cpu":
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device} does not fit a "
                f"weight of {rows} x {columns}; it must be {dtype} {list(shape)} on cpu"
            )
    kept = (codes.contiguous(), meta.contiguous(), row_exponent.contiguous())
    pointers = (tensor.data_ptr() for tensor in kept)
    return _Weight(*pointers, rows, columns, block_size), kept


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
    if x.dtype not in _DTYPES or x.device.type != "cpu":
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


@cache
def _book(book: Formatbook) -> _Book:
    out = _Book(dialects=len(book), id_bits=book.id_bits, variants=book.variants)
    for id_, (thresholds, dialect, index, signed) in enumerate(
        zip(book.thresholds, book.half_units, book.index_lut, book.signed_half_units, strict=True)
    ):
        out.thresholds[id_][:] = thresholds
        out.steps[id_][:] = [high - low for low, high in pairwise(dialect)]
        out.index[id_][:] = index
        out.half_units[id_][:] = signed
    for group in range(LARGEST_HALF_UNIT - SMALLEST_RANGE + 1):
        for variant, costs in enumerate(_online_costs(book, group)):
            out.online_cost[group][variant][:] = costs
    return out


def _online_costs(book: Formatbook, group: int) -> tuple[tuple[int, ...], ...]:
    """What an element in each cell costs each variant of one M; the least sum wins.

    For the two-stage rule the cost of a dialect is 1 in its partner's beneficial cells: the larger
    count wins and a tie goes to the even id, as the rule says.
    """
    first = book.variants * group
    if book.online_rule == "two_stage":
        return (book.beneficial_cells[first + 1], book.beneficial_cells[first])
    return book.error_lut[first : first + book.variants]


def _threads(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads


def _instructions(name: str | None) -> int:
    best: int = _handle().dialect_features()
    if name is None:
        return best
    if name not in INSTRUCTIONS[: best + 1]:
        allowed = ", ".join(map(repr, INSTRUCTIONS[: best + 1]))
        raise ValueError(f"instructions: {name!r}; this processor has {allowed}")
    return INSTRUCTIONS.index(name)


@dataclass(frozen=True)
class _Library:
    handle: ctypes.CDLL | None
    problem: str | None


def _call(function: str, *arguments: object) -> None:
    if getattr(_handle(), function)(*arguments):
        raise MemoryError(f"{function}: no memory for the rounded activations")


def _handle() -> ctypes.CDLL:
    library = _library()
    if library.handle is None:
        raise RuntimeError(f"the CPU kernel cannot be used: {library.problem}")
    return library.handle


@cache
def _library() -> _Library:
    if os.environ.get(_SWITCH) == "0":
        return _Library(None, f"{_SWITCH}=0")
    try:
        handle = ctypes.CDLL(str(_find()))
        _declare(handle)
        handle.dialect_use_openmp(_gomp_parallel())
    except (OSError, RuntimeError) as error:
        _log.warning("the CPU kernel is not available, torch does its work: %s", error)
        return _Library(None, str(error))
    return _Library(handle, None)


def _find() -> Path:
    """The library beside this file, or in the cache folder, where it is built if need be."""
    name = library_name()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockdialect"
    for known in (Path(__file__).with_name(name), folder / name):
        if known.is_file():
            return known
    _log.info("building the CPU kernel in %s", folder)
    return _build(folder)


def _gomp_parallel() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP runtime that PyTorch uses, if it uses one.

    It is what PyTorch itself was linked with, or what ``LD_PRELOAD`` puts in its place; LLVM's and
    Intel's runtimes have this function too.
    """
    own = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for library, mode in ((None, ctypes.DEFAULT_MODE), (str(own), getattr(os, "RTLD_NOLOAD", 0))):
        try:
            found = ctypes.CDLL(library, mode=mode).GOMP_parallel
        except (AttributeError, OSError, TypeError):
            continue
        return ctypes.cast(found, ctypes.c_void_p).value
    return None


def _declare(handle: ctypes.CDLL) -> None:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    handle.dialect_use_openmp.argtypes = (pointer,)
    handle.dialect_use_openmp.restype = None
    signatures = {
        "dialect_features": (),
        "dialect_uses_openmp": (i32,),
        "dialect_cpus": (i32,),
        "dialect_quantize": (
            *(pointer, i32, i64, i64, pointer, i32, i32, i32),
            *(pointer, pointer, pointer, pointer, i32, i32),
        ),
        "dialect_linear": (
            *(pointer, i32, i64, pointer, pointer, i32, pointer, pointer, i32, i32),
        ),
        "dialect_dequantize": (pointer, pointer, pointer, i32),
        "dialect_decomposed": (
            *(pointer, i32, i64, pointer, pointer, i64),
            *(pointer, pointer, pointer, i32, i32),
        ),
        "dialect_round": (*(pointer, i32, i64, i64, pointer, pointer, i32, pointer, i32, i32),),
        "dialect_costs": (*(pointer, i32, i64, i64, pointer, i32, pointer, i32, i32),),
    }
    for name, arguments in signatures.items():
        function = getattr(handle, name)
        function.argtypes = arguments
        function.restype = i32
