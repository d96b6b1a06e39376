"""Layers that read one input: rounded once, the same bits, and nothing is kept."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

import diffusers_hook
from dialect_kernels import SEMANTIC_32, cpu
from diffusers_hook.layers import together
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.layouts import Stream
from diffusers_hook.tokens import ops
from tests.video.support.tiny_video import run, wan

WIDTH = 64
OPTIONS = {"progress": False, "seda": True, "salient_refresh": 2, "seda_refresh": 3}


@pytest.fixture(autouse=True)
def small_inputs_too(monkeypatch):
    monkeypatch.setattr(together, "_WORTHWHILE", 0)
    monkeypatch.setattr(together, "_thread", type("Thread", (), {})())


@pytest.fixture
def computed(monkeypatch):
    """For each call of an op, how many layers it computed."""
    found, one, several = [], ops.linear, ops.linears
    monkeypatch.setattr(ops, "linear", lambda *a: found.append(1) or one(*a))
    monkeypatch.setattr(ops, "linears", lambda *a: found.append(len(a[1])) or several(*a))
    return found


def layers(count=3, rows=(WIDTH, 48, 32), **options):
    torch.manual_seed(0)
    given = {"bias": True, "activation_format": "dialect"} | options
    return [
        DialectLinear.quantized(
            nn.Linear(WIDTH, rows[i % len(rows)], bias=given["bias"]),
            Stream.VIDEO, SEMANTIC_32, 32, given["activation_format"], "layer",
        )
        for i in range(count)
    ]  # fmt: skip


def alone(layer, x):
    with torch.inference_mode():
        return layer(x)


@torch.no_grad()
def read(some, x):
    return [layer(x) for layer in some]


def learned(**options):
    """Layers that have been called with the same input once."""
    some = layers(**options)
    read(some, torch.randn(9, WIDTH))
    return some


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"activation_format": "fp8"}])
def test_from_the_second_call_on_one_op_computes_all(options, computed):
    some = layers(**options)
    for call in range(3):
        x = torch.randn(2, 9, WIDTH)
        found = read(some, x)
        assert computed == ([1, 1, 1] if call == 0 else [3])
        assert all(torch.equal(y, alone(layer, x)) for layer, y in zip(some, found, strict=True))
        assert all(y.is_contiguous() for y in found)
        computed.clear()


def test_tokens_that_are_not_rounded_are_not_shared(computed):
    some = layers(activation_format="none")
    for _ in range(2):
        read(some, torch.randn(9, WIDTH))
    assert computed == [1] * 6


def test_a_small_input_is_not_shared(computed, monkeypatch):
    monkeypatch.setattr(together, "_WORTHWHILE", 9 * WIDTH + 1)
    some = layers()
    for _ in range(2):
        read(some, torch.randn(9, WIDTH))
    assert computed == [1] * 6


def test_layers_that_differ_are_computed_alone(computed):
    """In book, bias, format of activations, block, or the part of a block."""
    first, *others = layers(count=5)
    others[0].block_size = 16
    others[0].weight_meta = nn.Parameter(torch.zeros(48, 4, dtype=torch.uint8), False)
    others[1].bias = None
    others[2].activation_format = "fp8"
    others[3].enter_block(torch.tensor([-1, 0]), "attn.to_q")
    for _ in range(2):
        read([first, *others], torch.randn(9, WIDTH))
    assert computed == [1] * 10


def test_an_input_that_was_written_to_is_read_again():
    q, k, v = learned()
    x = torch.randn(9, WIDTH)
    with torch.no_grad():
        q(x)
        x[0] += 1
        assert torch.equal(k(x), alone(k, x))
        assert torch.equal(v(x.clone()), alone(v, x))


@pytest.mark.parametrize(
    "write",
    [
        lambda k: k.weight_packed.add_(1),
        lambda k: k.bias.zero_(),
        lambda k: setattr(k, "weight_packed", nn.Parameter(k.weight_packed.clone() + 1, False)),
    ],
)
def test_a_weight_that_was_written_to_is_read_again(write):
    q, k, _ = learned()
    x = torch.randn(9, WIDTH)
    with torch.no_grad():
        q(x)
        before = alone(k, x)
        write(k)
        got = k(x)
    assert torch.equal(got, alone(k, x))
    assert not torch.equal(got, before)


def test_new_salient_tokens_come_between(computed):
    """The slot counts the calls of the block's attention."""
    some = layers()
    slot = torch.tensor([-1, 0])
    for layer in some:
        layer.enter_block(slot, "attn.to_q")
    read(some, torch.randn(9, WIDTH))
    computed.clear()
    x = torch.randn(9, WIDTH)
    with torch.no_grad():
        some[0](x)
        slot[1] += 1
        some[1](x)
        some[2](x)
    assert computed == [3, 1, 1]


