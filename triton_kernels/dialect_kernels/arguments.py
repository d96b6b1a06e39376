"""Arguments of the public functions: their types, their checks, and the forms kernels take.

Every check raises ValueError with one sentence: the field, its value, what is allowed, the remedy.
"""

from __future__ import annotations

import math
from typing import Final, Literal, get_args

import torch

from .formatbook import ActivationFormat, Formatbook, Rotation
from .packed import PackedTensor, check_block_size
from .packed_experts import PackedExperts
from .rotation import check_rotation, rotate_weight

__all__ = [
    "as_tokens",
    "check_dtype",
    "check_embedding",
    "check_finite",
    "check_group",
    "check_grouped",
    "check_linear",
    "check_loss",
    "check_matrix",
    "check_quantize",
    "check_rotates",
    "check_semantic",
    "each_once",
    "numbers_of_batch",
    "renumbered",
]

_Accumulation = Literal["default", "exact"]

_ACTIVATION_FORMATS: Final[tuple[str, ...]] = get_args(ActivationFormat)
_ACCUMULATIONS: Final[tuple[str, ...]] = get_args(_Accumulation)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LARGEST_GROUP = 2**31 - 1
_ALWAYS_ROTATES = 2.0**122
"""Numbers up to this one never overflow when they are rotated."""


def check_matrix(x: torch.Tensor, name: str) -> None:
    """Raise ValueError unless `x` is 2-D float32, bfloat16 or float16."""
    check_dtype(x, name)
    if x.dim() != 2:
        raise ValueError(f"{name}: has shape {list(x.shape)}; it must be 2-D [rows, columns]")


def check_dtype(x: torch.Tensor, name: str) -> None:
    """Raise ValueError unless `x` is float32, bfloat16 or float16."""
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"{name}: has dtype {x.dtype}; allowed are float32, bfloat16 and float16: convert it "
            "first"
        )


def check_finite(x: torch.Tensor, name: str) -> None:
    """Raise ValueError naming the first position if `x` holds NaN or Inf."""
    if not x.numel() or all(bool(end.isfinite()) for end in torch.aminmax(x)):
        return  # minimum and maximum are NaN if any element is
    position = (~x.isfinite()).nonzero()[0].tolist()
    value = float(x[tuple(position)])
    raise ValueError(
        f"{name}: {value} at {position}; only finite values can be quantized: repair the tensor or "
        "leave it in 16 bit"
    )


def check_quantize(
    x: torch.Tensor,
    book: Formatbook,
    block_size: int,
    rule: str,
    window: int | None,
    name: str,
    rotation: Rotation,
    finite: bool = False,
) -> int:
    """Return the window to use; raise ValueError unless the arguments of ``quantize`` fit.

    `finite` says that the caller knows `x` to be finite.
    """
    check_matrix(x, name)
    check_block_size(block_size)
    check_rotation(rotation, x.shape[1], name)
    if rule not in book.rules:
        allowed = " and ".join(map(repr, book.rules))
        raise ValueError(f"rule: {rule!r} with book {book.name!r}; allowed are {allowed}")
    largest = book.largest_stored_delta
    if window is None:
        window = largest
    if not 0 <= window <= largest:
        raise ValueError(f"window: {window} with book {book.name!r}; allowed are 0..{largest}")
    if not finite:
        check_finite(x, name)
    check_rotates(x, rotation, name)
    return window


def check_loss(x: torch.Tensor, p: PackedTensor) -> None:
    """Raise ValueError unless `x` is a matrix that may have been quantized to `p`."""
    check_dtype(x, "x")
    if x.shape != p.shape:
        raise ValueError(
            f"x: has shape {list(x.shape)}; it must be that of the packed tensor, {list(p.shape)}"
        )
    if x.device != p.device:
        raise ValueError(
            f"x: is on {x.device}, the packed tensor on {p.device}; move them to one device"
        )


