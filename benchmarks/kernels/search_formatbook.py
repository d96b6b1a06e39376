"""Search for variants 2 and 3 of a 32-dialect formatbook (a greedy search, ours).

For every range M the two DialectFP4 dialects are given. Among all grids of eight levels that
contain 0 and M, the one is added that lowers the mean, over the blocks whose range is M, of the
block's smallest LUT error divided by the block's energy; then a second one in the same way. Blocks
are drawn from Gaussian, Laplace, Student-t4, GELU(Gaussian) and channel-scaled Gaussian data, or
read from a safetensors file of real activations:

    python -m benchmarks.kernels.search_formatbook [--activations FILE] [--blocks N]

Prints each range's winners beside the shipped book and the loss of the shipped pair against them.
The winners depend on the data; the shipped book is fixed data with a version.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from dialect_kernels.formatbook import CELLS, SEMANTIC_32, SMALLEST_RANGE

BLOCK_SIZE = 32


def main(
    activations: Annotated[Path | None, typer.Option(help="safetensors file to read.")] = None,
    blocks: Annotated[int, typer.Option(help="Blocks per distribution.")] = 40_000,
    seed: Annotated[int, typer.Option(help="Seed of the synthetic data.")] = 0,
) -> None:
    """Search, and print the winners beside the shipped book."""
    data = _read(activations) if activations else _synthetic(blocks, seed)
    cells, energy, block_range = _cells(data)
    table = Table("M", "blocks", "found", "shipped", "shipped / found error")
    for largest in range(15, SMALLEST_RANGE - 1, -1):
        of_range = block_range == largest
        histogram = _histogram(cells[of_range], energy[of_range])
        given = list(_shipped(largest)[:2])
        found = list(given)
        for _ in range(2):
            found.append(_best_addition(found, largest, histogram))
        ratio = _mean_error(_shipped(largest), histogram) / _mean_error(found, histogram)
        table.add_row(
            str(largest),
            str(int(of_range.sum())),
            "\n".join(map(_text, found[2:])),
            "\n".join(map(_text, _shipped(largest)[2:])),
            f"{ratio:.4f}",
        )
    Console().print(table)


def _synthetic(blocks: int, seed: int) -> torch.Tensor:
    """Blocks of the five distributions, float32 [5 * blocks, 32]."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(blocks, BLOCK_SIZE, generator=generator)

    def uniform() -> torch.Tensor:
        return torch.rand(blocks, BLOCK_SIZE, generator=generator)

    laplace = (uniform() - 0.5).sign() * -uniform().clamp(min=1e-9).log()
    chi_square = sum(normal().square() for _ in range(4))
    student_t4 = normal() / (chi_square / 4).sqrt()
    gelu = torch.nn.functional.gelu(normal())
    channel_scale = torch.exp(0.7 * torch.randn(BLOCK_SIZE, generator=generator))
    return torch.cat([normal(), laplace, student_t4, gelu, normal() * channel_scale])


def _read(path: Path) -> torch.Tensor:
    """All blocks of all tensors of a file, cut along their last dimension."""
    tensors = [t.float() for t in load_file(path).values() if t.is_floating_point() and t.dim()]
    whole = [t[..., : t.shape[-1] // BLOCK_SIZE * BLOCK_SIZE] for t in tensors]
    return torch.cat([t.reshape(-1, BLOCK_SIZE) for t in whole])


def _cells(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cells [n, 32], energy in squared 1/8 units [n] and range M [n] of the non-zero blocks."""
    magnitude = data[data.abs().amax(dim=1) > 0].abs()
    exponent = torch.frexp(magnitude.amax(dim=1)).exponent - 1 - 2
    scaled = torch.ldexp(magnitude, -exponent[:, None])
    cells = (4 * scaled).clamp(max=CELLS - 1).long()
    block_range = ((cells.amax(dim=1) + 1) >> 1).clamp(SMALLEST_RANGE, 15)
    return cells, (8 * scaled).square().sum(dim=1), block_range


def _histogram(cells: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """Elements per cell, each block divided by its energy, float32 [n, 32]."""
    counts = torch.nn.functional.one_hot(cells, CELLS).sum(dim=1)
    return counts / energy[:, None]


def _errors(grids: list[tuple[int, ...]]) -> torch.Tensor:
    """Squared error at each cell's centre in 1/8 units, float32 [grids, 32]."""
    k = torch.arange(CELLS)
    rows = []
    for grid in grids:
        thresholds = torch.tensor([low + high for low, high in pairwise(grid)])
        index = (k[:, None] >= thresholds).sum(dim=1)
        rows.append((2 * k + 1 - 4 * torch.tensor(grid)[index]).square())
    return torch.stack(rows).float()


def _best_addition(
    given: list[tuple[int, ...]], largest: int, histogram: torch.Tensor
) -> tuple[int, ...]:
    candidates = [(0, *inner, largest) for inner in combinations(range(1, largest), 6)]
    so_far = (histogram @ _errors(given).T).amin(dim=1, keepdim=True)
    means = [
        torch.minimum(so_far, histogram @ errors.T).mean(dim=0)
        for errors in _errors(candidates).split(256)
    ]
    return candidates[int(torch.cat(means).argmin())]


def _mean_error(grids: list[tuple[int, ...]], histogram: torch.Tensor) -> float:
    return float((histogram @ _errors(grids).T).amin(dim=1).mean())


def _shipped(largest: int) -> list[tuple[int, ...]]:
    return [tuple(grid) for grid in SEMANTIC_32.half_units if grid[-1] == largest]


def _text(grid: tuple[int, ...]) -> str:
    return " ".join(map(str, grid))


if __name__ == "__main__":
    typer.run(main)
