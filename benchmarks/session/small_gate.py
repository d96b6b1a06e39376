"""The gate of a session: what its numbers rest on, in half a minute.

Bytes of the quantizers and of the decoders, products against the reference on the CPU, splits that
agree with each other, and rows of NaN. Every check is a line of its own and none ends the others;
tables are made only if all have passed. The whole tests come at the session's end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch

from dialect_kernels import (
    DIALECT_FP4,
    SEMANTIC_32,
    PackedTensor,
    dialect_linear,
    quantize,
    reference,
    semantic_linear,
)
from dialect_kernels.formatbook import Formatbook

from ..kernels.bench_gemm import is_close
from ..lib.gpu_timing import reason
from ..lib.shapes import LLAMA_8B
from .records import Work, read_lines

__all__ = ["check", "faults"]

_BOOKS = (DIALECT_FP4, SEMANTIC_32)
_FORMATS = ("dialect", "fp8", "none")
_REPEATS = 50
_LINES = "gate.jsonl"
_DEVICE = "cuda"

Tensors: TypeAlias = tuple[torch.Tensor, ...]


def faults(results: Path) -> list[str]:
    """What the gate of a session found; one line too if it did not run to its end."""
    lines = read_lines(results / _LINES)
    found = [f"{line['check']}: {line['detail']}" for line in lines if not line["passed"]]
    if not (results / "gate.done").exists() and not found:
        found.append("the session's gate has not run to its end")
    return found


def check(work: Work) -> None:
    """Run all checks.

    Raises:
        SystemExit: at the end, if one has failed.
    """
    gate = _Gate(work)
    for book in _BOOKS:
        gate.same(f"weights, {book.name}", *_weights(book))
        gate.same(f"decoded, {book.name}", *_decoded(book))
        for tokens in (1, 17, 64):
            gate.same(f"exact, {book.name}, {tokens} tokens", *_exact(book, tokens))
    gate.same("tokens, dialect", *_tokens())
    gate.same("rows of NaN", *_not_a_number())
    gate.same("splits", *_splits())
    shape = LLAMA_8B.fused_projections["o"]
    for tokens in (1, 16, 17, 64, 128, 200, 512, 600, 1100):
        for how in _FORMATS:
            gate.holds(f"default, {how}, {tokens} tokens", *_product(tokens, shape, how))
    for tokens in (343, 30001):
        gate.holds(f"salient tokens of {tokens}", *_semantic(tokens))
    if gate.failed:
        raise SystemExit(f"{gate.failed} checks have failed")


class _Gate:
    def __init__(self, work: Work) -> None:
        self.failed = 0
        self._work = work

    def same(self, name: str, got: Callable[[], Tensors], want: Callable[[], Tensors]) -> None:
        """Whether both have the same bits. A rehearsal has no values, and leaves `want` out."""

        def compared() -> str:
            found = got()
            if self._work.rehearsal:
                return ""
            pairs = zip(found, want(), strict=True)
            wrong = [i for i, (a, b) in enumerate(pairs) if not _equal(a.cpu(), b)]
            return f"tensors {wrong} differ" if wrong else ""

        self._line(name, compared)

    def holds(
        self, name: str, got: Callable[[], torch.Tensor], right: Callable[[torch.Tensor], bool]
    ) -> None:
        """Whether a result is right. A rehearsal leaves `right` out."""

        def judged() -> str:
            y = got()
            return "" if self._work.rehearsal or right(y) else "outside of the bound"

        self._line(name, judged)

    def _line(self, name: str, fault: Callable[[], str]) -> None:
        try:
            detail = fault()
        except Exception as error:  # a check that raises has failed; the others still run
            detail = reason(error)
        self.failed += bool(detail)
        self._work.lines.add(check=name, passed=not detail, detail=detail)


def _equal(got: torch.Tensor, want: torch.Tensor) -> bool:
    """The same bits; any NaN is one NaN."""
    if got.dtype.is_floating_point and got.element_size() > 1:
        return torch.equal(got.nan_to_num(0.125), want.nan_to_num(0.125)) and torch.equal(
            got.isnan(), want.isnan()
        )
    return torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def _random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, and a row of zeros, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = x * torch.exp2(torch.randint(-5, 6, (1, columns), generator=generator).float())
    if rows > 2:
        x[1] = 0
        x[2] *= 2.0**-30
    return x


def _any_bytes(book: Formatbook, rows: int = 65, columns: int = 1088) -> PackedTensor:
    """Every byte that can be stored: all metas, all codes."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    meta = (torch.arange(rows * columns // 32) % 256).to(torch.uint8).view(rows, -1)
    exponent = torch.randint(-100, 100, (rows,), generator=generator).to(torch.int8)
    return PackedTensor(codes, meta, exponent, (rows, columns), book, 32)


