"""The public functions, the torch ops behind four of them, and the choice of a back end.

``torch.ops.blockdialect.linear``, ``semantic_linear``, ``grouped_linear`` and ``embedding`` take
plain tensors, so that engines can trace and compile through them; :func:`dialect_linear`,
:func:`semantic_linear`, :func:`expert_linear` and :func:`dialect_embedding` are the same on a
:class:`PackedTensor` or on :class:`PackedExperts`, with checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch

from . import cpu, gpu, torch_backend
from .arguments import (
    as_tokens,
    check_embedding,
    check_grouped,
    check_linear,
    check_loss,
    check_quantize,
    check_semantic,
    each_once,
    numbers_of_batch,
    renumbered,
)
from .backend import Backend, BlockGrid, Decoded, Quantized, Weights
from .formatbook import DIALECT_FP4, Formatbook, Rotation
from .packed import PackedTensor
from .packed_experts import PackedExperts
from .rotation import rotate_activation
from .straight_through import straight_through

__all__ = [
    "decode_ahead",
    "dequantize",
    "devices",
    "dialect_embedding",
    "dialect_linear",
    "embedding",
    "expert_linear",
    "feed_back",
    "grouped_linear",
    "linear",
    "linears",
    "quantize",
    "quantize_counted",
    "rounding_loss",
    "semantic_linear",
    "semantic_op",
    "warm_up",
    "warm_up_experts",
]

_BACKENDS: Final[tuple[Backend, ...]] = (cpu, gpu, torch_backend)
"""In the order in which they are chosen."""


def devices() -> tuple[torch.device, ...]:
    """The devices of this machine that the functions below compute on."""
    cuda = (torch.device("cuda"),) if torch.cuda.is_available() else ()
    return (torch.device("cpu"), *cuda)


def _running(device: torch.device) -> Backend:
    """The back end that quantizes and decodes tensors on `device`."""
    return next(backend for backend in _BACKENDS if backend.runs_on(device))


def _covering(
    x: torch.Tensor, p: PackedTensor, activation_format: str, accumulation: str
) -> Backend:
    """The back end that computes a product."""
    for backend in _BACKENDS:
        if backend.covers(x, p, activation_format, accumulation):
            return backend
    raise AssertionError("torch covers every product")


def quantize(
    x: torch.Tensor,
    book: Formatbook = DIALECT_FP4,
    block_size: int = 32,
    rule: str = "mse",
    window: int | None = None,
    name: str = "tensor",
    rotation: Rotation = "none",
) -> PackedTensor:
    """Quantize a matrix; see :func:`dialect_kernels.reference.quantize`, whose bytes it returns."""
    window = check_quantize(x, book, block_size, rule, window, name, rotation)
    return _running(x.device).quantize(x, book, block_size, rule, window, rotation)


def quantize_counted(
    x: torch.Tensor,
    book: Formatbook = DIALECT_FP4,
    block_size: int = 32,
    rule: str = "mse",
    window: int | None = None,
    name: str = "tensor",
    finite: bool = False,
    rotation: Rotation = "none",
) -> Quantized:
    """As :func:`quantize`, with the number of blocks below the window in every row.

    Args:
        finite: whether the caller knows that `x` is finite; it is then not searched for NaN and
            Inf. A row that holds one nevertheless gets bytes without meaning.
    """
    window = check_quantize(x, book, block_size, rule, window, name, rotation, finite)
    return _running(x.device).quantize_counted(x, book, block_size, rule, window, rotation)


def feed_back(
    block: torch.Tensor,
    factor: torch.Tensor,
    grid: BlockGrid,
    book: Formatbook,
    errors: torch.Tensor,
) -> torch.Tensor:
    """See :func:`dialect_kernels.reference.feed_back`, whose bits it returns."""
    return _running(block.device).feed_back(block, factor, grid, book, errors)


def rounding_loss(x: torch.Tensor, p: PackedTensor) -> torch.Tensor:
    """The energy of a matrix, and of the error that rounding it to `p` made (ours).

    Args:
        x: float32, bfloat16 or float16 [N, K], not rotated.
        p: packed tensor [N, K] on the same device.

    Returns:
        float64 [N, 2]: the sums of ``x**2`` and of ``(x - p)**2`` in every row; those of a rotated
        tensor are taken over the rotated matrix and divided by 32.

    Raises:
        ValueError: if shape, dtype or device of `x` do not fit.
    """
    check_loss(x, p)
    return _running(p.device).rounding_loss(x, p)


def dequantize(p: PackedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values of a packed tensor, `dtype` [N, K]: the bits of ``p.dequantize(dtype)``."""
    return _running(p.device).dequantize(p, dtype)


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
        p: packed weight [N, K] on x's device; the activations of a rotated one are rotated before
            they are rounded (ours).
        bias: [N] or None; added in float32.
        activation_format: ``"dialect"`` (W4A4: each token is rounded with the weight's book and
            block size; BlockDialect), ``"fp8"`` (W4A8: E4M3 with a float32 scale per token; ours)
            or ``"none"`` (W4A16; ours).
        accumulation: ``"exact"`` (exact block sums, added in float32 in a fixed order: the same
            bits whatever device, batch or thread count) or ``"default"`` (may be faster; within
            ``2**-7 * sum |a b|``).

    Returns:
        [..., N] in x's dtype. A token with NaN or Inf, or that overflows when it is rotated, gives
        a row of NaN (``"none"``: plain IEEE). Its gradient for `x` and `bias` is that of a product
        with the decoded weight (ours).

    Raises:
        ValueError: if shapes, dtypes, devices or options do not fit.
    """
    check_linear(x, p, bias, activation_format, accumulation)

    def product(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = linear(
            x, *p.op_arguments(bias), activation_format, accumulation, p.rotation
        )
        return y

    return straight_through(x, _Weight(p, bias, product))


def expert_linear(
    x: torch.Tensor,
    experts: PackedExperts,
    offsets: torch.Tensor,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation_format: str = "dialect",
    accumulation: str = "default",
) -> torch.Tensor:
    """Products of tokens with some of many weights, as a mixture of experts needs them (ours).

    Row i of the result is :func:`dialect_linear` of one token and of the expert that row i belongs
    to: the same bits in the mode ``"exact"``, within its bound in ``"default"``. Rows are sorted by
    expert; a token may have any number of rows.

    Args:
        x: float32, bfloat16 or float16 [T, K].
        experts: E packed weights [N, K] on x's device.
        offsets: int64 [E + 1], ascending in 0..R: rows offsets[e]..offsets[e+1]-1 belong to
            expert e. Rows that belong to none are 0.
        rows: int64 [R], the token of each row; None: R = T and row i is of token i.
        bias: [E, N] or None; added in float32.
        activation_format, accumulation: as for :func:`dialect_linear`.

    Returns:
        [R, N] in x's dtype.

    Raises:
        ValueError: if shapes, dtypes, devices, options, rows or offsets do not fit, or a gradient
            is required, which this product does not have.
    """
    check_grouped(x, experts, offsets, rows, bias, activation_format, accumulation)
    y: torch.Tensor = grouped_linear(
        x,
        rows,
        offsets,
        *experts.op_arguments(bias),
        activation_format,
        accumulation,
        experts.together.rotation,
    )
    return y


def semantic_linear(
    x: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None = None,
    salient: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ p.T + bias`` with decomposed salient tokens and grouped dialects (SemanticDialect).

    Arguments, result and errors as :func:`dialect_kernels.reference.semantic_linear`; on CPU the
    same bits. The gradient is that of :func:`dialect_linear`.
    """
    check_semantic(x, p, bias, salient, group)
    once = None if salient is None else each_once(salient)
    numbers = None if group is None else renumbered(group)

    def product(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = semantic_op(x, *p.op_arguments(bias), once, numbers, p.rotation)
        return y

    return straight_through(x, _Weight(p, bias, product))


class _Weight(NamedTuple):
    """A weight, as the gradient of a product with it needs it."""

    packed: PackedTensor
    bias: torch.Tensor | None
    product: Callable[[torch.Tensor], torch.Tensor]

    def decode(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [N, K], rotated back."""
        values = rotate_activation(dequantize(self.packed), self.packed.rotation)
        return values.to(dtype or values.dtype)


def dialect_embedding(
    ids: torch.Tensor, p: PackedTensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The rows of a packed embedding matrix that token ids name (ours).

    Args:
        ids: integers [...].
        p: packed tensor [V, K] on the same device, not rotated.
        dtype: float32, bfloat16 or float16.

    Returns:
        `dtype` [..., K]: the bits of ``p.dequantize(dtype)[ids]``, each value rounded once.

    Raises:
        ValueError: if dtypes or devices do not fit, or `p` is rotated.
        IndexError: on a CPU, if an id is outside 0..V-1; a GPU gives a row of NaN.
    """
    check_embedding(ids, p, dtype)
    rows: torch.Tensor = embedding(ids, *p.tensors, p.shape[1], p.book.name, p.block_size, dtype)
    return rows


def warm_up(
    p: PackedTensor,
    activation_format: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
    decoded: Decoded | None = None,
) -> None:
    """Compile all that products with this weight can need on its GPU; nothing to do on a CPU.

    Args:
        p: packed weight [N, K].
        activation_format: as for :func:`dialect_linear`.
        dtype: of the tokens to come.
        bias_dtype: of the bias, if there is one.
        decoded: from :func:`decode_ahead`, or None.
    """
    _running(p.device).warm_up(p, activation_format, dtype, bias_dtype, decoded)


def decode_ahead(
    p: PackedTensor,
    activation_format: str,
    dtype: torch.dtype,
    into: Decoded | None = None,
) -> Decoded | None:
    """A weight's exact values, to be kept beside it for :data:`linear`: memory for time.

    A GPU's products of more than 64 tokens then decode nothing. On a CPU, whose products decode in
    their caches, nothing would read them.

    Args:
        p: packed weight [N, K].
        activation_format: as for :func:`dialect_linear`.
        dtype: of the tokens to come.
        into: an earlier result for a weight of this shape, whose memory is written again.

    Returns:
        One byte more for each weight, or two where its GPU multiplies 16-bit numbers; None where
        no product would read it.
    """
    if _running(p.device) is not gpu:
        return None
    return gpu.decode_ahead(p, activation_format, dtype, into)


def warm_up_experts(
    experts: PackedExperts,
    activation_format: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
) -> None:
    """As :func:`warm_up`, for products with experts.

    Args:
        experts: E packed weights [N, K].
        activation_format: as for :func:`dialect_linear`.
        dtype: of the tokens to come.
        bias_dtype: of the bias, if there is one.
    """
    backend = _running(experts.device)
    backend.warm_up_experts(experts, activation_format, dtype, bias_dtype)


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
    rotation: str = "none",
    decoded: torch.Tensor | None = None,
    decoded_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    p = PackedTensor.from_op(codes, meta, row_exponent, in_features, book, block_size, rotation)
    ahead = None if decoded is None else Decoded(decoded, decoded_scale)
    backend = _covering(x, p, activation_format, accumulation)
    y = backend.dialect_linear(as_tokens(x), p, bias, activation_format, accumulation, ahead)
    return y.view(*x.shape[:-1], p.shape[0])


def _grouped_linear(
    x: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    book: str,
    block_size: int,
    activation_format: str,
    accumulation: str,
    rotation: str = "none",
) -> torch.Tensor:
    experts = PackedExperts.from_op(
        codes, meta, row_exponent, in_features, book, block_size, rotation
    )
    backend = _covering(x, experts.together, activation_format, accumulation)
    return backend.grouped_linear(x, rows, offsets, experts, bias, activation_format, accumulation)


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
    rotation: str = "none",
) -> torch.Tensor:
    p = PackedTensor.from_op(codes, meta, row_exponent, in_features, book, block_size, rotation)
    rows = numbers_of_batch(salient, x)
    groups = numbers_of_batch(group, x, torch.int32)
    backend = _covering(x, p, "dialect", "default")
    y = backend.semantic_linear(as_tokens(x), p, bias, rows, groups)
    return y.view(*x.shape[:-1], p.shape[0])


def linears(
    x: torch.Tensor,
    weights: Weights,
    activation_format: str,
    salient: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
) -> Sequence[torch.Tensor]:
    """Products of one `x` with several weights, rounded once where that saves time; no checks.

    Args:
        x: float32, bfloat16 or float16 [..., K]; with `salient` or `group` [..., T, K].
        weights: at least one, as :meth:`~.backend.Backend.linears` takes them.
        activation_format: as for :func:`dialect_linear`; ``"dialect"`` with `salient` or `group`.
        salient, group: as :data:`semantic_op` takes them.

    Returns:
        For each weight [N, K] what :data:`semantic_op`, or without `salient` and `group`
        :data:`linear`, gives in the mode ``"default"``: [..., N], the same bits.
    """
    rows = numbers_of_batch(salient, x)
    groups = numbers_of_batch(group, x, torch.int32)
    backend = _covering(x, weights[0][0], activation_format, "default")
    products = backend.linears(as_tokens(x), weights, activation_format, rows, groups)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in products]


