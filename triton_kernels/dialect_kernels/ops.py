"""The torch op of the linear layer, its device dispatch and the public functions.

``torch.ops.blockdialect.linear`` takes plain tensors, so that engines can trace and compile through
it; :func:`dialect_linear` is the same on a :class:`PackedTensor`, with checks.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F

from . import cpu, reference
from .backend import Quantized
from .formatbook import DIALECT_FP4, Formatbook, book_by_name
from .packed import PackedTensor

__all__ = [
    "dequantize",
    "dialect_linear",
    "linear",
    "quantize",
    "quantize_counted",
    "semantic_linear",
    "semantic_op",
    "warm_up",
]

_log = logging.getLogger(__name__)

# torch.library is not annotated
_library = torch.library.Library("blockdialect", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor codes, Tensor meta, Tensor row_exponent, Tensor? bias, "
    "SymInt in_features, str book, int block_size, str activation_format, str accumulation) "
    "-> Tensor"
)
_library.define(  # type: ignore[no-untyped-call]
    "semantic_linear(Tensor x, Tensor codes, Tensor meta, Tensor row_exponent, Tensor? bias, "
    "SymInt in_features, str book, int block_size, Tensor? salient, Tensor? group) -> Tensor"
)


def quantize(
    x: torch.Tensor,
    book: Formatbook = DIALECT_FP4,
    block_size: int = 32,
    rule: str = "mse",
    window: int | None = None,
    name: str = "tensor",
) -> PackedTensor:
    """Quantize a matrix; see :func:`dialect_kernels.reference.quantize`, whose bytes it returns."""
    return _quantize(x, book, block_size, rule, window, name, finite=False)[0]


def quantize_counted(
    x: torch.Tensor,
    book: Formatbook = DIALECT_FP4,
    block_size: int = 32,
    rule: str = "mse",
    window: int | None = None,
    name: str = "tensor",
    finite: bool = False,
) -> Quantized:
    """As :func:`quantize`, with the number of blocks below the window of every row.

    Args:
        finite: `x` is known to be finite and is not searched for NaN and Inf.
    """
    packed, below = _quantize(x, book, block_size, rule, window, name, finite)
    if below is None:
        used = book.largest_stored_delta if window is None else window
        below = reference.blocks_below_window(x, block_size, used)
    return Quantized(packed, below)


def dequantize(p: PackedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values of a packed tensor, `dtype` [N, K], the bits of ``p.dequantize(dtype)``."""
    if p.device.type != "cpu" or not cpu.available():
        return p.dequantize(dtype)
    values = cpu.dequantize(p.codes, p.meta, p.row_exponent, p.shape[1], p.book, p.block_size)
    return values.to(dtype)


def _quantize(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int | None,
    name: str,
    finite: bool,
) -> tuple[PackedTensor, torch.Tensor | None]:
    """The packed tensor, and the blocks below the window if the back end counts them."""
    if x.device.type != "cpu" or not cpu.available():
        kernels = _gpu_kernels(x.device)
        if kernels is None or not kernels.runs_on(x.device):
            return reference.quantize(x, book, block_size, rule, window, name), None
        with _current(x.device):
            return kernels.quantize_weight(x, book, block_size, rule, window, name), None
    window = reference.check_quantize(x, book, block_size, rule, window, name, finite)
    codes, meta, row_exponent, below = cpu.quantize(x, book, block_size, rule, window)
    shape = (x.shape[0], x.shape[1])
    return PackedTensor(codes, meta, row_exponent, shape, book, block_size), below


def dialect_linear(
    x: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None = None,
    activation_format: str = "dialect",
    accumulation: str = "default",
) -> torch.Tensor:
    """``x @ p.T + bias`` with activations rounded in flight.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        p: packed weight [N, K] on x's device.
        bias: [N] or None; added in float32.
        activation_format: ``"dialect"`` (W4A4: each token is rounded with the weight's book and
            block size; BlockDialect), ``"fp8"`` (W4A8: E4M3 with a float32 scale per token; ours)
            or ``"none"`` (W4A16; ours).
        accumulation: ``"exact"`` (exact block sums, added in float32 in a fixed order: the same
            bits whatever device, batch or thread count) or ``"default"`` (may be faster; within
            ``2**-7 * sum |a b|``).

    Returns:
        [..., N] in x's dtype. A token with NaN or Inf gives a row of NaN (``"none"``: plain IEEE).

    Raises:
        ValueError: if shapes, dtypes, devices or options do not fit.
    """
    reference.check_linear(x, p.shape, bias, activation_format, accumulation)
    if x.device != p.device:
        raise ValueError(f"x: is on {x.device}, the weight on {p.device}; move them to one device")
    y: torch.Tensor = linear(
        x,
        p.codes,
        p.meta,
        p.row_exponent,
        bias,
        p.shape[1],
        p.book.name,
        p.block_size,
        activation_format,
        accumulation,
    )
    return y