def _weights(book: Formatbook) -> tuple[Callable[[], Tensors], Callable[[], Tensors]]:
    w = _random(66, 1000)
    return (
        lambda: _stored(quantize(w.to(_DEVICE), book)),
        lambda: _stored(reference.quantize(w, book)),
    )


def _stored(p: PackedTensor) -> Tensors:
    return p.codes, p.meta, p.row_exponent


def _decoded(book: Formatbook) -> tuple[Callable[[], Tensors], Callable[[], Tensors]]:
    from dialect_kernels.gpu.decode import decode_bf16, decode_e4m3

    p = _any_bytes(book)

    def got() -> Tensors:
        values, scale = decode_e4m3(p.to(_DEVICE))
        bf16 = decode_bf16(p.to(_DEVICE))[: p.shape[0], : p.shape[1]]
        return values[: p.shape[0]], scale[: p.shape[0]], bf16.contiguous()

    def want() -> Tensors:
        values, scale = p.to_e4m3()
        return _operand_order(values.view(torch.uint8)), scale, p.dequantize(torch.bfloat16)

    return got, want


def _operand_order(bytes_: torch.Tensor) -> torch.Tensor:
    """The first 4 of every 8 columns in the first half, the others in the second."""
    halves = bytes_.view(len(bytes_), -1, 2, 4)
    return torch.cat([halves[:, :, 0].flatten(1), halves[:, :, 1].flatten(1)], dim=1)


def _exact(book: Formatbook, tokens: int) -> tuple[Callable[[], Tensors], Callable[[], Tensors]]:
    x, w = _random(tokens, 1000), _random(200, 1000, 1) / 50

    def got() -> Tensors:
        p = quantize(w.to(_DEVICE), book)
        return (dialect_linear(x.to(_DEVICE), p, None, accumulation="exact"),)

    return got, lambda: (reference.dialect_linear(x, reference.quantize(w, book)),)


def _tokens() -> tuple[Callable[[], Tensors], Callable[[], Tensors]]:
    from dialect_kernels.gpu.quantize_activations import quantize_activation

    x = _random(66, 2048).to(torch.bfloat16)

    def got() -> Tensors:
        q, scale = quantize_activation(x.to(_DEVICE), DIALECT_FP4)
        return (q.float() * scale[:, None],)

    return got, lambda: (reference.round_activation(x, DIALECT_FP4).float(),)


def _not_a_number() -> tuple[Callable[[], Tensors], Callable[[], Tensors]]:
    x, w = _random(5, 1024).to(torch.bfloat16), _random(96, 1024, 1) / 50
    x[3, 700] = float("nan")
    x[4, 3] = float("inf")

    def got() -> Tensors:
        p = quantize(w.to(_DEVICE))
        each = [dialect_linear(x.to(_DEVICE), p, None, how) for how in ("dialect", "fp8")]
        return tuple(y.isnan().all(dim=1) for y in each)

    want = torch.tensor([False, False, False, True, True])
    return got, lambda: (want, want)


def _splits() -> tuple[Callable[[], Tensors], Callable[[], Tensors]]:
    """Whoever is last adds the splits in their order: the same bits in every run."""
    shape = LLAMA_8B.fused_projections["down"]
    found: list[torch.Tensor] = []

    def got() -> Tensors:
        p = quantize(_random(*shape, seed=2).to(_DEVICE) / 50)
        x = _random(16, shape[1]).to(torch.bfloat16).to(_DEVICE)
        found.append(dialect_linear(x, p).cpu())
        return tuple(dialect_linear(x, p) for _ in range(_REPEATS))

    return got, lambda: tuple(found[0] for _ in range(_REPEATS))


def _product(
    tokens: int, shape: tuple[int, int], how: str
) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], bool]]:
    """512 features of a layer."""

    @cache
    def operands() -> tuple[torch.Tensor, PackedTensor]:
        x = _random(tokens, shape[1], tokens).to(torch.bfloat16).to(_DEVICE)
        return x, quantize(_random(512, shape[1], 3).to(_DEVICE) / 50)

    return (
        lambda: dialect_linear(*operands(), None, how),
        lambda y: is_close(y, *operands(), how),
    )


def _semantic(
    tokens: int,
) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], bool]]:
    """Decomposed and grouped tokens; 30001 takes the library's product, with an odd number."""
    x, w = _random(tokens, 256).to(torch.bfloat16), _random(96, 256, 1) / 50
    salient, group = torch.arange(0, tokens, 7), (torch.arange(tokens) % 13 - 1).to(torch.int32)

    def got() -> torch.Tensor:
        p = quantize(w.to(_DEVICE), SEMANTIC_32)
        return semantic_linear(x.to(_DEVICE), p, None, salient.to(_DEVICE), group.to(_DEVICE))

    def right(y: torch.Tensor) -> bool:
        p = reference.quantize(w, SEMANTIC_32)
        want = reference.semantic_linear(x, p, None, salient, group).double()
        return bool((y.cpu().double() - want).abs().max() <= 2.0**-7 * want.abs().max())

    return got, right
