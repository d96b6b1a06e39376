"""A 4-bit KV cache on a real GPU: the reference's bytes, attention close to float64, one graph."""

from dataclasses import replace

import pytest
import torch

from dialect_kernels import reference_attention
from dialect_kernels.cached_attention import attend, store, warm_up
from dialect_kernels.kv_cache import KvCache, Scoring
from tests.support.cached_attention import expected, make

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SEQUENCES = ((1, 1), (1, 700), (3, 40), (200, 333))
"""(queries, positions): the first token, decoding, a short continuation, a chunk."""


def on_gpu(cache):
    means = (None if m is None else m.to(DEVICE) for m in (cache.key_mean, cache.value_mean))
    return KvCache(cache.slots.to(DEVICE), cache.head_size, cache.rotated, *means)


def moved(context):
    given = context._asdict().items()
    tensors = {name: x.to(DEVICE) for name, x in given if isinstance(x, torch.Tensor)}
    return context._replace(**tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_size", "group"), [(64, 4), (96, 3), (128, 8), (256, 2)])
def test_bytes_and_outputs(head_size, group, dtype):
    case = make(head_size, group, SEQUENCES, dtype, means=True)
    cache = on_gpu(case.cache)
    store(cache, *(x.to(DEVICE) for x in (case.key, case.value, case.slots)))
    case = case.stored()
    assert torch.equal(cache.slots.cpu(), case.cache.slots)
    for scoring in (Scoring(head_size**-0.5), Scoring(head_size**-0.5, soft_cap=2.0, window=30)):
        want = expected(case, scoring)
        got = attend(cache, case.query.to(DEVICE), moved(case.context), scoring)
        bound = 2.0**-7 * float(want.abs().max())
        assert float((got.cpu().double() - want).abs().max()) < bound


def test_one_graph_serves_every_length():
    """Decoding, with a context in parts; lengths are read when the graph runs."""
    case = make(128, 4, ((1, 900), (1, 50)), torch.bfloat16).stored()
    cache, context, scoring = on_gpu(case.cache), moved(case.context), Scoring(128**-0.5)
    query = case.query.to(DEVICE)
    warm_up(replace(cache, slots=cache.slots.clone()), query.shape[1], query.dtype, scoring)
    attend(cache, query, context, scoring)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(cache, query, context, scoring)
    for lengths in ((900, 50), (17, 1)):
        context.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        shorter = case.context._replace(lengths=torch.tensor(lengths, dtype=torch.int32))
        want = reference_attention.attend(case.cache, case.query, shorter, scoring)
        assert float((out.cpu().float() - want.float()).abs().max()) < 2.0**-6
