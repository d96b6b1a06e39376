"""A kernel that was launched before is launched directly: with the arguments Triton would give.

Compiled for a GPU that is not there, whose driver notes what it gets.
"""

import os
import weakref
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from dialect_kernels import SEMANTIC_32, PackedExperts, PackedTensor
from dialect_kernels.device_tables import is_kept, tables_on
from dialect_kernels.gpu import (
    bound,
    decode,
    gemm,
    grouped,
    library,
    linear,
    quantize_activations,
    quantize_fp8,
    rotation,
)
from dialect_kernels.gpu import launch as launches
from dialect_kernels.gpu.launch import launch
from dialect_kernels.gpu.quantize_activations import _quantize_activation_kernel as quantizer
from tests.support.views import shifted

FACTS = linear._Device("no such device", 132, (9, 0), 60 << 20)


@triton.jit(do_not_specialize=["count"])
def copy_kernel(p_x, p_y, p_none, count, BLOCK: tl.constexpr, ADD: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < count) + ADD, mask=o < count)


def forget():
    """Have Triton forget what it has compiled, and with it the launchers of a test's driver."""
    for module in (decode, gemm, grouped, quantize_activations, quantize_fp8, rotation):
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()
    copy_kernel.device_caches.clear()


@pytest.fixture
def seen(monkeypatch):
    """What the driver launches: everything it is given."""
    given = []
    forget()
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
    monkeypatch.setattr(bound, "_bound", {})
    triton.runtime.driver.set_active(driver)
    yield given
    triton.runtime.driver._active = None
    forget()


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
    monkeypatch.setattr(linear, "_device", lambda device: FACTS)
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


def same_launch(a, b, fresh):
    """Whether two launches have the same kernel, grid, stream and arguments.

    Tensors of the caller are the same; `fresh` memory, of which the first launch wrote one piece
    and the other another, has the same size.
    """
    assert a[:6] == b[:6]
    assert len(a) == len(b)
    for x, y in zip(a[9:], b[9:], strict=True):
        if not isinstance(x, torch.Tensor):
            assert x == y
            assert type(x) is type(y)
        elif x.data_ptr() != y.data_ptr():
            assert (x.nbytes, x.device) == (y.nbytes, y.device)
            assert fresh.setdefault(x.data_ptr(), y.data_ptr()) == y.data_ptr()


def weight(features=128, columns=512, book=SEMANTIC_32):
    return PackedTensor.empty((features, columns), book, 32)


@pytest.mark.parametrize(
    ("activation_format", "bias"), [("dialect", True), ("fp8", False), ("none", True)]
)
def test_a_bound_product_makes_the_same_launches(seen, monkeypatch, activation_format, bias):
    """Also with splits of K, whose counters are zeros."""
    monkeypatch.setattr(linear, "_device", lambda device: FACTS)
    for columns in (512, 8192):
        p, b = weight(columns=columns), torch.zeros(128) if bias else None
        x = torch.zeros(3, columns, dtype=torch.bfloat16)
        arguments = (x, p, b, activation_format, "default")
        linear.dialect_linear(*arguments)  # compiles
        seen.clear()
        first = linear._dialect_linear(*arguments)
        want = seen[:]
        with monkeypatch.context() as patched:
            patched.setattr(linear, "_dialect_linear", None)
            seen.clear()
            again = linear.dialect_linear(*arguments)
        fresh = {first.data_ptr(): again.data_ptr()}
        assert len(seen) == len(want) == (1 if activation_format == "none" else 2)
        for got, expected in zip(seen, want, strict=True):
            same_launch(expected, got, fresh)
        assert (again.shape, again.dtype) == (first.shape, first.dtype)
        counters = [a for a in seen[-1] if isinstance(a, torch.Tensor) and a.dtype == torch.int32]
        counters = [a for a in counters if a.data_ptr() in fresh.values()]
        assert len(counters) == (columns == 8192)
        if activation_format == "none":
            assert all(not a.any() for a in counters)


