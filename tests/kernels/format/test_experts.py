"""Packed experts, and products with them on both back ends of a CPU: token by token, by hand."""

from __future__ import annotations

import pytest
import torch

from dialect_kernels import (
    DIALECT_FP4,
    SEMANTIC_32,
    PackedExperts,
    cpu,
    dialect_linear,
    expert_linear,
    ops,
    quantize,
)

FORMATS = ["dialect", "fp8", "none"]


@pytest.fixture(params=["compiled", "torch"])
def backend(request, monkeypatch):
    """Both back ends of a CPU."""
    if request.param == "compiled" and not cpu.available():
        pytest.skip(f"no CPU kernel: {cpu.why_not()}")
    monkeypatch.setattr(cpu, "available", lambda: request.param == "compiled")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_experts(count: int = 4, rows: int = 12, columns: int = 64, **options) -> PackedExperts:
    return PackedExperts.stack(
        [quantize(random(rows, columns, seed=i), **options) for i in range(count)]
    )


def test_stacked_experts_are_found_again():
    singles = [quantize(random(5, 70, seed=i), SEMANTIC_32, 16) for i in range(3)]
    experts = PackedExperts.stack(singles)
    assert experts.shape == (3, 5, 70)
    assert len(experts) == 3
    assert experts.nbytes == sum(p.nbytes for p in singles)
    for p, expert in zip(singles, experts, strict=True):
        assert all(map(torch.equal, p.tensors, expert.tensors))
        assert (expert.shape, expert.book, expert.block_size) == (p.shape, p.book, p.block_size)
    assert [list(tensor.shape) for tensor in experts.tensors] == [[3, 5, 40], [3, 5, 5], [3, 5]]
    assert experts[1].codes.data_ptr() == experts.tensors[0][1].data_ptr(), "a view"
    assert repr(experts).startswith("PackedExperts(3 x PackedTensor(5 x 70, semantic_32")
    for number in (-1, 3):
        with pytest.raises(IndexError, match=f"expert: {number}; there are 3"):
            experts[number]


def test_the_op_s_tensors_are_the_same_experts():
    experts = make_experts(rotation="hadamard_32")
    *tensors, bias, columns, book, block_size = experts.op_arguments(None)
    again = PackedExperts.from_op(*tensors, columns, book, block_size, "hadamard_32")
    assert bias is None
    assert again.shape == experts.shape
    assert again[3].rotation == "hadamard_32"
    assert all(map(torch.equal, again[3].tensors, experts[3].tensors))


def test_experts_that_differ_are_refused():
    first = quantize(random(4, 64))
    for other in (
        quantize(random(5, 64)),
        quantize(random(4, 64), SEMANTIC_32),
        quantize(random(4, 64), block_size=16),
        quantize(random(4, 64), rotation="hadamard_32"),
        first.to("meta"),
    ):
        with pytest.raises(ValueError, match="experts: number 1 is PackedTensor"):
            PackedExperts.stack([first, other])
    with pytest.raises(ValueError, match="experts: there is none"):
        PackedExperts.stack([])
    with pytest.raises(ValueError, match="count: 3 experts cannot share 4 rows"):
        PackedExperts(first, 3)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("activation_format", FORMATS)
@pytest.mark.parametrize("rotation", ["none", "hadamard_32"])
def test_every_row_is_the_product_of_its_token_and_expert(activation_format, rotation):
    experts = make_experts(rotation=rotation)
    x, bias = random(5, 64, seed=7).to(torch.bfloat16), random(4, 12, seed=8)
    rows = torch.tensor([4, 0, 2, 2, 1, 0, 3, 3])
    offsets = torch.tensor([1, 3, 3, 6, 7])  # expert 1 has none; rows 0 and 7 are nobody's
    of_row = [None, 0, 0, 2, 2, 2, 3, None]
    for added in (None, bias, bias.to(torch.bfloat16)):
        y = expert_linear(x, experts, offsets, rows, added, activation_format, "exact")
        assert y.dtype == x.dtype
        assert y.shape == (8, 12)
        for row, expert in enumerate(of_row):
            if expert is None:
                assert not y[row].any()
                continue
            one = None if added is None else added[expert]
            token = x[rows[row]][None]
            want = dialect_linear(token, experts[expert], one, activation_format, "exact")
            assert torch.equal(y[row], want[0]), row
        close = expert_linear(x, experts, offsets, rows, added, activation_format)
        assert (close - y).abs().max() <= 2.0**-7 * y.abs().max()


