"""The packed weights of a layer's experts, one behind the other in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .packed import PackedTensor

__all__ = ["PackedExperts"]


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """E packed weights [N, K] of one shape, book, block size and rotation (ours). Immutable.

    Attributes:
        together: the rows of all of them, expert by expert: a packed tensor [E * N, K].
        count: E, at least 1.

    Raises:
        ValueError: on construction, if the rows cannot be shared out evenly.
    """

    together: PackedTensor
    count: int

    def __post_init__(self) -> None:
        rows = self.together.shape[0]
        if self.count < 1 or rows % self.count:
            raise ValueError(
                f"count: {self.count} experts cannot share {rows} rows evenly; give the rows of "
                "all experts together, and at least one expert"
            )

    @classmethod
    def stack(cls, experts: Sequence[PackedTensor]) -> PackedExperts:
        """Copies of `experts`, one behind the other.

        Raises:
            ValueError: if there is none, or they differ in shape, book, block size, rotation or
                device.
        """
        if not experts:
            raise ValueError("experts: there is none; give at least one")
        first = experts[0]
        for number, expert in enumerate(experts):
            if _kind(expert) != _kind(first):
                raise ValueError(
                    f"experts: number {number} is {expert!r}, number 0 {first!r}; experts of one "
                    "layer have one shape, book, block size, rotation and device"
                )
        return cls(PackedTensor.concatenated(experts), len(experts))

    @classmethod
    def from_op(
        cls,
        codes: torch.Tensor,
        meta: torch.Tensor,
        row_exponent: torch.Tensor,
        in_features: int,
        book: str,
        block_size: int,
        rotation: str = "none",
    ) -> PackedExperts:
        """The weights that a torch op got; without the bias, in the order of `op_arguments`.

        Args:
            codes: uint8 [E, N, Kp/2].
            meta: uint8 [E, N, Kp/B].
            row_exponent: int8 [E, N].
            in_features: K.
            book, block_size, rotation: as for :class:`~.packed.PackedTensor`.
        """
        together = PackedTensor.from_op(
            codes.flatten(0, 1),
            meta.flatten(0, 1),
            row_exponent.flatten(),
            in_features,
            book,
            block_size,
            rotation,
        )
        return cls(together, codes.shape[0])

    def op_arguments(
        self, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int, str, int]:
        """Weights and bias [E, N] as torch ops take them, in their order, without the rotation."""
        _, columns = self.together.shape
        return (*self.tensors, bias, columns, self.together.book.name, self.together.block_size)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes [E, N, Kp/2], meta [E, N, Kp/B] and row exponents [E, N]; views."""
        rows = self.shape[:2]
        codes, meta, row_exponent = (
            tensor.view(*rows, *tensor.shape[1:]) for tensor in self.together.tensors
        )
        return codes, meta, row_exponent

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        rows, columns = self.together.shape
        return self.count, rows // self.count, columns

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.together.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, meta and row exponents together."""
        return self.together.nbytes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, expert: int) -> PackedTensor:
        """One expert's weight [N, K], a view.

        Raises:
            IndexError: if there is no such expert; none is counted from the end.
        """
        if not 0 <= expert < self.count:
            raise IndexError(f"expert: {expert}; there are {self.count}, counted from 0")
        rows = self.shape[1]
        return self.together.slice_rows(expert * rows, (expert + 1) * rows)

    def __iter__(self) -> Iterator[PackedTensor]:
        return (self[expert] for expert in range(self.count))

    def __repr__(self) -> str:
        return f"PackedExperts({self.count} x {self[0]!r})"


def _kind(p: PackedTensor) -> tuple[object, ...]:
    """What the experts of a layer have in common."""
    return p.shape, p.book, p.block_size, p.rotation, p.device
