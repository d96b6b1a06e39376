"""The torch ops' signatures, and which back end computes where."""

import logging
from functools import partial

import pytest
import torch

from dialect_kernels import DIALECT_FP4, cpu, gpu, ops, torch_backend
from dialect_kernels.backend import Backend

BACKENDS: tuple[Backend, ...] = (cpu, gpu, torch_backend)

SCHEMAS = {
    "linear": "blockdialect::linear(Tensor x, Tensor codes, Tensor meta, Tensor row_exponent, "
    "Tensor? bias, SymInt in_features, str book, int block_size, str activation_format, "
    'str accumulation, str rotation="none", Tensor? decoded=None, Tensor? decoded_scale=None) '
    "-> Tensor",
    "semantic_linear": "blockdialect::semantic_linear(Tensor x, Tensor codes, Tensor meta, "
    "Tensor row_exponent, Tensor? bias, SymInt in_features, str book, int block_size, "
    'Tensor? salient, Tensor? group, str rotation="none") -> Tensor',
    "grouped_linear": "blockdialect::grouped_linear(Tensor x, Tensor? rows, Tensor offsets, "
    "Tensor codes, Tensor meta, Tensor row_exponent, Tensor? bias, SymInt in_features, str book, "
    'int block_size, str activation_format, str accumulation, str rotation="none") -> Tensor',
    "embedding": "blockdialect::embedding(Tensor ids, Tensor codes, Tensor meta, "
    "Tensor row_exponent, SymInt in_features, str book, int block_size, ScalarType dtype) "
    "-> Tensor",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_signatures_stay(name):
    """Engines hold compiled graphs with these ops."""
    assert str(getattr(torch.ops.blockdialect, name).default._schema) == SCHEMAS[name]


def test_the_op_takes_the_arguments_that_a_packed_tensor_gives():
    p = ops.quantize(torch.randn(6, 32), DIALECT_FP4, 16)
    x, bias = torch.randn(3, 32), torch.randn(6)
    want = ops.dialect_linear(x, p, bias, "dialect", "exact")
    assert torch.equal(ops.linear(x, *p.op_arguments(bias), "dialect", "exact"), want)


def computed_by(monkeypatch):
    """The back ends that are called from now on, by name and function."""
    called = []

    def noted(backend, name, run, *arguments):
        called.append((backend, name))
        return run(*arguments)

    for backend in BACKENDS:
        for name in ("quantize", "dequantize", "dialect_linear", "semantic_linear", "embedding"):
            room = backend.__name__.rpartition(".")[2]
            run = getattr(backend, name)
            monkeypatch.setattr(backend, name, partial(noted, room, name, run))
    return called


@pytest.mark.parametrize("compiled", [True, False])
def test_one_back_end_computes(compiled, monkeypatch):
    if compiled and not cpu.available():
        pytest.skip(f"no CPU kernel: {cpu.why_not()}")
    monkeypatch.setattr(cpu, "available", lambda: compiled)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    called = computed_by(monkeypatch)
    p = ops.quantize(torch.randn(6, 32), DIALECT_FP4, 16)
    x = torch.randn(3, 32)
    ops.dequantize(p)
    ops.dialect_linear(x, p)
    ops.semantic_linear(x, p, salient=torch.tensor([1]))
    ops.dialect_embedding(torch.tensor([1]), p)
    ops.warm_up(p, "dialect", torch.float32)
    name = "cpu" if compiled else "torch_backend"
    assert called == [
        (name, "quantize"),
        (name, "dequantize"),
        (name, "dialect_linear"),
        (name, "semantic_linear"),
        (name, "embedding"),
    ]


def test_torch_says_once_that_it_is_slow(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch_backend._warn_once.cache_clear()
    p = ops.quantize(torch.randn(6, 32))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            ops.dialect_linear(torch.randn(3, 32), p)
    assert [record.getMessage() for record in caplog.records] == [
        "no compiled kernel for this product: weights are decoded in every call, which is slow"
    ]


def test_a_gpu_that_is_not_there_has_no_back_end_but_torch():
    meta = torch.device("meta")
    assert [backend.runs_on(meta) for backend in BACKENDS] == [False, False, True]
    assert ops.devices()[0] == torch.device("cpu")
    assert len(ops.devices()) == 1 + torch.cuda.is_available()
