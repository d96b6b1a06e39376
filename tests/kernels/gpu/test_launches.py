"""Which kernels a product launches, on a GPU that is not there.

Triton's hook before compiling sees every launch's kernel and what it would be compiled for, and can
keep it from going on; nothing is compiled here, and nothing computed.
"""

import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedExperts, quantize
from dialect_kernels.gpu import gemm, grouped, library, linear
from dialect_kernels.gpu.tuning import GemmPlan

TOKENS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 256, 257, 511, 512, 513, 1000, 4097,
          16384)  # fmt: skip
DEVICES = {
    "Ampere": linear._Device("A100", 108, (8, 0)),
    "Ada": linear._Device("L40", 142, (8, 9)),
    "Hopper": linear._Device("H200", 132, (9, 0)),
    "Blackwell": linear._Device("B200", 148, (10, 0)),
}
FORMATS = ("dialect", "fp8", "none")


@pytest.fixture
def launches(monkeypatch):
    """Launched kernels in their order, each with what it would be compiled for."""
    seen = []

    def before_compiling(*, key, fn, **_):
        seen.append((fn.name, key))
        return True  # that is enough

    major, minor = linear._device.__wrapped__(torch.device("cpu")).capability
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
    )
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", before_compiling)
    monkeypatch.setattr(linear, "runs_on", lambda device: True)
    monkeypatch.setattr(
        library,
        "_scaled_product",
        lambda x, scale, weight, *_: torch.empty(len(x), len(weight), dtype=torch.bfloat16),
    )
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, bias=None: x.new_empty(len(x), len(w))
    )
    linear._warm.clear()
    grouped._warm.clear()
    triton.runtime.driver.set_active(driver)
    yield seen
    triton.runtime.driver._active = None
    linear._warm.clear()
    grouped._warm.clear()


def on(monkeypatch, name):
    monkeypatch.setattr(linear, "_device", lambda device: DEVICES[name])


def weight(features=640, columns=1024, book=DIALECT_FP4, block_size=32):
    generator = torch.Generator().manual_seed(0)
    return quantize(torch.randn(features, columns, generator=generator), book, block_size)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("activation_format", FORMATS)
def test_nothing_is_compiled_after_the_warm_up(activation_format, name, launches, monkeypatch):
    on(monkeypatch, name)
    shapes = [weight(), weight(256, 4096, SEMANTIC_32), weight(96, 1008, block_size=16)]
    for p in shapes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if activation_format == "none" and dtype == torch.float32:
                continue
            for bias in (None, torch.zeros(p.shape[0], dtype=dtype)):
                launches.clear()
                linear.warm_up(p, activation_format, dtype, None if bias is None else bias.dtype)
                compiled = set(launches)
                assert compiled
                launches.clear()
                for tokens in TOKENS:
                    x = torch.empty(tokens, p.shape[1], dtype=dtype)
                    linear.dialect_linear(x, p, bias, activation_format, "default")
                assert set(launches) <= compiled


def test_a_second_weight_of_a_shape_is_warm_already(launches, monkeypatch):
    on(monkeypatch, "Hopper")
    linear.warm_up(weight(), "dialect", torch.bfloat16)
    assert launches
    launches.clear()
    linear.warm_up(weight(), "dialect", torch.bfloat16)
    assert not launches
    linear.warm_up(weight(), "fp8", torch.bfloat16)
    assert launches


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("activation_format", FORMATS)
def test_two_launches_for_few_tokens(activation_format, name, launches, monkeypatch):
    """The quantizer clears the counters of the splits; W4A16 clears them by a call of torch."""
    on(monkeypatch, name)
    for features, columns in ((4096, 4096), (1024, 14336), (28672, 256)):
        p = weight(8, columns)
        p = type(p)(
            p.codes.repeat(features // 8, 1),
            p.meta.repeat(features // 8, 1),
            p.row_exponent.repeat(features // 8),
            (features, columns),
            p.book,
            p.block_size,
        )
        for tokens in (1, 2, 8, 16):
            x = torch.empty(tokens, columns, dtype=torch.bfloat16)
            launches.clear()
            linear.dialect_linear(x, p, None, activation_format, "default")
            names = [name.rpartition(".")[2] for name, _ in launches]
            quantizer = {
                "dialect": ["_quantize_activation_kernel"],
                "fp8": ["_quantize_activation_fp8_kernel"],
                "none": [],
            }[activation_format]
            assert names[:-1] == quantizer
            assert names[-1] in ("eight_bit_kernel", "sixteen_bit_kernel")
            how = linear.route(tokens, p.shape, activation_format, x.dtype, x.device)
            assert (how.plan.splits > 1) == (features < 28672)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("activation_format", FORMATS)
def test_experts_are_warm_too_and_one_launch_multiplies_with_all(
    activation_format, name, launches, monkeypatch
):
    on(monkeypatch, name)
    experts = PackedExperts(weight(4 * 160), 4)
    dtype, offsets = torch.bfloat16, torch.tensor([0, 1, 1, 1, 1])
    for bias in (None, torch.zeros(4, 160, dtype=dtype)):
        launches.clear()
        grouped.warm_up(experts, activation_format, dtype, None if bias is None else dtype)
        compiled = set(launches)
        assert compiled
        for rows in TOKENS:
            x = torch.empty(rows, 1024, dtype=dtype)
            for named in (None, torch.zeros(rows, dtype=torch.int64)):
                launches.clear()
                grouped.grouped_linear(
                    x, named, offsets, experts, bias, activation_format, "default"
                )
                assert set(launches) <= compiled
                assert len(launches) == (2 if activation_format == "none" else 3)


def test_tiles_of_tokens_that_share_weights_are_neighbours():
    """Programs start in the order of the first axis, and read their weights from memory once."""
    assert gemm._grid(300, 4096, GemmPlan("fused", 128, 64, splits=3)) == (3, 64, 3)