@pytest.mark.usefixtures("backend")
def test_without_rows_row_i_is_of_token_i():
    experts, x = make_experts(), random(6, 64, seed=7)
    offsets = torch.tensor([0, 2, 2, 5, 6])
    named = expert_linear(x, experts, offsets, torch.arange(6), accumulation="exact")
    assert torch.equal(expert_linear(x, experts, offsets, accumulation="exact"), named)


@pytest.mark.usefixtures("backend")
def test_nothing_to_compute():
    experts = make_experts()
    none = torch.zeros(5, dtype=torch.int64)
    assert expert_linear(random(0, 64), experts, none).shape == (0, 12)
    nobody = expert_linear(random(3, 64), experts, none)
    assert torch.equal(nobody, torch.zeros(3, 12))
    assert expert_linear(random(3, 64), experts, none, none[:0]).shape == (0, 12)


def test_bad_arguments_are_refused():
    experts, x = make_experts(), random(3, 64)
    offsets, rows = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 0])
    expert_linear(x, experts, offsets, rows)
    for match, changed in {
        r"x: has shape \[1, 3, 64\]; it must be \[T, K\]": {"x": x[None]},
        r"x: has shape \[3, 32\]": {"x": x[:, :32]},
        r"bias: has shape \[12\]; it must be \[4, 12\]": {"bias": random(12)},
        r"offsets: torch.int64 \[4\]; it must be torch.int64 \[5\]": {"offsets": offsets[:4]},
        "offsets: torch.int32": {"offsets": offsets.int()},
        r"offsets: \[0, 1, 2, 3, 5\]; they must ascend in 0..4": {
            "offsets": torch.tensor([0, 1, 2, 3, 5])
        },
        r"offsets: \[0, 2, 1, 3, 4\]": {"offsets": torch.tensor([0, 2, 1, 3, 4])},
        r"offsets: \[-1, 2, 2, 3, 4\]": {"offsets": torch.tensor([-1, 2, 2, 3, 4])},
        "rows: torch.int32": {"rows": rows.int()},
        r"rows: holds 0..3; allowed are 0..2": {"rows": torch.tensor([0, 3, 1, 0])},
        "rows: is on meta, x on cpu": {"rows": rows.to("meta")},
        "activation_format: 'int4'": {"activation_format": "int4"},
        "accumulation: 'fast'": {"accumulation": "fast"},
    }.items():
        arguments = {"x": x, "experts": experts, "offsets": offsets, "rows": rows} | changed
        with pytest.raises(ValueError, match=match):
            expert_linear(**arguments)


def routed(x: torch.Tensor, gate: torch.Tensor, experts: PackedExperts, top: int) -> torch.Tensor:
    """A mixture of experts in static shapes, as an engine writes it."""
    weights, chosen = torch.topk(torch.softmax(x @ gate.T, -1), top)
    order = torch.argsort(chosen.flatten(), stable=True)
    counts = torch.zeros(len(gate), dtype=torch.int64).index_add(
        0, chosen.flatten(), torch.ones_like(order)
    )
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    y = ops.grouped_linear(
        x, order // top, offsets, *experts.op_arguments(None), "dialect", "exact"
    )
    placed = torch.empty_like(y).index_copy(0, order, y)
    return (placed.unflatten(0, (-1, top)) * weights[..., None]).sum(1)


def test_engines_trace_through_the_op():
    experts, gate = make_experts(), random(4, 64, seed=5)
    compiled = torch.compile(routed, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 6):
        x = random(tokens, 64, seed=tokens)
        want = routed(x, gate, experts, 2)
        assert torch.allclose(compiled(x, gate, experts, 2), want, atol=1e-5)
        by_hand = torch.zeros(tokens, 12)
        weights, chosen = torch.topk(torch.softmax(x @ gate.T, -1), 2)
        for token in range(tokens):
            for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
                one = dialect_linear(x[token][None], experts[expert], accumulation="exact")
                by_hand[token] += weight * one[0]
        assert torch.allclose(want, by_hand, atol=1e-5)


def test_the_op_has_no_shapes_that_depend_on_data():
    experts = make_experts(book=DIALECT_FP4)
    offsets, rows = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 0])
    torch.library.opcheck(
        torch.ops.blockdialect.grouped_linear.default,
        (random(3, 64), rows, offsets, *experts.op_arguments(None), "dialect", "exact"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_gradient_is_refused():
    experts, offsets = make_experts(), torch.tensor([0, 1, 1, 2, 3])
    x = random(3, 64).requires_grad_()
    with pytest.raises(ValueError, match="x: requires a gradient, which products of experts do"):
        expert_linear(x, experts, offsets)
    with torch.no_grad():
        assert expert_linear(x, experts, offsets).shape == (3, 12)