def semantic(tokens, salient, grouped_tokens=True):
    """A decomposed product of few or of many tokens, each time with other memory."""
    p = weight()
    label = torch.zeros(tokens, dtype=torch.int32) if grouped_tokens else None
    rows = torch.full((salient,), -1) if salient else None
    x, bias = torch.zeros(tokens, 512, dtype=torch.bfloat16), torch.zeros(128)
    return lambda: linear.semantic_linear(x, p, bias, rows, label)


def shared(tokens):
    """Products of the same tokens with two weights."""
    x, weights = torch.zeros(tokens, 512, dtype=torch.bfloat16), [(weight(), None)] * 2
    return lambda: linear.linears(x, weights, "dialect", None, None)[1]


def mixture(activation_format, named, rotation="none"):
    together = PackedTensor.empty((4 * 128, 512), SEMANTIC_32, 32, rotation=rotation)
    x = torch.zeros(6, 512, dtype=torch.bfloat16)
    rows = torch.zeros(6, dtype=torch.int64) if named else None
    offsets, bias = torch.tensor([0, 2, 3, 3, 5]), torch.zeros(4, 128)
    arguments = (x, rows, offsets, PackedExperts(together, 4), bias, activation_format, "default")
    return lambda: grouped.grouped_linear(*arguments)


def without_library(x, scale, weight, *_):
    return torch.empty(len(x), len(weight))