def check_embedding(ids: torch.Tensor, p: PackedTensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless `ids` may name rows of `p` as numbers of `dtype`."""
    if ids.dtype not in _INTEGERS:
        raise ValueError(f"ids: has dtype {ids.dtype}; it must be an integer: convert it first")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: {dtype}; allowed are float32, bfloat16 and float16")
    if p.rotation != "none":
        raise ValueError(
            f"p: has the rotation {p.rotation}; an embedding matrix is not rotated: quantize it "
            "with rotation='none'"
        )
    if ids.device != p.device:
        raise ValueError(
            f"ids: is on {ids.device}, the packed tensor on {p.device}; move them to one device"
        )


def check_rotates(x: torch.Tensor, rotation: Rotation, name: str) -> None:
    """Raise ValueError naming the first row of a finite matrix that overflows when rotated."""
    if rotation == "none":
        return
    if not x.numel() or all(abs(float(end)) <= _ALWAYS_ROTATES for end in torch.aminmax(x)):
        return
    overflows = ~rotate_weight(x, rotation).isfinite().all(dim=1)
    if bool(overflows.any()):
        row = int(overflows.nonzero()[0])
        raise ValueError(
            f"{name}: row {row} overflows float32 under rotation {rotation!r}; repair the tensor "
            "or leave it unrotated"
        )


def check_linear(
    x: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
) -> None:
    """Raise ValueError unless these arguments of ``dialect_linear`` fit together."""
    rows, columns = p.shape
    check_dtype(x, "x")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x: has shape {list(x.shape)}; its last dimension must be the weight's {columns} "
            "columns"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias: has shape {list(bias.shape)}; it must be [{rows}]")
    _check_devices(x, bias=bias)
    if activation_format not in _ACTIVATION_FORMATS:
        raise ValueError(
            f"activation_format: {activation_format!r}; allowed are 'dialect', 'fp8' and 'none'"
        )
    if accumulation not in _ACCUMULATIONS:
        raise ValueError(f"accumulation: {accumulation!r}; allowed are 'default' and 'exact'")
    if x.device != p.device:
        raise ValueError(f"x: is on {x.device}, the weight on {p.device}; move them to one device")


def check_grouped(
    x: torch.Tensor,
    experts: PackedExperts,
    offsets: torch.Tensor,
    rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation_format: str,
    accumulation: str,
) -> None:
    """Raise ValueError unless these arguments of ``expert_linear`` fit together."""
    check_linear(x, experts.together, None, activation_format, accumulation)
    if x.dim() != 2:
        raise ValueError(f"x: has shape {list(x.shape)}; it must be [T, K]")
    for name, tensor in (("x", x), ("bias", bias)):
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, which products of experts do not have; compute under"
                " torch.no_grad(), or with dialect_linear for each expert"
            )
    count, features, _ = experts.shape
    if bias is not None and tuple(bias.shape) != (count, features):
        raise ValueError(f"bias: has shape {list(bias.shape)}; it must be [{count}, {features}]")
    _check_devices(x, offsets=offsets, rows=rows, bias=bias)
    if offsets.dtype != torch.int64 or tuple(offsets.shape) != (count + 1,):
        raise ValueError(
            f"offsets: {offsets.dtype} {list(offsets.shape)}; it must be torch.int64 [{count + 1}]"
        )
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(f"rows: {rows.dtype} {list(rows.shape)}; it must be torch.int64 [R]")
    if rows is not None and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(x):
        raise ValueError(
            f"rows: holds {int(rows.min())}..{int(rows.max())}; allowed are 0..{len(x) - 1}"
        )
    total = len(x if rows is None else rows)
    places = offsets.tolist()
    if places != sorted(places) or places[0] < 0 or places[-1] > total:
        raise ValueError(f"offsets: {places}; they must ascend in 0..{total}")


def check_semantic(
    x: torch.Tensor,
    p: PackedTensor,
    bias: torch.Tensor | None,
    salient: torch.Tensor | None,
    group: torch.Tensor | None,
) -> None:
    """Raise ValueError unless these arguments of ``semantic_linear`` fit together."""
    check_linear(x, p, bias, "dialect", "exact")
    if x.dim() not in (2, 3):
        raise ValueError(f"x: has shape {list(x.shape)}; it must be [B, T, K] or [T, K]")
    _check_devices(x, salient=salient, group=group)
    if group is not None:
        check_group(group, x.shape[:-1], p.book)
    if salient is not None:
        _check_salient(salient, x)


def check_group(group: torch.Tensor, shape: torch.Size, book: Formatbook) -> None:
    """Raise ValueError unless `group` numbers tokens of `shape` and the book has the LUT rule."""
    if book.online_rule != "lut":
        raise ValueError(
            f"group: tokens cannot share variants of book {book.name!r}; use the 32-dialect book"
        )
    if group.dtype not in _INTEGERS or group.shape != shape:
        raise ValueError(
            f"group: {group.dtype} {list(group.shape)}; it must be integers {list(shape)}"
        )
    if group.numel() and not -1 <= int(group.min()) <= int(group.max()) <= _LARGEST_GROUP:
        raise ValueError(
            f"group: holds {int(group.min())}..{int(group.max())}; allowed are -1..{_LARGEST_GROUP}"
        )


def _check_salient(salient: torch.Tensor, x: torch.Tensor) -> None:
    if salient.dtype != torch.int64 or salient.dim() != x.dim() - 1:
        raise ValueError(
            f"salient: {salient.dtype} {list(salient.shape)}; it must be torch.int64 "
            f"{'[B, S]' if x.dim() == 3 else '[S]'}"
        )
    if x.dim() == 3 and salient.shape[0] != x.shape[0]:
        raise ValueError(
            f"salient: is for {salient.shape[0]} samples, x holds {x.shape[0]}; give one row each"
        )
    if salient.numel() and not -1 <= int(salient.min()) <= int(salient.max()) < x.shape[-2]:
        raise ValueError(
            f"salient: holds {int(salient.min())}..{int(salient.max())}; x has {x.shape[-2]} "
            f"tokens, so allowed are -1 (none) to {x.shape[-2] - 1}"
        )


def _check_devices(x: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{name}: is on {tensor.device}, x on {x.device}; move them to one device"
            )


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """View or copy [..., K] as [T, K]; unlike ``reshape(-1, K)`` it takes K = 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def each_once(salient: torch.Tensor) -> torch.Tensor:
    """The named tokens of every sample, ascending; -1 where one is named again."""
    ordered = salient.sort(dim=-1).values
    repeated = ordered[..., 1:] == ordered[..., :-1]
    ordered[..., 1:] = torch.where(repeated, -1, ordered[..., 1:])
    return ordered


def renumbered(group: torch.Tensor) -> torch.Tensor:
    """The same groups with the smallest numbers there are, int32; -1 stays."""
    ordered, position = group.to(torch.int64).sort(dim=-1)
    number = torch.zeros_like(ordered)
    number[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).cumsum(dim=-1)
    renumbered = torch.empty_like(number).scatter_(-1, position, number)
    return torch.where(group >= 0, renumbered, -1).to(torch.int32)


def numbers_of_batch(
    numbers: torch.Tensor | None, x: torch.Tensor, dtype: torch.dtype = torch.int64
) -> torch.Tensor | None:
    """Numbers below T of [B, ...] samples as numbers below B * T, flattened; -1 stays."""
    if numbers is None:
        return None
    if numbers.dim() == 2:
        sample = torch.arange(numbers.shape[0], device=numbers.device)[:, None]
        numbers = torch.where(numbers >= 0, numbers + sample * x.shape[-2], -1)
    return numbers.flatten().to(dtype)