def _embedding(
    ids: torch.Tensor,
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    in_features: int,
    book: str,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    p = PackedTensor.from_op(codes, meta, row_exponent, in_features, book, block_size)
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    rows = _running(codes.device).embedding(flat, p, dtype)
    return rows.view(*ids.shape, in_features)


def _like_tokens(x: torch.Tensor, codes: torch.Tensor, *_: object) -> torch.Tensor:
    """The result of `linear` and `semantic_linear` without its contents."""
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _like_rows(
    x: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    *_: object,
) -> torch.Tensor:
    """The result of `grouped_linear` without its contents."""
    return x.new_empty((x if rows is None else rows).shape[0], codes.shape[1])


def _like_embeddings(
    ids: torch.Tensor,
    codes: torch.Tensor,
    meta: torch.Tensor,
    row_exponent: torch.Tensor,
    in_features: int,
    book: str,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The result of `embedding` without its contents."""
    return codes.new_empty(*ids.shape, in_features, dtype=dtype)


# torch.library is not annotated
_library = torch.library.Library("blockdialect", "FRAGMENT")  # type: ignore[no-untyped-call]


def _register(
    name: str, function: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]
) -> None:
    """Make `function` the op ``blockdialect::name``; its annotations are the op's schema."""
    schema = torch.library.infer_schema(function, mutates_args=())
    # sizes may be symbols while an engine traces, a block size is always a number
    schema = schema.replace("SymInt block_size", "int block_size")
    _library.define(name + schema)  # type: ignore[no-untyped-call]
    _library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"blockdialect::{name}", fake, lib=_library)


_register("linear", _linear, _like_tokens)
_register("semantic_linear", _semantic_linear, _like_tokens)
_register("grouped_linear", _grouped_linear, _like_rows)
_register("embedding", _embedding, _like_embeddings)

linear = torch.ops.blockdialect.linear
"""The op behind :func:`dialect_linear`: the same on plain tensors, without checks. Its last two
arguments are what :func:`decode_ahead` made of the weight, or None."""

grouped_linear = torch.ops.blockdialect.grouped_linear
"""The op behind :func:`expert_linear`: the same on plain tensors, without checks. Shapes depend on
shapes alone, so that engines can trace and compile through it."""

semantic_op = torch.ops.blockdialect.semantic_linear
"""The op behind :func:`semantic_linear`: the same on plain tensors, without checks, never waiting
for a GPU. It needs each salient token of a sample once (-1 is an unused place), and group numbers
below the sample's number of tokens."""
embedding = torch.ops.blockdialect.embedding
"""The op behind :func:`dialect_embedding`: the same on plain tensors, without checks of shapes."""
