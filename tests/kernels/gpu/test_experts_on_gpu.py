"""Products with experts on a real GPU: inline PTX and MMAs, and one CUDA graph for any routing."""

import pytest
import torch

from dialect_kernels import PackedExperts, expert_linear, ops, quantize

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
COUNTS = ((3, 0, 17, 1), (0, 300, 2, 70), (0, 0, 0, 1))


def tensor(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.exp2(torch.randint(-5, 6, (1, columns), generator=generator).float())


def layer(counts):
    """Experts and bias, tokens, the rows' tokens and offsets; two rows are nobody's."""
    experts = PackedExperts.stack([quantize(tensor(200, 1024, seed=i) / 50) for i in range(4)])
    rows = torch.randint(50, (sum(counts) + 2,), generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([1, *counts]).cumsum(0)
    return experts, tensor(4, 200, seed=9), tensor(50, 1024, seed=8).bfloat16(), rows, offsets


def on_gpu(experts):
    return PackedExperts(experts.together.to(DEVICE), experts.count)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_the_bits_or_the_bound_of_the_cpu(activation_format, counts):
    experts, bias, x, rows, offsets = layer(counts)
    want = expert_linear(x, experts, offsets, rows, bias, activation_format, "exact")
    given = (x.to(DEVICE), on_gpu(experts), offsets.to(DEVICE), rows.to(DEVICE), bias.to(DEVICE))
    close = expert_linear(*given, activation_format).cpu()
    assert (close - want).abs().max() <= 2.0**-7 * want.abs().max()
    if activation_format == "dialect":
        assert torch.equal(expert_linear(*given, activation_format, "exact").cpu(), want)


def test_one_graph_serves_every_routing():
    experts, bias, x, rows, _ = layer(COUNTS[1])
    offsets = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    held = [tensor.to(DEVICE) for tensor in (x, rows)]
    packed, added = on_gpu(experts), bias.to(DEVICE)

    def call():
        arguments = packed.op_arguments(added)
        return ops.grouped_linear(held[0], held[1], offsets, *arguments, "dialect", "exact")

    ops.warm_up_experts(packed, "dialect", torch.bfloat16, torch.float32)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for counts in COUNTS:
        routed = torch.tensor([1, *counts]).cumsum(0)
        offsets.copy_(routed)
        graph.replay()
        want = expert_linear(x, experts, routed, rows, bias, "dialect", "exact")
        assert torch.equal(y.cpu(), want)
