"""Second moments of a layer's inputs, and their factor for rule ``gptq``, in little memory.

``A``, the mean of ``x x.T``, is symmetric and the factor triangular: of each only the upper
triangle is held, in panels of columns. The factor is computed in float64, where a triangle takes as
much memory as a whole float32 matrix; the panels of ``A`` are freed one by one on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch

from .formatbook import Rotation
from .rotation import rotate_activation

__all__ = ["SecondMoments", "UpperFactor", "growing_dampings"]

_PANEL = 512
"""Columns of a panel."""
_FEWEST = 4
"""A layer needs a token for so many columns to be calibrated."""


def growing_dampings(damping: float) -> Iterator[float]:
    """The dampings to try: ten times as much each time, up to 1."""
    while damping <= 1 or math.isclose(damping, 1):
        yield damping
        damping *= 10


class UpperFactor:
    """U, upper triangular, of ``inverse(A) = U.T @ U``; float32 [K, K], in panels of columns."""

    def __init__(self, panels: list[torch.Tensor]) -> None:
        self._panels = panels

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._panels[0].device

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of one panel's columns, from the column `first` on."""
        start, parts = 0, []
        for panel in self._panels:
            stop = start + panel.shape[1]
            if stop > first:
                parts.append(panel[first:last, max(0, first - start) :])
            start = stop
        return torch.cat(parts, dim=1)


