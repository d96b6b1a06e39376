"""The back end for GPUs with a KV cache of 4 bits, on tensors of the CPU.

Its kernels have tests of their own; here the kernels of the CPU compute in their place.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from dialect_kernels import reference_attention
from dialect_kernels.kv_cache import Scoring
from dialect_plugin.scheme import Scheme, SchemeError
from tests.support.cached_attention import expected, make

SWITCH = {"blockdialect": {"kv_cache": "dialect"}}
SEQUENCES = ((1, 40), (6, 30))
"""(queries, positions): decoding, and a chunk."""


@contextmanager
def in_an_engine(additional):
    """Layers are built in an engine with these options."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig(additional_config=additional)
    with set_current_vllm_config(config):
        yield config


def layer(case, additional=SWITCH, **options):
    from dialect_plugin.vllm.gpu_attention import DialectGPUBackend

    heads, size = case.query.shape[1:]
    arguments = {
        "num_heads": heads, "head_size": size, "scale": 0.125, "num_kv_heads": case.cache.heads,
        "alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto", **options,
    }  # fmt: skip
    with in_an_engine(additional):
        return DialectGPUBackend.get_impl_cls()(**arguments)


def metadata(case):
    start, lengths, table, causal = case.context
    return SimpleNamespace(
        num_actual_tokens=case.query.shape[0],
        query_start_loc=start,
        seq_lens=lengths,
        block_table=table,
        causal=causal,
    )


@pytest.mark.parametrize("rounds", [False, True])
def test_a_layer_rounds_queries_and_probabilities_where_attention_is_in_4_bits(rounds):
    case = make(64, 2, SEQUENCES).stored()
    full = {"blockdialect": {"kv_cache": "dialect", "attention": "dialect"}}
    attention = layer(case, full if rounds else SWITCH)
    out = torch.empty_like(case.query)
    module = SimpleNamespace()
    new = case.query, None, None, case.cache.slots
    attention.forward(module, *new, metadata(case), out)
    reference = [
        reference_attention.attend(case.cache, case.query, case.context, Scoring(0.125), each)
        for each in (rounds, not rounds)
    ]
    near, far = (float((out - each).abs().max() / each.abs().max()) for each in reference)
    assert near < 2.0**-9
    assert far > 2 * near


@pytest.mark.parametrize("kind", ["plain", "means", "window and cap", "slopes and sinks"])
def test_a_layer_stores_and_attends(kind):
    case = make(64, 2, SEQUENCES, torch.float32, means=kind == "means")
    sinks, slopes = torch.tensor([0.5, -1.0, 2.0, 0.0]), [-0.1, -0.2, 0.0, -0.05]
    scoring, options = {
        "plain": (Scoring(0.125), {}),
        "means": (Scoring(0.125), {}),
        "window and cap": (
            Scoring(0.125, soft_cap=3.0, window=9),
            {"logits_soft_cap": 3.0, "sliding_window": 9},
        ),
        "slopes and sinks": (
            Scoring(0.125, slopes=torch.tensor(slopes), sinks=sinks),
            {"alibi_slopes": slopes, "sinks": sinks.bfloat16()},
        ),
    }[kind]
    attention = layer(case, **options)
    module = SimpleNamespace(k_mean=case.cache.key_mean, v_mean=case.cache.value_mean)
    slots, memory = case.slots.to(torch.int32), case.cache.slots
    attention.do_kv_cache_update(module, case.key, case.value, memory, slots)
    # outputs may have more rows, for graphs of fixed sizes
    out = torch.full((case.query.shape[0] + 3, 4, 64), 9.0)
    query = torch.cat([case.query, case.query[:3]])
    got = attention.forward(module, query, None, None, memory, metadata(case), out)
    assert got is out
    want = expected(case, scoring)
    count = case.query.shape[0]
    assert float((got[:count].double() - want).abs().max()) < 1e-5 * float(want.abs().max())
    assert bool((got[count:] == 9.0).all())


def test_a_profiling_run_and_other_caches_are_vllms_own(monkeypatch):
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    case = make(64, 2, SEQUENCES, torch.bfloat16)
    attention = layer(case)
    assert bool((attention.forward(None, *[case.query] * 3, None, None, case.query + 1) == 0).all())
    seen = []
    for name in ("forward", "do_kv_cache_update"):
        monkeypatch.setattr(TritonAttentionImpl, name, lambda *given: seen.append(given))
    sixteen_bits = torch.zeros(4, 2, 16, 128, dtype=torch.bfloat16)
    for each, memory in ((attention, sixteen_bits), (layer(case, {}), case.cache.slots)):
        new = case.key, case.value, memory
        each.do_kv_cache_update(None, *new, case.slots)
        each.forward(None, case.query, *new, metadata(case), case.query)
    assert len(seen) == 4


def test_outputs_and_queries_stay_16_bit_where_a_cache_may_be_packed():
    case = make(64, 2, SEQUENCES)
    assert not layer(case).supports_quant_query_input
    assert not layer(case).fused_output_quant_supported(None)


def test_options_that_do_not_go_together_are_refused_when_a_layer_is_built():
    case = make(64, 2, SEQUENCES)
    with pytest.raises(SchemeError, match="has the key 'kvcache'"):
        layer(case, {"blockdialect": {"kvcache": "dialect"}})
    with pytest.raises(SchemeError, match="kv_cache_dtype: 'auto'; with kv_cache 'dialect'"):
        layer(case, kv_cache_dtype="fp8")