linear = torch.ops.blockdialect.linear
"""The op behind :func:`dialect_linear`: the same on plain tensors, without checks."""


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    book: str,
    block_size: int,
    activation_format: str,
    accumulation: str,
) -> torch.Tensor:
    formatbook = book_by_name(book)
    if x.device.type == "cpu" and cpu.available():
        y = cpu.linear(
            reference.as_tokens(x),
            codes,
            meta,
            row_exponent,
            in_features,
            formatbook,
            block_size,
            activation_format,
            bias,
        )
        return y.view(*x.shape[:-1], codes.shape[0])
    shape = (codes.shape[0], in_features)
    p = PackedTensor(codes, meta, row_exponent, shape, formatbook, block_size)
    kernels = _gpu_kernels(x.device)
    if kernels is not None and kernels.covers(x, p, activation_format, accumulation):
        with _current(x.device):
            result: torch.Tensor = kernels.linear(
                reference.as_tokens(x), p, bias, activation_format, accumulation
            )
        return result.view(*x.shape[:-1], codes.shape[0])
    if accumulation == "exact":
        return reference.dialect_linear(x, p, bias, activation_format, accumulation)
    return _decoded_linear(x, p, bias, activation_format)


@torch.library.register_fake("blockdialect::linear", lib=_library)  # type: ignore[untyped-decorator]
def _linear_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    book: str,
    block_size: int,
    activation_format: str,
    accumulation: str,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def warm_up(
    p: PackedTensor,
    activation_format: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
) -> None:
    """Compile all that products with this weight can need on its GPU; nothing to do on a CPU.

    Args:
        p: packed weight [N, K].
        activation_format: as for :func:`dialect_linear`.
        dtype: of the tokens to come.
        bias_dtype: of the bias, if there is one.
    """
    if p.device.type == "cuda":
        kernels = _gpu_kernels(p.device)
        if kernels is not None:
            with _current(p.device):
                kernels.warm_up(p, activation_format, dtype, bias_dtype)


def _gpu_kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels if the device runs them: a GPU, or the CPU in Triton's interpreter."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return _import_gpu_kernels()
    return None


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: Triton launches there, wherever a kernel's tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _import_gpu_kernels() -> ModuleType | None:
    try:
        from .gpu import linear as gpu
    except ImportError as error:  # torch without Triton
        _say_once(f"no GPU kernels: {error}")
        return None
    return gpu


def _decoded_linear(
    x: torch.Tensor, p: PackedTensor, bias: torch.Tensor | None, activation_format: str
) -> torch.Tensor:
    """The torch path: exact operands, the library's float32 GEMM.

    The weight is decoded in every call: a decoded copy kept beside the packed one could not see
    that an engine has written other weights into the same memory.
    """
    _say_once(
        "no compiled kernel for this product: weights are decoded in every call, which is slow"
    )
    tokens = reference.as_tokens(x)
    weight = p.dequantize(torch.float32)
    if activation_format == "dialect":
        y = F.linear(reference.round_activation(tokens, p.book, p.block_size), weight)
    elif activation_format == "fp8":
        q, scale = reference.quantize_fp8(tokens)
        # the scale goes first: tiny activations times huge weights must not overflow on the way
        y = F.linear(q.to(torch.float32) * scale[:, None], weight)
    else:
        y = F.linear(tokens.to(torch.float32), weight)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype).view(*x.shape[:-1], p.shape[0])


@cache
def _say_once(message: str) -> None:
    _log.warning(message)


