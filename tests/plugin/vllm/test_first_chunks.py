"""First chunks of prompts in the back end for GPUs: what FlashAttention gets, and what is left.

FlashAttention itself needs a GPU: a stand-in computes what its documentation says, in float64, and
its signature is read from vLLM's source.
"""

import ast
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dialect_kernels.kv_cache import Scoring
from tests.plugin.vllm.test_gpu_cache import in_an_engine, layer
from tests.support.cached_attention import expected, make

SWITCH = {"blockdialect": {"kv_cache": "dialect"}}
MIXED = ((1, 40), (6, 30), (5, 5), (9, 9))
"""(queries, positions): decoding, a continuation, and two first chunks."""
FA_UTILS = "vllm.v1.attention.backends.fa_utils"


def flash_attention(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, cu_seqlens_k, max_seqlen_k, softmax_scale, causal,
    window_size, softcap, fa_version,
):  # fmt: skip
    """What ``flash_attn_varlen_func`` documents, in float64; -1 in `window_size` is no limit."""
    assert causal
    assert fa_version == 3
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff()
    assert max_seqlen_q == max_seqlen_k == int(lengths.max())
    assert cu_seqlens_q.dtype == torch.int32
    assert (int(cu_seqlens_q[0]), int(cu_seqlens_q[-1])) == (0, len(q))
    group = q.shape[1] // k.shape[1]
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        key, value = (x[start:end].double().repeat_interleave(group, dim=1) for x in (k, v))
        score = torch.einsum("qhd,khd->hqk", q[start:end].double(), key) * softmax_scale
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        behind = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
        left, right = (math.inf if side < 0 else side for side in window_size)
        score = score.masked_fill((behind > min(right, 0)) | (-behind > left), -math.inf)
        out[start:end] = torch.einsum("hqk,khd->qhd", score.softmax(dim=-1), value).to(out.dtype)
    return out


@pytest.fixture
def with_flash(monkeypatch):
    """As on a GPU with FlashAttention 3."""
    from vllm.v1.attention.backends import fa_utils

    from dialect_plugin.vllm import first_chunks

    calls = []

    def called(**given):
        calls.append(given)
        return flash_attention(**given)

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", called, raising=False)
    monkeypatch.setattr(first_chunks, "is_flash_attn_varlen_func_available", lambda: True)
    monkeypatch.setattr(first_chunks, "get_flash_attn_version", lambda **given: 3)
    return calls


def builder(case, dtype=torch.bfloat16):
    """vLLM's builder of metadata, made as vLLM makes it."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from dialect_plugin.vllm.gpu_attention import DialectGPUBackend as Backend

    heads, size = case.query.shape[1:]
    model = SimpleNamespace(
        get_num_attention_heads=lambda parallel: heads,
        get_num_kv_heads=lambda parallel: case.cache.heads,
        get_head_size=lambda: size,
        rswa_window=None,
        dtype=dtype,
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=None,
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.NONE, static_forward_context={}
        ),
    )
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=case.cache.heads, head_size=size, dtype=torch.bfloat16
    )
    with in_an_engine(SWITCH):
        packed = Backend.customize_spec(spec)
    return Backend.get_builder_cls()(packed, [], config, torch.device("cpu"))


def common(case, padding=0, **options):
    """vLLM's metadata of a step, with `padding` sequences that nobody has."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    start, lengths, table, _ = case.context
    start = torch.cat([start, start[-1:].expand(padding)])
    lengths = torch.cat([lengths, lengths.new_zeros(padding)])
    table = torch.cat([table, table.new_zeros(padding, table.shape[1])])
    queries = start.diff()
    return CommonAttentionMetadata(
        **{
            "query_start_loc": start,
            "query_start_loc_cpu": start.clone(),
            "seq_lens": lengths,
            "seq_lens_cpu_upper_bound": lengths.clone(),
            "num_reqs": len(lengths),
            "num_actual_tokens": case.query.shape[0] + padding,
            "max_query_len": int(queries.max()),
            "max_seq_len": int(lengths.max()),
            "block_table_tensor": table,
            "slot_mapping": case.slots,
            **options,
        }
    )


def positions(case, sequences):
    """Tokens of queries among those of all positions."""
    at, found = 0, []
    for queries, length in sequences:
        found += range(at + length - queries, at + length)
        at += length
    return torch.tensor(found)


def attended(case, sequences, padding=0, **options):
    """What a layer gives for the step that `case` is, and its first chunks from 16-bit rows."""
    attention = layer(case, **options)
    module = SimpleNamespace(k_mean=case.cache.key_mean, v_mean=case.cache.value_mean)
    own = positions(case, sequences)
    attention.do_kv_cache_update(module, case.key, case.value, case.cache.slots, case.slots)
    more = (case.query[:padding], case.key[:padding], case.value[:padding])
    new = [
        torch.cat([x, y])
        for x, y in zip((case.query, case.key[own], case.value[own]), more, strict=True)
    ]
    out = torch.full_like(new[0], 9.0)
    metadata = builder(case).build(0, common(case, padding))
    assert attention.forward(module, *new, case.cache.slots, metadata, out) is out
    return out


