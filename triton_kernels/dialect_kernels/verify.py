"""Golden vectors: does an implementation of the format return the expected bytes?

``golden/vectors_v1.json`` holds named inputs and, for format version 1, what they must become;
``golden/rotation_v2.json`` does the same for rotated layers. They were computed from
docs/reference/format.md by programs of their own, not by this package, and they are plain JSON, so
that other implementations can use them too::

    {"format_version": 1,
     "inputs":   {name: array},
     "cases":    {name: {"kind": "quantize" | "round_activation" | "decode" | "linear", ...}}}

    array = {"dtype": "float32", "shape": [N, K], "hex": little-endian bytes, rows first}

Arguments of a case that are arrays are names of inputs, or of another case whose packed tensor they
use; ``expected`` holds arrays under the names of section 3 of the document. A case without the key
``rotation`` is not rotated, and a product is rotated if its weight is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias

import torch

from . import ops, reference
from .formatbook import Rotation, book_by_name, rotation_by_name
from .packed import PackedTensor

__all__ = [
    "CheckResult",
    "Implementation",
    "available_backends",
    "golden_vectors",
    "verify",
    "verify_one",
]

Case: TypeAlias = dict[str, Any]

_FILES = ("vectors_v1.json", "rotation_v2.json")

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8)
}


@dataclass(frozen=True)
class Implementation:
    """An implementation of the public functions, and the device its tensors live on."""

    name: str
    device: torch.device
    quantize: Callable[..., PackedTensor]
    dialect_linear: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one case on one back end; `detail` names the first difference of a failure."""

    backend: str
    case: str
    passed: bool
    detail: str


@cache
def golden_vectors() -> Case:
    """The inputs and cases of all golden files together, by name."""
    together: Case = {"inputs": {}, "cases": {}}
    for name in _FILES:
        text = files(__package__).joinpath("golden", name).read_text(encoding="utf-8")
        vectors = json.loads(text)
        for section in together:
            together[section] |= vectors[section]
    return together


def available_backends() -> dict[str, Implementation]:
    """``reference``, and the public functions on each device: ``cpu``, ``cuda`` if there is one."""
    cpu = torch.device("cpu")
    found = [Implementation("reference", cpu, reference.quantize, reference.dialect_linear)]
    for device in ops.devices():
        found.append(Implementation(device.type, device, ops.quantize, ops.dialect_linear))
    return {implementation.name: implementation for implementation in found}


def verify(backends: Sequence[str] | None = None) -> list[CheckResult]:
    """Run every golden vector on the named back ends, by default on all that are available.

    Raises:
        ValueError: if a back end is not available here.
    """
    available = available_backends()
    chosen = list(available) if backends is None else list(backends)
    for name in chosen:
        if name not in available:
            allowed = ", ".join(map(repr, available))
            raise ValueError(f"backend: {name!r} is not available here; available are {allowed}")
    return [result for name in chosen for result in verify_one(available[name])]


def verify_one(backend: Implementation, vectors: Case | None = None) -> list[CheckResult]:
    """Run every golden vector on one back end; a case that raises has failed."""
    vectors = golden_vectors() if vectors is None else vectors
    results = []
    for name, case in vectors["cases"].items():
        try:
            detail = next(_KINDS[case["kind"]](backend, vectors, case), "")
        except Exception as error:  # whatever a back end raises, the other cases still run
            detail = f"{type(error).__name__}: {error}"
        results.append(CheckResult(backend.name, name, not detail, detail))
    return results


def _check_quantize(backend: Implementation, vectors: Case, case: Case) -> Iterator[str]:
    x = _tensor(vectors["inputs"][case["input"]], backend.device)
    p = backend.quantize(
        x,
        book_by_name(case["book"]),
        case["block_size"],
        case["rule"],
        case["window"],
        rotation=_rotation(case),
    )
    for field, expected in case["expected"].items():
        yield from _difference(field, getattr(p, field), _tensor(expected, backend.device))