def semantic_linear(
    x: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None = None,
    salient: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ p.T + bias`` with decomposed salient tokens and grouped dialects (SemanticDialect).

    Arguments, result and errors as :func:`dialect_kernels.reference.semantic_linear`; on CPU the
    same bits.
    """
    reference.check_semantic(x, p.shape, p.book, bias, salient, group)
    if x.device != p.device:
        raise ValueError(f"x: is on {x.device}, the weight on {p.device}; move them to one device")
    y: torch.Tensor = semantic_op(
        x,
        p.codes,
        p.meta,
        p.row_exponent,
        bias,
        p.shape[1],
        p.book.name,
        p.block_size,
        None if salient is None else _each_once(salient),
        None if group is None else _renumbered(group),
    )
    return y


semantic_op = torch.ops.blockdialect.semantic_linear
"""The op behind :func:`semantic_linear`: the same on plain tensors, without checks, never waiting
for a GPU. It needs each salient token of a sample once (-1 is an unused place), and group numbers
below the sample's number of tokens."""


def _each_once(salient: torch.Tensor) -> torch.Tensor:
    """The named tokens of every sample, ascending; -1 where one is named again."""
    ordered = salient.sort(dim=-1).values
    repeated = ordered[..., 1:] == ordered[..., :-1]
    ordered[..., 1:] = torch.where(repeated, -1, ordered[..., 1:])
    return ordered


def _renumbered(group: torch.Tensor) -> torch.Tensor:
    """The same groups with the smallest numbers there are, int32; -1 stays."""
    ordered, position = group.to(torch.int64).sort(dim=-1)
    number = torch.zeros_like(ordered)
    number[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).cumsum(dim=-1)
    renumbered = torch.empty_like(number).scatter_(-1, position, number)
    return torch.where(group >= 0, renumbered, -1).to(torch.int32)


@torch.library.impl(_library, "semantic_linear", "CompositeExplicitAutograd")
def _semantic_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    book: str,
    block_size: int,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
) -> torch.Tensor:
    tokens = reference.as_tokens(x)
    shape = (codes.shape[0], in_features)
    p = PackedTensor(codes, meta, row_exponent, shape, book_by_name(book), block_size)
    on_cpu = x.device.type == "cpu" and cpu.available()
    kernels = None if on_cpu else _gpu_kernels(x.device)
    if kernels is not None and kernels.covers(tokens, p, "dialect", "default"):
        with _current(x.device):
            y: torch.Tensor = kernels.semantic_linear(
                tokens, p, bias, _by_sample(salient, x), _by_sample(group, x, torch.int32)
            )
        return y.view(*x.shape[:-1], shape[0])
    rows = reference.salient_rows(salient, x)
    groups = None if group is None else reference.group_numbers(group)
    products = _decomposed_on_cpu if on_cpu else _decomposed_by_torch
    y = products(tokens, p, rows, groups)
    y, left_over = y[: tokens.shape[0]], y[tokens.shape[0] :]
    y[rows] += left_over
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype).view(*x.shape[:-1], shape[0])


def _by_sample(
    numbers: torch.Tensor | None, x: torch.Tensor, dtype: torch.dtype = torch.int64
) -> torch.Tensor | None:
    """Numbers below T of [B, ...] samples as numbers below B * T, flattened; -1 stays."""
    if numbers is None:
        return None
    if numbers.dim() == 2:
        sample = torch.arange(numbers.shape[0], device=numbers.device)[:, None]
        numbers = torch.where(numbers >= 0, numbers + sample * x.shape[-2], -1)
    return numbers.flatten().to(dtype)


def _decomposed_on_cpu(
    tokens: torch.Tensor, p: PackedTensor, rows: torch.Tensor, groups: torch.Tensor | None
) -> torch.Tensor:
    """Rounded tokens and then the residuals of `rows` times the weight, float32 [T + S, N]."""
    variants = None
    if groups is not None:
        costs = cpu.variant_costs(tokens, p.book, p.block_size)
        variants = reference.group_variants(costs, groups)
    return cpu.decomposed_linear(
        tokens, variants, rows, p.codes, p.meta, p.row_exponent, p.shape[1], p.book, p.block_size
    )


def _decomposed_by_torch(
    tokens: torch.Tensor, p: PackedTensor, rows: torch.Tensor, groups: torch.Tensor | None
) -> torch.Tensor:
    """As :func:`_decomposed_on_cpu`."""
    rounded = reference.round_activation(tokens, p.book, p.block_size, groups)
    residual = tokens[rows].to(torch.float32) - rounded[rows]
    residual = reference.round_activation(residual, p.book, p.block_size)
    return F.linear(torch.cat([rounded, residual]), p.dequantize(torch.float32))


@torch.library.register_fake("blockdialect::semantic_linear", lib=_library)  # type: ignore[untyped-decorator]
def _semantic_linear_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    book: str,
    block_size: int,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])