@pytest.mark.parametrize("kind", ["plain", "means", "window and cap"])
@pytest.mark.parametrize(("sequences", "begun"), [(MIXED, 7), (MIXED[2:], 0)])
def test_first_chunks_see_16_bit_rows_and_all_others_the_cache(with_flash, kind, sequences, begun):
    case = make(64, 2, sequences, torch.bfloat16, means=kind == "means")
    scoring, options = {
        "window and cap": (
            Scoring(0.125, soft_cap=3.0, window=4),
            {"logits_soft_cap": 3.0, "sliding_window": 4},
        )
    }.get(kind, (Scoring(0.125), {}))
    got = attended(case, sequences, padding=2, **options)
    assert len(with_flash) == 1
    from_cache = expected(case, scoring)
    bound = 2.0**-7 * float(from_cache.abs().max())
    if begun:
        assert float((got[:begun].double() - from_cache[:begun]).abs().max()) < bound
    want, at = torch.empty_like(case.query), 0
    for queries, length in sequences:
        if queries == length:
            rows = slice(at, at + length)
            whole = torch.tensor([0, length], dtype=torch.int32)
            first = positions(case, sequences)[rows]
            flash_attention(
                case.query[rows], case.key[first], case.value[first], want[rows], whole, length,
                whole, length, 0.125, True, [3, 0] if options else [-1, -1],
                options.get("logits_soft_cap", 0), 3,
            )  # fmt: skip
        at += queries
    count = len(case.query)
    assert torch.equal(got[begun:count], want[begun:count])
    assert bool((got[count:] == 9.0).all())
    # what the rows of the cache would have given, is given later and differs by the cache's error
    later = (got[begun:count].double() - from_cache[begun:count]).norm()
    assert 0.01 < float(later / from_cache[begun:count].norm()) < 0.15


def test_a_step_is_divided_where_first_chunks_begin():
    case = make(64, 2, MIXED, torch.bfloat16)
    made = builder(case).build(0, common(case, padding=1))
    chunks = made.first_chunks
    assert (chunks.sequences, chunks.tokens, chunks.count, chunks.longest) == (2, 7, 14, 9)
    assert chunks.starts.tolist() == [0, 5, 14]
    assert made.others.num_actual_tokens == 7
    assert made.others.query_start_loc.tolist() == [0, 1, 7]
    assert made.others.seq_lens.tolist() == [40, 30]
    assert torch.equal(made.others.block_table, case.context.block_table[:2])
    assert made.num_actual_tokens == 22


@pytest.mark.parametrize(
    ("sequences", "options"),
    [
        (((5, 5), (1, 40)), {}),  # not at the end
        (((1, 40), (1, 1)), {}),  # one token is what graphs of decoding serve
        (((6, 30),), {}),
        (MIXED, {"seq_lens_cpu_upper_bound": None}),
        (MIXED, {"causal": torch.tensor([True, True, True, False])}),
        (MIXED, {"causal": False}),
        (MIXED, {"seq_lens_cpu_upper_bound": torch.tensor([40, 30, 5, 10])}),
    ],
)
def test_other_steps_read_the_cache(sequences, options):
    case = make(64, 2, sequences, torch.bfloat16)
    made = builder(case).build(0, common(case, **options))
    assert getattr(made, "first_chunks", None) is None


def test_a_graph_serves_all_sequences_and_reads_the_cache():
    case = make(64, 2, MIXED, torch.bfloat16)
    made = builder(case).build_for_cudagraph_capture(common(case))
    assert made.first_chunks is None
    assert made.others is None


def test_batches_of_packed_caches_have_first_chunks_last():
    assert builder(make(64, 2, MIXED)).reorder_batch_threshold == 1


@pytest.mark.parametrize(
    "options",
    [
        {"alibi_slopes": [-0.1, -0.2, 0.0, -0.05]},
        {"sinks": torch.zeros(4)},
        {"kv_sharing_target_layer_name": "layers.3"},
        {"head_size": 512},
        {"additional": {}},
        {"additional": {"blockdialect": {"kv_cache": "dialect", "attention": "dialect"}}},
    ],
)
def test_layers_that_it_cannot_serve_read_the_cache(with_flash, options):
    case = make(64, 2, MIXED, torch.bfloat16)
    assert layer(case)._flash is not None
    assert layer(case, **options)._flash is None


def test_without_flash_attention_and_in_float32_all_read_the_cache(with_flash, monkeypatch):
    from dialect_plugin.vllm import first_chunks

    case = make(64, 2, MIXED, torch.float32)
    want = expected(case.stored(), Scoring(0.125))
    got = attended(case, MIXED)
    assert float((got.double() - want).abs().max()) < 1e-5 * float(want.abs().max())
    assert not with_flash
    for name, found in (
        ("get_flash_attn_version", lambda **given: None),
        ("is_flash_attn_varlen_func_available", lambda: False),
    ):
        monkeypatch.setattr(first_chunks, name, found)
        assert layer(case)._flash is None


def test_what_it_compiles_is_compiled_before_serving(with_flash, monkeypatch):
    from dialect_plugin.vllm import gpu_attention

    monkeypatch.setattr(gpu_attention, "warm_up", lambda *given: None)
    attention = layer(make(64, 2, MIXED))
    spec = SimpleNamespace(block_size=16)
    for dtype, calls in ((torch.float32, 0), (torch.bfloat16, 3)):
        attention.warm_up(SimpleNamespace(), spec, dtype, torch.device("cpu"))
        assert len(with_flash) == calls


def test_the_call_fits_vllms_function(with_flash):
    """Its module cannot be imported without the extensions for GPUs."""
    package = Path(find_spec("vllm").origin).parent
    source = (package / "vllm_flash_attn" / "flash_attn_interface.py").read_text()
    (found,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    )
    taken = [argument.arg for argument in found.args.args]
    needed = taken[: len(taken) - len(found.args.defaults)]
    attended(make(64, 2, MIXED, torch.bfloat16), MIXED)
    (given,) = with_flash
    assert set(needed) <= set(given) <= set(taken)