OTHERS = {
    "decomposed": (lambda: semantic(3, 2), 3, (3, 128)),
    "grouped": (lambda: semantic(3, 0), 3, (3, 128)),
    "decomposed, many": (lambda: semantic(2000, 4), 3, (2000, 128)),
    "not semantic": (lambda: semantic(3, 0, grouped_tokens=False), 2, (3, 128)),
    "several weights": (lambda: shared(3), 3, (3, 128)),
    "experts": (lambda: mixture("dialect", named=True), 3, (6, 128)),
    "experts, fp8": (lambda: mixture("fp8", named=False), 3, (6, 128)),
    "experts, 16 bits": (lambda: mixture("none", named=True), 2, (6, 128)),
    "experts, rotated": (lambda: mixture("none", named=True, rotation="hadamard_32"), 3, (6, 128)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_products_are_bound(seen, monkeypatch, kind):
    """Zeros that the launches count on are new ones: errors of groups, rows of no expert."""
    monkeypatch.setattr(linear, "_device", lambda device: FACTS)
    monkeypatch.setattr(library, "_scaled_product", without_library)
    make, launched, shape = OTHERS[kind]
    first = make()
    assert first().shape == shape  # compiles
    seen.clear()
    with monkeypatch.context() as patched:
        patched.setattr(bound, "recording", lambda: True)  # nothing is bound now
        result = first()
    want = seen[:]
    for module in (linear, grouped):  # the ordinary way is not taken
        monkeypatch.setattr(module, "quantize_tokens", None)
        monkeypatch.setattr(module, "launch_sixteen_bits", None)
    zeros, make_zeros = [], torch.zeros

    def noted(*sizes, **options):
        zeros.append(make_zeros(*sizes, **options))
        return zeros[-1]

    monkeypatch.setattr(bound.torch, "zeros", noted)
    seen.clear()
    again = first()
    assert len(seen) == len(want) == launched
    fresh = {result.data_ptr(): again.data_ptr()}
    for got, expected in zip(seen, want, strict=True):
        same_launch(expected, got, fresh)
    assert (again.shape, again.dtype) == (result.shape, result.dtype)
    kinds = [(z.dtype, z.shape[-1]) for z in zeros]
    if "grouped" in kind or "decomposed" in kind:
        assert kinds == [(torch.int32, 3)]
    elif "experts" in kind:
        assert kinds == [(torch.bfloat16, 128)]
        assert zeros[0].data_ptr() == again.data_ptr()
    else:
        assert not kinds


@pytest.mark.parametrize("kind", ["decomposed", "decomposed, many", "experts"])
def test_other_bound_products_read_what_they_are_given(seen, monkeypatch, kind):
    """A reloaded weight and other tokens, rows and offsets; nothing of the first call is kept."""
    monkeypatch.setattr(linear, "_device", lambda device: FACTS)
    monkeypatch.setattr(library, "_scaled_product", without_library)
    make = OTHERS[kind][0]
    first = make()
    for _ in range(2):
        first()
    before = [a for each in seen for a in each[9:] if isinstance(a, torch.Tensor)]
    old = {a.data_ptr() for a in before if not is_kept(a)}
    seen.clear()
    other = make()
    other()
    assert seen
    read = [a for each in seen for a in each[9:] if isinstance(a, torch.Tensor)]
    given = [c.cell_contents for c in other.__closure__]
    given = [g for c in given for g in (c if isinstance(c, tuple) else (c,))]
    tensors = [t for g in given for t in getattr(g, "tensors", [g])]
    for tensor in tensors:
        of_torch = kind != "experts" and getattr(tensor, "dtype", None) == torch.float32  # a bias
        if isinstance(tensor, torch.Tensor) and not of_torch:
            assert any(tensor.data_ptr() == a.data_ptr() for a in read)
    assert not old & {a.data_ptr() for a in read if not is_kept(a)}


def test_a_bound_product_reads_what_it_is_given(seen, monkeypatch):
    """Nothing of the first product's weight is left: a reloaded one lies elsewhere."""
    monkeypatch.setattr(linear, "_device", lambda device: FACTS)
    x, bias = torch.zeros(2, 512, dtype=torch.bfloat16), torch.zeros(128)
    old = weight()
    for _ in range(2):
        linear.dialect_linear(x, old, bias, "dialect", "default")
    gone = [weakref.ref(tensor) for tensor in (x, bias, *old.tensors)]
    del x, bias, old
    seen.clear()
    assert all(tensor() is None for tensor in gone)
    x, bias, p = torch.zeros(2, 512, dtype=torch.bfloat16), torch.zeros(128), weight()
    linear.dialect_linear(x, p, bias, "dialect", "default")
    quantizer_read, product_read = seen
    assert quantizer_read[9] is x
    for tensor in (*p.tensors, bias):
        assert any(tensor is argument for argument in product_read)


def test_tables_of_bound_products_are_found_by_engines(seen, monkeypatch):
    """They are written again after a sleep, although the kernels' own caches may be empty."""
    monkeypatch.setattr(linear, "_device", lambda device: FACTS)
    x, p = torch.zeros(2, 512, dtype=torch.bfloat16), weight()
    for _ in range(2):
        linear.dialect_linear(x, p, None, "dialect", "default")
    read = {
        argument.data_ptr()
        for launched in seen[-2:]
        for argument in launched
        if isinstance(argument, torch.Tensor)
    }
    kept = [table for table in tables_on(x.device) if table.data_ptr() in read]
    assert len(kept) == 2


@pytest.mark.parametrize(
    "given",
    [
        lambda x, bias: (shifted(x), bias),
        lambda x, bias: (x.T.contiguous().T, bias),
        lambda x, bias: (x, shifted(bias)),
        lambda x, bias: (x, torch.zeros(256)[::2]),
    ],
)
def test_what_has_to_be_copied_takes_the_ordinary_way(seen, monkeypatch, given):
    monkeypatch.setattr(linear, "_device", lambda device: FACTS)
    x, bias, p = torch.zeros(2, 512, dtype=torch.bfloat16), torch.zeros(128), weight()
    for _ in range(2):
        linear.dialect_linear(x, p, bias, "dialect", "default")
    computed, compute = [], linear._dialect_linear
    monkeypatch.setattr(linear, "_dialect_linear", lambda *a: computed.append(1) or compute(*a))
    linear.dialect_linear(*given(x, bias)[:1], p, given(x, bias)[1], "dialect", "default")
    assert computed


def test_a_profiler_sees_every_launch(seen, monkeypatch):
    monkeypatch.setattr(linear, "_device", lambda device: FACTS)
    x, p = torch.zeros(2, 512, dtype=torch.bfloat16), weight()
    for _ in range(2):
        linear.dialect_linear(x, p, None, "dialect", "default")
    assert seen[-1][6:9] == (None, None, None)
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    linear.dialect_linear(x, p, None, "dialect", "default")
    metadata, enter, _ = seen[-1][6:9]
    assert metadata.get()["name"] == "eight_bit_kernel"
    assert enter is triton.knobs.runtime.launch_enter_hook


@pytest.mark.parametrize(
    "launched_otherwise",
    [
        lambda kernel, grid, run, *a, stream: run(*grid, stream, kernel.function, *a),
        lambda kernel, grid, run, *a, stream: run(
            *grid, stream, kernel.packed_metadata, kernel.function, None, None, None, *a
        ),
        lambda kernel, grid, run, *a, stream: run(
            *grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *a[::-1]
        ),
    ],
)
def test_another_way_of_launching_is_noticed(seen, monkeypatch, launched_otherwise):
    """As of a version of Triton that is not known yet."""
    monkeypatch.setattr(linear, "_device", lambda device: FACTS)
    kind = triton.compiler.compiler.CompiledKernel

    def way(self, grid):
        self._init_handles()
        return lambda *a, stream=17: launched_otherwise(self, grid, self.run, *a, stream=stream)

    x, p = torch.zeros(2, 512, dtype=torch.bfloat16), weight()
    linear.dialect_linear(x, p, None, "dialect", "default")
    assert all(bound._bound.values())
    bound._bound.clear()
    monkeypatch.setattr(kind, "__getitem__", way)
    linear.dialect_linear(x, p, None, "dialect", "default")
    assert list(bound._bound.values()) == [None]
    linear.dialect_linear(x, p, None, "dialect", "default")


def test_of_a_product_of_a_library_its_operands_are_bound(seen, monkeypatch):
    monkeypatch.setattr(linear, "_device", lambda device: FACTS)
    monkeypatch.setattr(library, "_scaled_product", lambda x, *_: torch.zeros(len(x), 128))
    x, p = torch.zeros(2000, 512, dtype=torch.bfloat16), weight()
    for _ in range(2):
        assert linear.dialect_linear(x, p, None, "dialect", "default").shape == (2000, 128)
    whole, operands = bound._bound.values()
    assert whole is None
    assert operands is not None


@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_a_weight_that_is_kept_decoded_is_not_decoded_again(seen, monkeypatch, activation_format):
    """With 64 tokens the packed bytes are read, by launches that are bound as ever."""
    monkeypatch.setattr(linear, "_device", lambda device: FACTS)
    monkeypatch.setattr(linear, "runs_on", lambda device: True)
    read = []

    def product(x, *operands):
        read.append(operands[1 if activation_format != "none" else 0])
        return torch.zeros(len(x), 128, dtype=torch.bfloat16)

    monkeypatch.setattr(library, "_scaled_product", product)
    monkeypatch.setattr(library.F, "linear", product)
    x, p = torch.zeros(65, 512, dtype=torch.bfloat16), weight()
    kept = linear.decode_ahead(p, activation_format, x.dtype)
    (decoding,) = seen
    assert any(p.codes is argument for argument in decoding)
    seen.clear()
    for _ in range(2):
        linear.dialect_linear(x, p, None, activation_format, "default", kept)
    assert len(seen) == (0 if activation_format == "none" else 2), "quantizers alone"
    assert [weight.data_ptr() for weight in read] == [kept.weight.data_ptr()] * 2
    linear.dialect_linear(x[:64], p, None, activation_format, "default", kept)
    assert len(read) == 2
    assert any(p.codes is argument for argument in seen[-1])