def _check_decode(backend: Implementation, vectors: Case, case: Case) -> Iterator[str]:
    p = _packed(vectors, case, backend.device)
    expected = _tensor(case["expected"]["e4m3"], backend.device)
    scale = _tensor(case["expected"]["scale"], backend.device)
    e4m3, own_scale = p.to_e4m3()
    yield from _difference("e4m3", e4m3.view(torch.uint8), expected)
    yield from _difference("scale", own_scale, scale)
    values = expected.view(torch.float8_e4m3fn).to(torch.float32) * scale[:, None]
    yield from _difference("dequantize()", p.dequantize(torch.float32), values)


def _check_round_activation(backend: Implementation, vectors: Case, case: Case) -> Iterator[str]:
    """Rounded activations are seen through a stored weight that is the identity matrix."""
    x = _tensor(vectors["inputs"][case["input"]], backend.device)
    identity = torch.eye(x.shape[1], device=backend.device)
    weight = backend.quantize(identity, book_by_name(case["book"]), case["block_size"])
    weight = replace(weight, rotation=_rotation(case))
    y = backend.dialect_linear(x, weight, None, "dialect", accumulation="exact")
    expected = _tensor(case["expected"]["values"], backend.device)
    yield from _difference("values", y, expected)


def _check_linear(backend: Implementation, vectors: Case, case: Case) -> Iterator[str]:
    x = _tensor(vectors["inputs"][case["input"]], backend.device)
    bias = case["bias"] and _tensor(vectors["inputs"][case["bias"]], backend.device)
    weight = _packed(vectors, vectors["cases"][case["weight"]], backend.device)
    expected = _tensor(case["expected"]["y"], backend.device)
    y = backend.dialect_linear(x, weight, bias, case["activation_format"], accumulation="exact")
    yield from _difference("y", y, expected)
    y = backend.dialect_linear(x, weight, bias, case["activation_format"], accumulation="default")
    magnitude = _tensor(case["expected"]["sum_of_magnitudes"], backend.device)
    allowed = magnitude * 2.0**-7 + expected.abs().float() * torch.finfo(x.dtype).eps
    outside = (y.float() - expected.float()).abs() > allowed
    yield from _first("y (accumulation default)", outside | (y.isnan() != expected.isnan()), y)


_KINDS: dict[str, Callable[[Implementation, Case, Case], Iterator[str]]] = {
    "quantize": _check_quantize,
    "decode": _check_decode,
    "round_activation": _check_round_activation,
    "linear": _check_linear,
}


def _packed(vectors: Case, case: Case, device: torch.device) -> PackedTensor:
    """The packed tensor that a case of kind ``quantize`` expects or one of ``decode`` is given."""
    stored = case["expected"] if case["kind"] == "quantize" else case["stored"]
    rows, columns = case["shape"]
    return PackedTensor(
        _tensor(stored["codes"], device),
        _tensor(stored["meta"], device),
        _tensor(stored["row_exponent"], device),
        (rows, columns),
        book_by_name(case["book"]),
        case["block_size"],
        _rotation(case),
    )


def _rotation(case: Case) -> Rotation:
    return rotation_by_name(case.get("rotation", "none"))


def _tensor(array: Case, device: torch.device) -> torch.Tensor:
    dtype, shape = _DTYPES[array["dtype"]], array["shape"]
    data = bytearray.fromhex(array["hex"])
    if not data:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(data, dtype=dtype).reshape(shape).to(device)


def _difference(field: str, got: torch.Tensor, expected: torch.Tensor) -> Iterator[str]:
    """One sentence if dtype, shape or any bit differs (NaNs are alike, so are zeros' signs)."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        yield (
            f"{field} is {got.dtype} {list(got.shape)}, expected {expected.dtype} "
            f"{list(expected.shape)}"
        )
        return
    differs = (got != expected) & ~(got.isnan() & expected.isnan())
    yield from _first(field, differs, got, expected)


def _first(
    field: str, wrong: torch.Tensor, got: torch.Tensor, expected: torch.Tensor | None = None
) -> Iterator[str]:
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        wanted = "" if expected is None else f", expected {expected[at].item()}"
        yield (
            f"{field}{list(at)} is {got[at].item()}{wanted} ({int(wrong.sum())} of {wrong.numel()} "
            "differ)"
        )
