"""The linear layer on a real GPU: inline PTX, MMAs, splits and the library's GEMM.

What the interpreter cannot show. The reference runs on the CPU.
"""

import pytest
import torch

from dialect_kernels import (
    DIALECT_FP4,
    SEMANTIC_32,
    PackedTensor,
    baselines,
    dialect_linear,
    quantize,
    reference,
    semantic_linear,
)
from dialect_kernels.formatbook import BLOCK_SIZES
from dialect_kernels.gpu.decode import decode_bf16, decode_e4m3
from tests.support.quantizer_cases import operand_order

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TOKENS = (1, 2, 3, 8, 15, 16, 17, 31, 33, 64, 65, 127, 257, 1100)

all_books = pytest.mark.parametrize("book", [DIALECT_FP4, SEMANTIC_32], ids=lambda b: b.name)
all_blocks = pytest.mark.parametrize("block_size", BLOCK_SIZES)
all_formats = pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])


def tensor(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.exp2(torch.randint(-5, 6, (1, columns), generator=generator).float())


def any_bytes(rows, columns, book, block_size):
    generator = torch.Generator().manual_seed(0)

    def bytes_(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    codes, meta = bytes_(rows, columns // 2), bytes_(rows, columns // block_size)
    meta.view(-1)[:256] = torch.arange(256)
    exponent = torch.randint(-100, 100, (rows,), generator=generator).to(torch.int8)
    return PackedTensor(codes, meta, exponent, (rows, columns), book, block_size)


@all_blocks
@all_books
def test_decoded_bytes(book, block_size):
    p = any_bytes(65, 1088, book, block_size)
    want, want_scale = p.to_e4m3()
    got, scale = decode_e4m3(p.to(DEVICE))
    got = got[:65].view(torch.uint8).cpu()
    assert torch.equal(got, operand_order(want.view(torch.uint8)))
    assert torch.equal(scale[:65].cpu(), want_scale)
    bf16 = decode_bf16(p.to(DEVICE))[: p.shape[0], : p.shape[1]].cpu().contiguous()
    assert torch.equal(bf16.view(torch.int16), p.dequantize(torch.bfloat16).view(torch.int16))


@all_blocks
@all_books
def test_exact_has_the_bits_of_the_reference(book, block_size):
    x, p = tensor(max(TOKENS), 1000), quantize(tensor(200, 1000, 1) / 50, book, block_size)
    bias = tensor(1, 200, 2)[0]
    want = reference.dialect_linear(x, p, bias)
    on_gpu = p.to(DEVICE)
    for tokens in TOKENS:
        y = dialect_linear(
            x[:tokens].to(DEVICE), on_gpu, bias.to(DEVICE), accumulation="exact"
        ).cpu()
        assert torch.equal(y, want[:tokens])


@all_blocks
@all_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_default_within_its_bound(dtype, activation_format, block_size):
    columns = 2000
    w = tensor(200, columns, 1) / 50
    for data in (tensor(max(TOKENS), columns), tensor(max(TOKENS), columns).abs()):
        x = data.to(dtype)
        p = quantize(w if (data < 0).any() else w.abs(), DIALECT_FP4, block_size)
        a = x.double()
        if activation_format == "dialect":
            a = reference.round_activation(x, p.book, block_size).double()
        elif activation_format == "fp8":
            q, scale = baselines.quantize_fp8(x)
            a = q.double() * scale.double()[:, None]
        b = p.dequantize().double()
        want, allowed = a @ b.T, 2.0**-7 * (a.abs() @ b.abs().T)
        allowed = allowed + torch.finfo(dtype).eps * want.abs()
        on_gpu = p.to(DEVICE)
        for tokens in TOKENS:
            y = dialect_linear(x[:tokens].to(DEVICE), on_gpu, None, activation_format)
            assert ((y.cpu().double() - want[:tokens]).abs() <= allowed[:tokens]).all()


def test_decomposed_tokens():
    x, p = tensor(300, 400), quantize(tensor(96, 400, 1) / 50, SEMANTIC_32)
    salient = torch.arange(0, 300, 7)
    group = torch.arange(300) % 13 - 1
    want = reference.semantic_linear(x, p, None, salient, group)
    got = semantic_linear(
        x.to(DEVICE), p.to(DEVICE), None, salient.to(DEVICE), group.to(DEVICE)
    ).cpu()
    assert (got - want).abs().max() <= 2.0**-7 * want.abs().max()


@all_formats
@pytest.mark.parametrize("tokens", [1, 40, 1100])
def test_a_captured_graph_repeats_itself(tokens, activation_format):
    x = tensor(tokens, 2048).to(torch.bfloat16).to(DEVICE)
    p = quantize(tensor(256, 2048, 1) / 50).to(DEVICE)
    want = dialect_linear(x, p, None, activation_format)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dialect_linear(x, p, None, activation_format)
    for _ in range(100):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, want)


def test_exact_sums_are_those_of_integers():
    """Blocks on one scale: every sum is an integer, which float32 holds up to K = 16384."""
    columns = 16384
    generator = torch.Generator().manual_seed(0)

    def half_units(rows):
        x = torch.randint(-15, 16, (rows, columns), generator=generator) / 2.0
        x[:, ::32] = 7.5  # every block has the exponent 0
        return x

    x, w = half_units(65), half_units(64)
    p = quantize(w)
    a = (reference.round_activation(x) * 2).to(torch.int64)
    b = (p.dequantize() * 2).to(torch.int64)
    y = dialect_linear(x.to(DEVICE), p.to(DEVICE), accumulation="exact")
    assert torch.equal((y.cpu() * 4).to(torch.int64), a @ b.T)


def test_exact_has_the_bits_of_the_cpu_kernel():
    x, p = tensor(64, 4096).to(torch.bfloat16), quantize(tensor(4096, 4096, 1) / 50)
    want = dialect_linear(x, p, accumulation="exact")
    for tokens in (1, 2, 17, 64):
        y = dialect_linear(x[:tokens].to(DEVICE), p.to(DEVICE), accumulation="exact")
        assert torch.equal(y.cpu(), want[:tokens])


@all_formats
def test_nothing_is_compiled_after_the_warm_up(activation_format, monkeypatch):
    import triton

    from dialect_kernels.ops import warm_up

    p = quantize(tensor(1024, 4096, 1) / 50).to(DEVICE)
    warm_up(p, activation_format, torch.bfloat16)
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda *_, **facts: compiled.append(facts)
    )
    for tokens in (*range(1, 70), 128, 129, 255, 256, 257, 512, 513, 1000, 4097, 16384):
        dialect_linear(
            torch.ones(tokens, 4096, dtype=torch.bfloat16, device=DEVICE),
            p,
            None,
            activation_format,
        )
    assert not compiled


@pytest.mark.parametrize("features", [1024, 4096])
def test_splits_agree_run_after_run(features):
    """Whoever is last adds the splits in their order: the same bits in every run."""
    x = tensor(16, 14336).to(torch.bfloat16).to(DEVICE)
    p = quantize(tensor(features, 14336, 1) / 50).to(DEVICE)
    want = dialect_linear(x, p)
    for _ in range(200):
        assert torch.equal(dialect_linear(x, p), want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")
def test_a_gpu_that_is_not_the_current_one():
    x, w = tensor(8, 512).to(torch.bfloat16), tensor(64, 512, 1)
    want = dialect_linear(x.to(DEVICE), quantize(w).to(DEVICE))
    there = torch.device("cuda", 1)
    assert torch.equal(dialect_linear(x.to(there), quantize(w.to(there))).cpu(), want.cpu())