def test_features_that_its_kernels_lack_are_not_offered():
    from vllm.v1.attention.backend import AttentionType

    from dialect_plugin.vllm.gpu_attention import DialectGPUBackend as Backend

    assert Backend.get_name() == "CUSTOM"
    assert not Backend.supports_mm_prefix()
    assert not Backend.supports_rswa()
    assert not Backend.supports_alibi_sqrt()
    assert not Backend.supports_batch_invariance()
    assert Backend.supports_sink()
    assert Backend.supports_attn_type(AttentionType.DECODER)


def test_a_scheme_with_a_cache_needs_the_back_end(monkeypatch):
    from vllm.platforms import current_platform

    from dialect_plugin.vllm.config import BlockDialectConfig

    def attention(name, kind="decoder", mla=False):
        backend = SimpleNamespace(get_name=lambda: name, is_mla=lambda: mla)
        return SimpleNamespace(attn_backend=backend, attn_type=kind)

    wanted = BlockDialectConfig(Scheme(serialized=False, kv_cache="dialect"))
    assert wanted.get_quant_method(attention("CPU_ATTN"), "attn") is None
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    for fine in (
        attention("CUSTOM"),
        attention("FLASH_ATTN_MLA", mla=True),
        attention("FLASH_ATTN", kind="encoder_only"),
    ):
        assert wanted.get_quant_method(fine, "attn") is None
    plain = BlockDialectConfig(Scheme(serialized=False))
    assert plain.get_quant_method(attention("FLASH_ATTN"), "attn") is None
    with pytest.raises(SchemeError, match="back end is FLASH_ATTN, which has no such cache; add"):
        wanted.get_quant_method(attention("FLASH_ATTN"), "attn")


def test_it_is_registered_beside_vllms_own(monkeypatch):
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends import registry

    from dialect_plugin.vllm import compat
    from dialect_plugin.vllm.gpu_attention import DialectGPUBackend

    registered = []
    monkeypatch.setattr(registry, "register_backend", lambda *given: registered.append(given))
    for name, on_cpu in (("is_cpu", False), ("is_cuda", True)):
        monkeypatch.setattr(type(current_platform), name, lambda self, yes=on_cpu: yes)
    compat.register_attention()
    ((place, path),) = registered
    assert place is registry.AttentionBackendEnum.CUSTOM
    assert path == f"{DialectGPUBackend.__module__}.{DialectGPUBackend.__qualname__}"


def test_kernels_are_compiled_when_the_caches_are_there(monkeypatch):
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from dialect_plugin.vllm import gpu_attention

    warmed = []
    monkeypatch.setattr(gpu_attention, "warm_up", lambda *given: warmed.append(given))
    monkeypatch.setattr(TritonAttentionMetadataBuilder, "__init__", lambda *given: None)
    attention = layer(make(64, 2, SEQUENCES), logits_soft_cap=3.0)
    mean = torch.zeros(2, 64)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context={"layer": SimpleNamespace(impl=attention, k_mean=mean)}
        ),
        model_config=SimpleNamespace(dtype=torch.float16),
    )
    build = gpu_attention.DialectGPUBackend.get_builder_cls()
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    build(spec, ["layer"], config, torch.device("cpu"))
    assert warmed == []
    with in_an_engine(SWITCH):
        packed = gpu_attention.DialectGPUBackend.customize_spec(spec)
    build(packed, ["layer"], config, torch.device("cpu"))
    ((cache, heads, dtype, scoring, rounds),) = warmed
    assert not rounds
    assert cache.slots.shape == (1, 2, 32, 70)
    assert (cache.key_mean, cache.value_mean) == (mean, None)
    assert (heads, dtype, scoring) == (4, torch.float16, Scoring(0.125, soft_cap=3.0))


def by_flag(**options):
    return SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="blockdialect"),
        additional_config={},
        quant_config=None,
        kv_transfer_config=None,
        **options,
    )


def test_a_cache_by_dtype(monkeypatch):
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from dialect_plugin.vllm import caches
    from dialect_plugin.vllm.gpu_attention import DialectGPUBackend as Backend

    config = by_flag()
    assert caches.cache_format(config) == "dialect"
    caches._check_engine(config, "blockdialect")
    assert "blockdialect" in Backend.supported_kv_cache_dtypes
    monkeypatch.setattr(caches, "_latest", lambda: config)

    def customized(head_size, dtype):
        spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=head_size, dtype=dtype)
        return spec, Backend.customize_spec(spec)

    _, packed = customized(128, torch.uint8)
    assert (packed.dtype, packed.state_content_bytes) == (torch.uint8, 138)
    skipped, kept = customized(128, torch.bfloat16)
    assert kept is skipped
    with pytest.raises(SchemeError, match="head size 80 is no multiple of 32: switch"):
        customized(80, torch.uint8)


def test_the_dtype_is_registered_where_vllm_lets_one(monkeypatch):
    from vllm.config import cache

    from dialect_plugin.vllm import gpu_attention

    gpu_attention.register_cache_dtype()  # this vLLM may have no such list: nothing happens
    names, handlers = ["auto"], {}

    def register(name):
        names.append(name)
        return lambda handler: handlers.setdefault(name, handler())

    monkeypatch.setattr(cache, "KV_CACHE_DTYPES", names, raising=False)
    monkeypatch.setattr(cache, "register_kv_cache_dtype", register, raising=False)
    gpu_attention.register_cache_dtype()
    gpu_attention.register_cache_dtype()
    assert names == ["auto", "blockdialect"]
    assert handlers["blockdialect"].name == "blockdialect"
    assert handlers["blockdialect"].torch_dtype() == torch.uint8