def test_what_waits_goes_with_the_input():
    q, _, _ = learned()
    x = torch.randn(9, WIDTH)
    with torch.no_grad():
        q(x)
    waiting = weakref.ref(next(iter(together._thread.reading._waiting.values())).y)
    gone = weakref.ref(x)
    assert waiting() is not None
    gc.disable()
    try:
        del x
        assert gone() is None
        assert waiting() is None
    finally:
        gc.enable()


def test_a_layer_is_kept_by_nobody():
    some = learned()
    gone = [weakref.ref(layer) for layer in some]
    some.clear()
    gc.collect()
    assert all(layer() is None for layer in gone)


def test_a_layer_that_is_not_called_is_computed_alone_from_then_on(computed):
    q, k, v = learned()
    computed.clear()
    for _ in range(3):
        x = torch.randn(9, WIDTH)
        read([q, v], x)
    read([q, k, v], torch.randn(9, WIDTH))
    read([q, k, v], torch.randn(9, WIDTH))
    assert computed == [3, 2, 2, 2, 1, 3]  # k was learned anew


def test_the_gradient_is_that_of_each_layer():
    some = learned()
    x = torch.randn(9, WIDTH, requires_grad=True)
    found = torch.autograd.grad(sum(layer(x).sum() for layer in some), x)[0]
    want = sum(layer.decode().sum(dim=0) for layer in some).expand(9, -1)
    torch.testing.assert_close(found, want)


def test_threads_do_not_take_from_each_other():
    some = learned()
    inputs = [torch.randn(9, WIDTH) for _ in range(40)]
    want = [[alone(layer, x) for layer in some] for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: read(some, x), inputs))
    for got, expected in zip(found, want, strict=True):
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_a_transformer_rounds_less_often_and_computes_the_same(computed):
    """q, k and v of two self-attentions, k and v of two attentions over the text."""
    model = wan()
    diffusers_hook.enable(model, **OPTIONS)
    steps = [{"timestep": 900 - 100 * i, "seed": i, "batch": 1 + i % 2} for i in range(4)]
    found = [run(model, **step) for step in steps]
    counted = diffusers_hook.summary(model).transformers[0]
    assert sum(computed) == 4 * 2 * 10
    assert len(computed) == 2 * (10 + 3 * 7)
    diffusers_hook.disable(model)
    diffusers_hook.enable(model, **OPTIONS)
    computed.clear()
    with torch.inference_mode():
        want = [run(model, **step) for step in steps]
    assert len(computed) == 4 * 2 * 10
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))
    again = diffusers_hook.summary(model).transformers[0]
    assert replace(counted, seconds={}) == replace(again, seconds={})


def test_the_kernel_is_called_less_often(monkeypatch):
    if not cpu.available():
        pytest.skip(f"no CPU kernel: {cpu.why_not()}")
    from dialect_kernels.cpu import calls

    some, called, call = learned(), [], calls.call
    monkeypatch.setattr(calls, "call", lambda name, *a: called.append(name) or call(name, *a))
    read(some, torch.randn(9, WIDTH))
    assert called == ["dialect_linear"]
