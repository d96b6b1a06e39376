"""What the tests of rotated products share, on every back end."""

from dataclasses import replace

import torch

from dialect_kernels import PackedTensor
from tests.support.quantizer_cases import tensor

ROTATED = "hadamard_32"


def unrotated(p: PackedTensor) -> PackedTensor:
    """The same bytes as a weight that is not rotated."""
    return replace(p, rotation="none")


def overflowing(columns: int) -> torch.Tensor:
    """Finite float32 [columns] whose rotation is not."""
    return torch.full((columns,), 2.0**123)


def hard_rows(columns: int, seed: int = 0) -> torch.Tensor:
    """Float32 [T, columns] that a rotation could get wrong; the last rows are not finite then."""
    steps = torch.arange(columns)
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-30, 30, (2, columns), generator=generator).float())
    alternating = torch.where(steps % 2 == 0, 1.0, -1.0)
    rows = [
        *tensor(3, columns, seed),
        *(tensor(2, columns, seed + 1) * spread),
        torch.zeros(columns),
        -torch.zeros(columns),
        torch.where(steps % 32 == 7, 1.0, 0.0),
        torch.where(steps % 32 == 0, 1e4, 1.0),
        steps * 2.0**-149,  # subnormal, before the rotation and after it
        steps * alternating * 2.0**-146,
        torch.full((columns,), 2.0**-130),
        tensor(1, columns, seed + 2)[0] * 2.0**-126,
        tensor(1, columns, seed + 3)[0] * 2.0**-113,
        alternating * 2.0**122,
        torch.where(steps < 32, 3.0e38, 1.0) * torch.where(steps == 0, 1.0, 0.0),
        overflowing(columns),
        torch.where(steps == 33 % columns, float("nan"), steps.float()),
        torch.where(steps == columns - 1, -float("inf"), 1.0),
    ]
    return torch.stack([row.to(torch.float32) for row in rows])


def assert_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same bits, except that any NaN is as good as another and zeros have no sign."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0, 1e38, -1e38), want.nan_to_num(0.0, 1e38, -1e38))