class SecondMoments:
    """The mean of ``x x.T`` over the tokens that a layer sees.

    Args:
        columns: K.
        device: where it is summed up and factored.

    Attributes:
        tokens: how many were added.
        device: the argument.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self._size, self.device = columns, torch.device(device)
        self._spans = _spans(columns)
        self._panels = [torch.zeros(b, b - a, device=device) for a, b in self._spans]
        self.tokens = 0

    def __len__(self) -> int:
        """K."""
        return self._size

    @classmethod
    def of(cls, A: torch.Tensor) -> SecondMoments:
        """Of a mean that is known, float32 [K, K]; its upper triangle counts."""
        found = cls(len(A), A.device)
        found._panels = [A[:b, a:b].clone() for a, b in found._spans]
        found.tokens = 1
        return found

    @staticmethod
    def nbytes_of(columns: int) -> int:
        """The memory that the moments of an input of so many columns take."""
        return 4 * sum(stop * (stop - first) for first, stop in _spans(columns))

    def add(self, x: torch.Tensor) -> None:
        """Add tokens, float32 [T, K]."""
        for panel, (first, stop) in zip(self._panels, self._spans, strict=True):
            panel.addmm_(x[:, :stop].T, x[:, first:stop])
        self.tokens += len(x)

    @property
    def enough(self) -> bool:
        """Whether the tokens are enough to calibrate a layer: one for every four columns."""
        return self.tokens * _FEWEST >= self._size

    def flat(self) -> torch.Tensor:
        """The sums in one tensor, float32 [n], which :meth:`from_flat` takes."""
        return torch.cat([panel.flatten() for panel in self._panels])

    @classmethod
    def from_flat(cls, columns: int, flat: torch.Tensor, tokens: int) -> SecondMoments:
        """The moments whose sums are `flat`, on its device.

        Raises:
            ValueError: if they are not those of so many columns.
        """
        if flat.dtype != torch.float32 or flat.shape != (cls.nbytes_of(columns) // 4,):
            raise ValueError(
                f"flat: {flat.dtype} {list(flat.shape)}; the moments of {columns} columns are "
                f"torch.float32 [{cls.nbytes_of(columns) // 4}]"
            )
        found = cls(columns, flat.device)
        parts = torch.split(flat, [panel.numel() for panel in found._panels])
        for panel, part in zip(found._panels, parts, strict=True):
            panel.copy_(part.view_as(panel))
        found.tokens = tokens
        return found

    def isfinite(self) -> bool:
        """Whether no token held NaN or Inf, and no sum overflowed."""
        return all(bool(panel.isfinite().all()) for panel in self._panels)

    def diagonal(self) -> torch.Tensor:
        """The diagonal of ``A``, float64 [K]."""
        parts = [panel[len(panel) - panel.shape[1] :].diagonal() for panel in self._panels]
        whole = torch.cat(parts) if parts else torch.empty(0)
        return whole.to(torch.float64) / max(1, self.tokens)

    def transform(self, scale: torch.Tensor, rotation: Rotation) -> None:
        """Make them those of the tokens times `scale`, float32 [K], and then rotated."""
        for number, (first, stop) in enumerate(self._spans):
            panel = self._panels[number].mul_(scale[:stop, None]).mul_(scale[first:stop])
            panel = rotate_activation(rotate_activation(panel, rotation).T.contiguous(), rotation)
            self._panels[number] = panel.T.contiguous()

    def mean(self) -> torch.Tensor:
        """``A``, float32 [K, K]."""
        whole = torch.empty(self._size, self._size, device=self.device)
        for panel, (first, stop) in zip(self._panels, self._spans, strict=True):
            whole[:stop, first:stop] = panel / max(1, self.tokens)
            whole[first:stop, :first] = whole[:first, first:stop].T
        return whole

    def factor(self, damping: float) -> UpperFactor | None:
        """U of ``A``, to whose diagonal the share `damping` of its mean is added.

        Rows and columns with 0 on the diagonal count as 0, and the mean of the others takes its
        place. Without any input U is the unit matrix: every rounding is as good.

        Returns:
            None if the sum is not positive definite. Otherwise the moments are used up.
        """
        diagonal = self.diagonal()
        dead = diagonal == 0
        mean = float(diagonal.sum()) / max(1, int((~dead).sum()))
        added = (damping * mean if mean else 1.0) + torch.where(dead, mean, 0.0).to(diagonal)
        done: list[torch.Tensor] = []  # V of A = V @ V.T, upper triangular; the last panel first
        while self._panels:
            first, stop = self._spans[len(self._panels) - 1]
            panel = (self._panels.pop() / max(1, self.tokens)).to(torch.float64)
            panel[:, dead[first:stop]] = 0
            panel[dead[:stop]] = 0
            panel[first:].diagonal().add_(added[first:stop])
            if done:
                panel -= _product(done, first, stop)
            if not _factor_panel(panel, first):
                self._restore(panel, done, added)
                return None
            done.append(panel)
        return _inverse(done[::-1], self._spans)

    def damped_factor(self, damping: float) -> tuple[UpperFactor, float] | None:
        """The factor with the least damping that is enough, and that damping.

        Args:
            damping: the least; where it is too little, ten times as much is tried.

        Returns:
            None if no damping up to 1 is enough. Otherwise the moments are used up.
        """
        for share in growing_dampings(damping):
            factor = self.factor(share)
            if factor is not None:
                return factor, share
        return None

    def _restore(self, panel: torch.Tensor, done: list[torch.Tensor], added: torch.Tensor) -> None:
        """Undo a factorization that failed at `panel`, but for the rounding of float64."""
        if done:
            panel += _product(done, *self._spans[len(self._panels)])
        while True:
            first, stop = self._spans[len(self._panels)]
            panel[first:].diagonal().sub_(added[first:stop])
            self._panels.append((panel * max(1, self.tokens)).to(torch.float32))
            if not done:
                return
            panel = _product(done, *self._spans[len(self._panels)])
            done.pop()


def _spans(columns: int) -> list[tuple[int, int]]:
    """The columns of each panel."""
    return list(pairwise([*range(0, columns, _PANEL), columns]))


def _product(panels: list[torch.Tensor], first: int, stop: int) -> torch.Tensor:
    """Columns [first, stop) of ``V @ V.T`` down to the diagonal, of some panels of V."""
    whole = panels[0].new_zeros(stop, stop - first)
    for panel in panels:
        whole.addmm_(panel[:stop], panel[first:stop].T)
    return whole


def _factor_panel(panel: torch.Tensor, first: int) -> bool:
    """Turn a panel of ``A``, less what the panels behind it explain, into one of V, in place."""
    corner = panel[first:]
    # with both axes reversed, the upper factor of the corner is a lower one
    lower, failed = torch.linalg.cholesky_ex(corner.flip(0, 1))
    if int(failed):
        return False
    corner.copy_(lower.flip(0, 1))
    panel[:first] = torch.linalg.solve_triangular(corner.T, panel[:first], upper=False, left=False)
    return True


def _inverse(panels: list[torch.Tensor], spans: list[tuple[int, int]]) -> UpperFactor | None:
    """The inverse of V, in the place of `panels`; None if it is not finite in float32."""
    for number, (panel, (first, _)) in enumerate(zip(panels, spans, strict=True)):
        corner = panel[first:]
        one = torch.eye(len(corner), dtype=panel.dtype, device=panel.device)
        corner.copy_(torch.linalg.solve_triangular(corner.clone(), one, upper=True))
        above = torch.zeros_like(panel[:first])
        for inverse, (start, stop) in zip(panels[:number], spans, strict=False):
            above[:stop] -= inverse @ panel[start:stop]
        panel[:first] = above @ corner
    for number, (first, _) in enumerate(spans):
        panels[number] = panels[number].to(torch.float32)
        diagonal = panels[number][first:].diagonal()
        if not bool(panels[number].isfinite().all()) or not bool((diagonal > 0).all()):
            return None
    return UpperFactor(panels)
