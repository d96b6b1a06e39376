"""The linear layers on a GPU: choose a plan, quantize the tokens, multiply.

:func:`covers` says which products the kernels compute; the rest is left to torch.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch

from ..backend import Decoded, Weights
from ..packed import PackedTensor
from . import bound
from .gemm import arrivals, launch_eight_bits, launch_sixteen_bits
from .launch import zeroed
from .layout import interpreted, readable, readable_rows
from .library import Library, added_residuals, decode_weight, library_product
from .quantize_activations import quantize_activation
from .quantize_fp8 import quantize_activation_fp8
from .rotation import rotate_tokens
from .tuning import FROM_DECODED, FUSED_FOR_MANY, SCRATCH, GemmPlan, accumulator_bits, choose

__all__ = [
    "EXACT_PLANS",
    "Route",
    "compiled_for",
    "covers",
    "decode_ahead",
    "dialect_linear",
    "first_of_each_route",
    "linears",
    "multiply",
    "quantize_tokens",
    "route",
    "runs_on",
    "semantic_linear",
    "table_of",
    "warm_up",
]

_FP8_CAPABILITY = (8, 9)
_LEAST_CAPABILITY = (8, 0)
EXACT_PLANS = (
    (16, GemmPlan("fused", 16, 64, 64, num_stages=3)),
    (2**31, GemmPlan("fused", 64, 64, 64, num_stages=3)),
)
"""(largest T, tile) of the mode `exact`; any gives the same bits."""

_MOST_TOKENS = 1 << 17
"""Kernels for products of more tokens are not compiled ahead."""


class _Device(NamedTuple):
    name: str
    processors: int
    capability: tuple[int, int]
    cache: int = 0
    """Bytes of the L2 cache."""


class Route(NamedTuple):
    """How a product is computed.

    Attributes:
        plan: tile and splits, or the library.
        eight_bits: operands are E4M3 on the FP8 MMA; else 16-bit numbers.
        exact: block by block, in the mode `exact`.
    """

    plan: GemmPlan
    eight_bits: bool
    exact: bool = False

    @property
    def decodes_to_memory(self) -> bool:
        """Whether a library's GEMM multiplies."""
        return self.plan.kind == "scratch"


def runs_on(device: torch.device) -> bool:
    """Whether the device runs the kernels: compute capability 8.0, or Triton's interpreter."""
    if device.type == "cuda":
        return _device(device).capability >= _LEAST_CAPABILITY
    return device.type == "cpu" and interpreted()


def covers(x: torch.Tensor, p: PackedTensor, activation_format: str, accumulation: str) -> bool:
    """Whether the kernels compute this product.

    ``exact`` means the reference's bits, which the MMA gives for W4A4 only; W4A16 needs 16-bit
    tokens.
    """
    if not runs_on(x.device):
        return False
    if accumulation == "exact" and activation_format != "dialect":
        return False
    if activation_format == "none" and x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return p.shape[1] > 0


def decode_ahead(
    p: PackedTensor,
    activation_format: str,
    dtype: torch.dtype,
    into: Decoded | None = None,
) -> Decoded | None:
    """A weight's exact values for products of more than 64 tokens, which then decode nothing.

    Args:
        p: packed weight [N, K].
        activation_format: of the products.
        dtype: of their tokens.
        into: an earlier result for a weight of this shape, whose memory is written again.

    Returns:
        E4M3 (one byte more for each weight), or bfloat16 (two) for 16-bit operands; None where no
        product would read it: without such a GPU, and for 16-bit activations that are not bfloat16.
    """
    if not runs_on(p.device) or 0 in p.shape:
        return None
    if activation_format == "none" and dtype != torch.bfloat16:
        return None
    return decode_weight(p, _has_eight_bits(activation_format, _device(p.device)), into)


def dialect_linear(
    tokens: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
    decoded: Decoded | None = None,
) -> torch.Tensor:
    """``tokens @ p.T + bias`` as :func:`dialect_kernels.dialect_linear`, for covered products.

    Two launches where the kernel decodes in registers or a library multiplies with what is
    `decoded` already, three where a library multiplies; one more for the 16-bit tokens of a rotated
    weight.

    Args:
        tokens: float32, bfloat16 or float16 [T, K].
        decoded: what :func:`decode_ahead` made of `p` for this format and these tokens' dtype.

    Returns:
        [T, N] in the tokens' dtype, contiguous.
    """
    if tokens.shape[0] == 0 or p.shape[0] == 0:
        return tokens.new_empty(tokens.shape[0], p.shape[0])

    def compute() -> tuple[torch.Tensor]:
        return (_dialect_linear(tokens, p, bias, activation_format, accumulation, decoded),)

    from_library = decoded is not None and tokens.shape[0] >= FROM_DECODED
    if accumulation == "exact" or from_library:
        return compute()[0]
    return bound.results(p, (tokens, bias), ("product", activation_format), compute)[0]


