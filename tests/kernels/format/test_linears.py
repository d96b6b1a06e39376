"""Products of one input with several weights: the same bits, and one rounding."""

import pytest
import torch

from dialect_kernels import SEMANTIC_32, cpu, ops, quantize, torch_backend
from dialect_kernels.cpu import calls

FEATURES = (48, 16, 33)
PLAIN = [("dialect", None, None), ("fp8", None, None), ("none", None, None)]
SALIENT = torch.tensor([[1, -1, 3], [0, 1, -1]])
GROUP = torch.tensor([[2, -1, 2, 7], [0, 0, -1, 2]], dtype=torch.int32)
SEMANTIC = [("dialect", SALIENT, None), ("dialect", None, GROUP), ("dialect", SALIENT, GROUP)]


def weights(columns=96, bias=True, rotation="none"):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            quantize(torch.randn(n, columns, generator=generator), SEMANTIC_32, rotation=rotation),
            torch.randn(n, generator=generator) if bias else None,
        )
        for n in FEATURES
    ]


def one_by_one(x, each, activation_format, salient, group):
    if salient is None and group is None:
        return [
            ops.linear(x, *p.op_arguments(b), activation_format, "default", p.rotation)
            for p, b in each
        ]
    return [ops.semantic_op(x, *p.op_arguments(b), salient, group, p.rotation) for p, b in each]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("how", PLAIN + SEMANTIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_products_of_each_weight(how, dtype, compiled, monkeypatch):
    if compiled and not cpu.available():
        pytest.skip(f"no CPU kernel: {cpu.why_not()}")
    monkeypatch.setattr(cpu, "available", lambda: compiled)
    for bias, rotation in ((True, "none"), (False, "hadamard_32")):
        each = weights(bias=bias, rotation=rotation)
        x = torch.randn(2, 4, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = ops.linears(x, each, *how)
        for got, want in zip(found, one_by_one(x, each, *how), strict=True):
            assert torch.equal(got, want)
            assert got.dtype == dtype
            assert got.is_contiguous()


@pytest.mark.parametrize("tokens", [0, 1, 7, 500])
def test_any_number_of_tokens(tokens):
    """Few tokens and many take other ways through the CPU kernel."""
    each = weights(columns=160)
    x = torch.randn(tokens, 160, generator=torch.Generator().manual_seed(1))
    for got, want in zip(
        ops.linears(x, each, "dialect"), one_by_one(x, each, "dialect", None, None), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("how", [PLAIN[0], SEMANTIC[2]])
def test_the_cpu_kernel_rounds_once(how, monkeypatch):
    if not cpu.available():
        pytest.skip(f"no CPU kernel: {cpu.why_not()}")
    each, called, call = weights(), [], calls.call
    monkeypatch.setattr(calls, "call", lambda name, *a: called.append(name) or call(name, *a))
    ops.linears(torch.randn(2, 4, 96), each, *how)
    costs = [] if how[2] is None else ["dialect_costs"]
    assert called == [*costs, "dialect_linear" if how is PLAIN[0] else "dialect_decomposed"]


def test_plain_torch_takes_weight_by_weight(monkeypatch):
    monkeypatch.setattr(torch_backend, "_warn_once", lambda _: None)
    each = weights()
    x = torch.randn(5, 96)
    for got, (p, bias) in zip(
        torch_backend.linears(x, each, "dialect", None, None), each, strict=True
    ):
        assert torch.equal(got, torch_backend.dialect_linear(x, p, bias, "dialect", "default"))
