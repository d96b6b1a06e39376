"""Products with experts in Triton's interpreter, row by row against products with one weight."""

import os
from itertools import pairwise

import pytest
import torch

from dialect_kernels import PackedExperts, PackedTensor, cpu, expert_linear, reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from dialect_kernels.gpu import grouped, linear
from dialect_kernels.gpu.tuning import GemmPlan

COUNTS = (3, 0, 17, 1)
"""Rows of each expert: none, fewer and more than a tile has."""


@pytest.fixture(autouse=True)
def without_the_cpu_kernel(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)


def tensor(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.exp2(torch.randint(-5, 6, (1, columns), generator=generator).float())


def layer(columns=64, features=40, rotation="none"):
    """Tokens, the rows' tokens, offsets, experts and bias; two rows are nobody's."""
    experts = PackedExperts.stack(
        [
            reference.quantize(tensor(features, columns, seed=i) / 50, rotation=rotation)
            for i in range(4)
        ]
    )
    rows = torch.randint(5, (23,), generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([1, *COUNTS]).cumsum(0)
    return tensor(5, columns, seed=9), rows, offsets, experts, tensor(4, features, seed=10)


def wanted(x, rows, offsets, experts, bias=None):
    """By the reference, expert by expert; rows of no expert are 0."""
    y = torch.zeros(len(rows), experts.shape[1], dtype=x.dtype)
    for expert, (first, end) in enumerate(pairwise(offsets.tolist())):
        added = None if bias is None else bias[expert]
        y[first:end] = reference.dialect_linear(x[rows[first:end]], experts[expert], added)
    return y


@pytest.mark.parametrize(
    ("dtype", "rotation"), [(torch.float32, "none"), (torch.bfloat16, "hadamard_32")], ids=str
)
def test_exact_has_the_bits_of_the_reference(dtype, rotation):
    x, rows, offsets, experts, bias = layer(features=70, rotation=rotation)
    x = x.to(dtype)
    y = expert_linear(x, experts, offsets, rows, bias, "dialect", "exact")
    assert y.shape == (23, 70)
    assert torch.equal(y, wanted(x, rows, offsets, experts, bias))


@pytest.mark.parametrize(
    ("activation_format", "named"),
    [("dialect", True), ("fp8", True), ("none", True), ("none", False)],
)
def test_default_has_the_bits_of_one_weight_s_kernel(activation_format, named):
    """A row's sums do not depend on its neighbours in a tile."""
    x, rows, offsets, experts, bias = layer(columns=200 if named else 64)
    x = x.to(torch.bfloat16)
    if not named:
        x, rows = x[rows], None
    y = expert_linear(x, experts, offsets, rows, bias, activation_format)
    for expert, (first, end) in enumerate(pairwise(offsets.tolist())):
        if first < end:
            tokens = x[first:end] if rows is None else x[rows[first:end]]
            want = linear.dialect_linear(
                tokens, experts[expert], bias[expert], activation_format, "default"
            )
            assert torch.equal(y[first:end], want), expert


def test_many_rows_take_other_tiles(monkeypatch):
    """Also where one weight would be decoded to memory for the library."""
    x, rows, offsets, experts, _ = layer()
    want = wanted(x, rows, offsets, experts)
    monkeypatch.setattr(linear, "choose", lambda *facts: GemmPlan("scratch"))
    y = expert_linear(x, experts, offsets, rows)
    assert (y - want).abs().max() <= 1e-5 * want.abs().max()


def test_devices_without_fp8(monkeypatch):
    x, rows, offsets, experts, _ = layer()
    want = wanted(x, rows, offsets, experts)
    monkeypatch.setattr(linear, "_device", lambda device: linear._Device("ampere", 4, (8, 0)))
    y = expert_linear(x, experts, offsets, rows)
    assert (y - want).abs().max() <= 1e-5 * want.abs().max()


def test_nothing_decodes_weights_or_waits(monkeypatch):
    x, rows, offsets, experts, bias = layer()
    monkeypatch.setattr(PackedTensor, "dequantize", None)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    monkeypatch.setattr(torch.Tensor, "item", None)
    grouped.grouped_linear(x, rows, offsets, experts, bias, "dialect", "default")


@pytest.mark.parametrize("tile", [1, 16, 64])
def test_the_schedule_holds_every_row_once(tile):
    for counts in (COUNTS, (0, 0), (5,), (0, 64, 1, 16), (1, 1, 1, 1)):
        offsets = torch.tensor([2, *counts]).cumsum(0)
        total = int(offsets[-1]) + 1
        tokens = torch.randint(9, (total,), generator=torch.Generator().manual_seed(tile))
        scale = torch.arange(1.0, 10.0)
        table, of_rows = grouped._row_tiles(offsets, total, tile, tokens, scale)
        assert len(table) <= min(total, (total + len(counts) * (tile - 1)) // tile)
        owner = {}
        for expert, first, last in table.tolist():
            for row in range(first, min(last, first + tile)):
                assert row not in owner
                owner[row] = expert
        assert sorted(owner) == list(range(2, total - 1))
        assert all(offsets[e] <= row < offsets[e + 1] for row, e in owner.items())
        assert torch.equal(of_rows[2 : total - 1], scale[tokens[2 : total - 1]])
        assert grouped._row_tiles(offsets, total, tile, None, scale)[1] is scale
        assert grouped._row_tiles(offsets, total, tile, tokens, None)[1] is None


def test_nothing_to_compute():
    x, rows, offsets, experts, _ = layer()
    nobody = torch.zeros_like(offsets)
    assert not expert_linear(x, experts, nobody, rows).any()
    assert expert_linear(x[:0], experts, nobody).shape == (0, 40)