def _dialect_linear(
    tokens: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
    decoded: Decoded | None = None,
) -> torch.Tensor:
    """As :func:`dialect_linear`, for at least one token and one feature; nothing is bound."""
    how = route(
        tokens.shape[0],
        p.shape,
        activation_format,
        tokens.dtype,
        tokens.device,
        accumulation,
        decoded is not None,
    )
    if activation_format == "none":
        if p.rotation != "none":
            tokens = rotate_tokens(tokens)
        return multiply(readable_rows(tokens), None, p, bias, tokens.dtype, how, decoded=decoded)
    if how.decodes_to_memory:
        q, scale = _operands(tokens, p, activation_format, how)
        return multiply(q, scale, p, bias, tokens.dtype, how, decoded=decoded)
    zeros = arrivals(tokens.shape[0], p.shape[0], how.plan, tokens.device)
    q, scale = quantize_tokens(tokens, p, activation_format, how, zeros=zeros)
    return multiply(q, scale, p, bias, tokens.dtype, how, arrived=zeros)


def semantic_linear(
    tokens: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor | None,
    group: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`dialect_kernels.semantic_linear`, for covered W4A4 products; never waits.

    Args:
        tokens: float32, bfloat16 or float16 [T, K].
        p: packed weight [N, K], K > 0.
        bias: [N] or None.
        rows: int64 [S] or None, the salient tokens, each once; -1 is an unused place.
        group: int32 [T] or None; tokens with the same number in 0..T-1 share variants.

    Returns:
        [T, N] in the tokens' dtype. Where a library multiplies whose GEMM cannot return float32,
        products and residual products are bfloat16 before they are added.
    """
    count = tokens.shape[0]
    if count == 0 or p.shape[0] == 0:
        return tokens.new_empty(count, p.shape[0])
    all_rows = count + (0 if rows is None else rows.shape[0])
    how = route(all_rows, p.shape, "dialect", tokens.dtype, tokens.device)
    if how.decodes_to_memory:
        q, scale = _operands(tokens, p, "dialect", how, rows, group)
        return _with_residuals(q, scale, p, bias, tokens.dtype, how, rows)

    def compute() -> tuple[torch.Tensor]:
        zeros = arrivals(all_rows, p.shape[0], how.plan, tokens.device)
        q, scale = quantize_tokens(tokens, p, "dialect", how, rows, group, zeros)
        if rows is None:
            return (multiply(q, scale, p, bias, tokens.dtype, how, arrived=zeros),)
        return (multiply(q, scale, p, None, torch.float32, how, arrived=zeros),)

    added = bias if rows is None else None
    (y,) = bound.results(p, (tokens, added, rows, group), ("semantic", how), compute)
    return y if rows is None else _added_up(y, bias, tokens.dtype, rows)


def linears(
    tokens: torch.Tensor,
    weights: Weights,
    activation_format: str,
    rows: torch.Tensor | None,
    group: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Products of the same tokens with several weights, as the protocol of back ends has them.

    Operands do not depend on the weight's rows, nor on the plan: one quantizer serves all weights,
    whose products are those that each of them would have alone.
    """
    count = tokens.shape[0]
    if count == 0 or activation_format == "none":
        return [dialect_linear(tokens, p, b, activation_format, "default") for p, b in weights]
    all_rows = count + (0 if rows is None else rows.shape[0])
    first = weights[0][0]
    how = route(all_rows, first.shape, activation_format, tokens.dtype, tokens.device)
    q, scale = _operands(tokens, first, activation_format, how, rows, group)
    products = []
    for p, bias in weights:
        if p.shape[0] == 0:
            products.append(tokens.new_empty(count, 0))
            continue
        how = route(all_rows, p.shape, activation_format, tokens.dtype, tokens.device)
        products.append(_with_residuals(q, scale, p, bias, tokens.dtype, how, rows))
    return products


def _operands(
    tokens: torch.Tensor,
    p: PackedTensor,
    activation_format: str,
    how: Route,
    rows: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_tokens`, by bound launches."""
    q, scale = bound.results(
        p,
        (tokens, rows, group),
        ("operands", activation_format, how.eight_bits),
        lambda: quantize_tokens(tokens, p, activation_format, how, rows, group),
    )
    return q, scale


def _with_residuals(
    q: torch.Tensor,
    scale: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    how: Route,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """Products of tokens and of the residuals of some rows, added up: [T, N]."""
    if how.decodes_to_memory:
        library = _library(q.device, how.eight_bits)
        return library_product(q, scale, p, bias, dtype, library, rows)
    added, wide = (bias, dtype) if rows is None else (None, torch.float32)
    (y,) = bound.results(
        p,
        (q, scale, added),
        ("of operands", how, wide),
        lambda: (multiply(q, scale, p, added, wide, how),),
    )
    return y if rows is None else _added_up(y, bias, dtype, rows)


def _added_up(
    y: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, rows: torch.Tensor
) -> torch.Tensor:
    """Products [T + S, N] in float32 with residuals and bias added, rounded once: [T, N]."""
    y = added_residuals(y, rows)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(dtype)


def route(
    tokens: int,
    shape: tuple[int, int],
    activation_format: str,
    dtype: torch.dtype,
    device: torch.device,
    accumulation: str = "default",
    decoded: bool = False,
) -> Route:
    """How T tokens are multiplied with a weight of `shape` [N, K].

    Args:
        tokens: T, at least 1.
        shape: N and K.
        activation_format: ``"dialect"``, ``"fp8"`` or ``"none"``.
        dtype: of the tokens as they are given.
        device: where they are.
        accumulation: ``"default"`` or ``"exact"``.
        decoded: whether the weight is kept decoded.
    """
    facts = _device(device)
    if decoded and accumulation == "default" and tokens >= FROM_DECODED:
        return Route(SCRATCH, _has_eight_bits(activation_format, facts))
    return _route(tokens, shape, activation_format, dtype, facts, accumulation)


def _has_eight_bits(activation_format: str, facts: _Device) -> bool:
    return activation_format != "none" and facts.capability >= _FP8_CAPABILITY


@lru_cache(maxsize=4096)
def _route(
    tokens: int,
    shape: tuple[int, int],
    activation_format: str,
    dtype: torch.dtype,
    facts: _Device,
    accumulation: str,
) -> Route:
    if accumulation == "exact":
        return Route(next(plan for most, plan in EXACT_PLANS if tokens <= most), False, True)
    eight_bits = _has_eight_bits(activation_format, facts)
    table = table_of(facts.capability, eight_bits)
    plan = choose(tokens, *shape, activation_format, facts.name, facts.processors, table)
    if plan.kind == "scratch" and activation_format == "none" and dtype == torch.float16:
        # beside a weight of bfloat16 tokens would lose bits, one of float16 could overflow
        plan = FUSED_FOR_MANY
    return Route(plan, eight_bits)


def quantize_tokens(
    tokens: torch.Tensor,
    p: PackedTensor,
    activation_format: str,
    how: Route,
    salient: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens as a route's operands: (q [T + S, Kp], float32 scale [T + S]).

    Args:
        tokens: float32, bfloat16 or float16 [T, K].
        p: the weight they are for.
        activation_format: ``"dialect"`` or ``"fp8"``.
        how: decides dtype and order of q.
        salient, group: see :func:`semantic_linear`.
        zeros: int32 memory to be filled with zeros, or None.
    """
    dtype = torch.float8_e4m3fn if how.eight_bits else torch.bfloat16
    if activation_format == "fp8":
        return quantize_activation_fp8(
            tokens,
            p.block_size,
            dtype=dtype,
            operand_order=how.eight_bits,
            zeros=zeros,
            rotation=p.rotation,
        )
    return quantize_activation(
        tokens,
        p.book,
        p.block_size,
        salient=salient,
        group=group,
        dtype=dtype,
        operand_order=how.eight_bits,
        zeros=zeros,
        rotation=p.rotation,
    )


def multiply(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    p: PackedTensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    how: Route,
    arrived: torch.Tensor | None = None,
    decoded: Decoded | None = None,
) -> torch.Tensor:
    """``(x * scale) @ p.T + bias`` of a route's operands, at least one token.

    Args:
        x: from :func:`quantize_tokens`, or bfloat16 or float16 [T, K] with neighbouring elements
            (of a rotated weight, rotated).
        scale: float32 [T], or None for 16-bit tokens.
        p: packed weight [N, K], N > 0.
        bias: [N] or None.
        dtype: of the result.
        how: the route.
        arrived: zeros in the memory from :func:`~.gemm.arrivals`; None makes them.
        decoded: from :func:`decode_ahead`, or None.

    Returns:
        [T, N], contiguous.
    """
    bias = None if bias is None else readable(bias)
    if how.decodes_to_memory:
        library = _library(x.device, how.eight_bits)
        return library_product(x, scale, p, bias, dtype, library, decoded=decoded)
    if arrived is None:
        arrived = arrivals(x.shape[0], p.shape[0], how.plan, x.device)
        arrived = None if arrived is None else zeroed(arrived)
    y = torch.empty(x.shape[0], p.shape[0], dtype=dtype, device=x.device)
    if how.eight_bits:
        assert scale is not None, "8-bit tokens have scales"
        launch_eight_bits(x, scale, p, bias, y, how.plan, arrived)
    else:
        launch_sixteen_bits(x, scale, p, bias, y, how.plan, arrived, how.exact)
    return y


def warm_up(
    p: PackedTensor,
    activation_format: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
    decoded: Decoded | None = None,
) -> None:
    """Compile every kernel that products of tokens with this weight can need, by running it.

    Weights of the same shape (see :func:`compiled_for`) share kernels: only the first
    of them costs time.

    Args:
        p: packed weight [N, K].
        activation_format: ``"dialect"``, ``"fp8"`` or ``"none"``.
        dtype: of the tokens to come.
        bias_dtype: of the bias, if there is one.
        decoded: from :func:`decode_ahead`, or None.
    """
    if p.shape[0] == 0 or not runs_on(p.device):
        return
    ahead = decoded is not None
    facts = (*compiled_for(p), bias_dtype, activation_format, dtype, ahead)
    if facts in _warm:
        return
    bias = None
    if bias_dtype is not None:
        bias = torch.zeros(p.shape[0], dtype=bias_dtype, device=p.device)
    for tokens in first_of_each_route(p.shape, activation_format, dtype, p.device, ahead):
        x = torch.zeros(tokens, p.shape[1], dtype=dtype, device=p.device)
        if covers(x, p, activation_format, "default"):
            dialect_linear(x, p, bias, activation_format, "default", decoded)
    _warm.add(facts)


_warm: set[tuple[object, ...]] = set()


def compiled_for(p: PackedTensor) -> tuple[object, ...]:
    """What weights have in common that share their compiled kernels."""
    begin = tuple(tensor.data_ptr() % 16 == 0 for tensor in p.tensors)
    return (p.shape, p.book.name, p.block_size, p.rotation, p.device, begin)


def first_of_each_route(
    shape: tuple[int, int],
    activation_format: str,
    dtype: torch.dtype,
    device: torch.device,
    decoded: bool = False,
) -> list[int]:
    """The smallest numbers of tokens that together need every kernel that any number needs."""
    first: dict[tuple[object, ...], int] = {}
    tokens = 1
    while tokens <= _MOST_TOKENS:
        how = route(tokens, shape, activation_format, dtype, device, decoded=decoded)
        plan = how.plan
        tile = (plan.tokens, plan.features, plan.columns, plan.num_warps, plan.num_stages)
        key = (plan.kind, plan.splits > 1, *(() if how.decodes_to_memory else tile))
        first.setdefault(key, tokens)
        tokens += 1 if tokens < 4096 else tokens // 64
    return sorted(first.values())


def table_of(capability: tuple[int, int], eight_bits: bool) -> str:
    """The dispatch table of a device, see :data:`~.tuning.TABLES`."""
    operands = "fp8" if eight_bits else "sixteen_bits"
    if capability[0] == 10:
        return f"{operands}_in_tensor_memory"
    return operands if capability[0] == 9 else f"{operands}_in_warps"


@cache
def _device(device: torch.device) -> _Device:
    if device.type == "cpu":  # Triton's interpreter
        return _Device("interpreter", 4, (9, 0))
    properties = torch.cuda.get_device_properties(device)
    return _Device(
        properties.name,
        properties.multi_processor_count,
        (properties.major, properties.minor),
        properties.L2_cache_size,
    )


def _library(device: torch.device, eight_bits: bool) -> Library:
    facts = _device(device)
    return Library(eight_bits, facts.cache, accumulator_bits(facts.name))
