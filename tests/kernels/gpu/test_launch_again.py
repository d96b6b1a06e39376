"""A kernel that was launched before is launched directly: with the arguments Triton would give.

Compiled for a GPU that is not there, whose driver notes what it gets.
"""

import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from dialect_kernels import SEMANTIC_32, PackedTensor
from dialect_kernels.gpu import gemm, linear
from dialect_kernels.gpu import launch as launches
from dialect_kernels.gpu.launch import launch
from dialect_kernels.gpu.quantize_activations import _quantize_activation_kernel as quantizer
from tests.support.views import shifted


@triton.jit(do_not_specialize=["count"])
def copy_kernel(p_x, p_y, p_none, count, BLOCK: tl.constexpr, ADD: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < count) + ADD, mask=o < count)


@pytest.fixture
def seen(monkeypatch):
    """What the driver launches: everything it is given."""
    given = []
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 17,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda source, metadata: lambda *arguments: given.append(arguments),
        utils=SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        ),
    )
    monkeypatch.setattr(launches, "_compiled", {})
    triton.runtime.driver.set_active(driver)
    yield given
    triton.runtime.driver._active = None


def same(a, b):
    return a is b if isinstance(b, torch.Tensor) else a == b


def test_the_same_arguments_without_a_search(seen, monkeypatch):
    x, y = torch.zeros(64), torch.zeros(64)
    constants = {"ADD": 3, "BLOCK": 16}  # not in the order of the signature
    launch(copy_kernel, (4,), (x, y, None, 64), constants, num_warps=1)
    monkeypatch.setattr(copy_kernel, "run", lambda *_, **__: pytest.fail("searched again"))
    launch(copy_kernel, (4,), (x, y, None, 64), constants, num_warps=1)
    assert len(seen) == 2
    first, again = seen
    assert first[:6] == again[:6], "grid, stream, function and what it takes"
    assert first[:4] == (4, 1, 1, 17)
    for given in (first, again):
        assert all(map(same, given[-6:], (x, y, None, 64, 16, 3)))
    launch(copy_kernel, (2,), (y, x, None, 20), constants, num_warps=1)
    assert seen[2][:3] == (2, 1, 1)
    assert all(map(same, seen[2][-6:], (y, x, None, 20, 16, 3)))


def test_what_a_kernel_is_compiled_for_is_a_kernel_of_its_own(seen):
    x, y = torch.zeros(64), torch.zeros(64)
    plain = (x, y, None, 64)
    launch(copy_kernel, (4,), plain, {"BLOCK": 16, "ADD": 3}, num_warps=1)
    for arguments, constants, warps in (
        ((x.half(), y, None, 64), {"BLOCK": 16, "ADD": 3}, 1),
        ((shifted(x), y, None, 64), {"BLOCK": 16, "ADD": 3}, 1),
        ((x, y, x, 64), {"BLOCK": 16, "ADD": 3}, 1),
        ((x, y, None, 1 << 31), {"BLOCK": 16, "ADD": 3}, 1),
        (plain, {"BLOCK": 32, "ADD": 3}, 1),
        (plain, {"BLOCK": 16, "ADD": 4}, 1),
        (plain, {"BLOCK": 16, "ADD": 3}, 2),
    ):
        known = len(launches._compiled)
        launch(copy_kernel, (4,), arguments, constants, num_warps=warps)
        assert len(launches._compiled) == known + 1
    assert len({id(kernel) for kernel, _ in launches._compiled.values()}) == 8
    launch(copy_kernel, (3,), (x, y, None, 7), {"BLOCK": 16, "ADD": 3}, num_warps=1)
    assert len(launches._compiled) == 8


@pytest.mark.parametrize("activation_format", ["dialect", "none"])
def test_a_layer_never_searches_again(seen, monkeypatch, activation_format):
    """Whatever the number of tokens, kernels that a layer's first products compiled are found."""
    facts = linear._Device("no such device", 132, (9, 0), 60 << 20)
    monkeypatch.setattr(linear, "_device", lambda device: facts)
    p = PackedTensor.empty((128, 512), SEMANTIC_32, 32)
    bias = torch.zeros(128)

    def product(tokens):
        x = torch.zeros(tokens, 512, dtype=torch.bfloat16)
        return linear.dialect_linear(x, p, bias, activation_format, "default")

    for tokens in (1, 16):
        product(tokens)
    known = len(seen)
    for kernel in (gemm.eight_bit_kernel, gemm.sixteen_bit_kernel, quantizer):
        monkeypatch.setattr(kernel, "run", lambda *_, **__: pytest.fail("searched again"))
    for tokens in (2, 7, 15, 16, 1):
        assert product(tokens).shape == (tokens, 128)
    assert len(seen) == known + 5 * (known // 2)
