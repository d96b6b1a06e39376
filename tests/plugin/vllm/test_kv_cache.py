"""A KV cache of 4 bits in vLLM's engine on a CPU."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import save_file

from dialect_kernels import reference_attention
from dialect_kernels.kv_cache import Context, KvCache, Scoring, slot_bytes
from dialect_kernels.rotation import rotate_activation
from dialect_plugin.cache_means import MEANS_FILE
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.reader import INDEX
from dialect_plugin.scheme import Scheme, SchemeError
from tests.support.engine_core import many_engines, serve
from tests.support.engines import engine, load_model
from tests.support.served_models import (
    PROMPT,
    VOCABULARY,
    build,
    checkpoint_tensors,
    expected_logprobs,
)
from tests.support.swept_models import decoded_copy

SWITCH = {"blockdialect": {"kv_cache": "dialect"}}
FULL = {"blockdialect": {"kv_cache": "dialect", "attention": "dialect"}}
ARCHITECTURE = "LlamaForCausalLM"
TOLERANCE = 1e-3
"""Of log-probabilities in float32."""


def config(additional=None, scheme="none", cache_dtype="auto", transfer=None, attention="none"):
    return SimpleNamespace(
        additional_config=additional or {},
        quant_config=SimpleNamespace(scheme=Scheme(kv_cache=scheme, attention=attention)),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        kv_transfer_config=transfer,
    )


def test_the_engines_option_goes_before_the_models():
    from dialect_plugin.vllm.caches import cache_format

    assert cache_format(config()) == "none"
    assert cache_format(config(SWITCH)) == "dialect"
    assert cache_format(config(scheme="dialect")) == "dialect"
    off = {"blockdialect": {"kv_cache": "none"}, "another_plugin": 1}
    assert cache_format(config(off, "dialect")) == "none"
    assert cache_format(SimpleNamespace(additional_config=SWITCH, quant_config=None)) == "dialect"


def test_attention_goes_with_a_cache_in_the_format():
    from dialect_plugin.vllm.caches import attention_format

    assert attention_format(config(SWITCH)) == "none"
    assert attention_format(config(FULL)) == "dialect"
    assert attention_format(config(scheme="dialect", attention="dialect")) == "dialect"
    for off in ({"kv_cache": "none"}, {"attention": "none"}):
        wanted = config({"blockdialect": off}, "dialect", attention="dialect")
        assert attention_format(wanted) == "none"
    alone = {"blockdialect": {"attention": "dialect"}}
    assert attention_format(config(alone, "dialect")) == "dialect"
    assert attention_format(config(alone, cache_dtype="blockdialect")) == "dialect"
    with pytest.raises(SchemeError, match=r'needs keys and values in 4 bits: add "kv_cache": "d'):
        attention_format(config(alone))
    with pytest.raises(
        SchemeError, match=r"attention of blockdialect is 'fp8'; allowed are 'none'"
    ):
        attention_format(config({"blockdialect": {"attention": "fp8"}}))


@pytest.mark.parametrize(
    ("additional", "sentence"),
    [
        ({"blockdialct": {}}, "the key 'blockdialct' is not known; did you mean 'blockdialect'?"),
        (
            {"blockdialect": {"kvcache": "dialect"}},
            "has the key 'kvcache'; allowed are kv_cache",
        ),
        ({"blockdialect": {"kv_cache": "fp8"}}, "is 'fp8'; allowed are 'none' and 'dialect'"),
        ({"blockdialect": "dialect"}, "blockdialect is 'dialect'; it must be an object such as"),
    ],
)
def test_an_option_that_is_misspelt_is_one_sentence(additional, sentence):
    from dialect_plugin.vllm.caches import cache_format

    with pytest.raises(SchemeError, match=r"^additional_config: ") as raised:
        cache_format(config(additional))
    assert sentence in str(raised.value)


def test_what_does_not_go_together_is_one_sentence():
    from dialect_plugin.vllm.caches import _check_engine

    _check_engine(config(SWITCH), "auto")
    with pytest.raises(SchemeError, match="kv_cache_dtype: 'fp8'; with kv_cache 'dialect' allowed"):
        _check_engine(config(SWITCH, cache_dtype="fp8"), "fp8")
    with pytest.raises(SchemeError, match="kv_transfer_config: connectors that move or offload"):
        _check_engine(config(SWITCH, transfer=object()), "auto")


def test_a_scheme_with_a_cache_is_refused_where_vllm_cannot_pack_one(monkeypatch):
    from dialect_plugin.vllm import compat
    from dialect_plugin.vllm.config import BlockDialectConfig

    wanted = BlockDialectConfig(Scheme(serialized=False, kv_cache="dialect"))
    wanted.maybe_update_config("model")
    monkeypatch.setattr(compat, "packs_caches", lambda: False)
    BlockDialectConfig(Scheme(serialized=False)).maybe_update_config("model")
    with pytest.raises(SchemeError, match="but such a cache needs vLLM"):
        wanted.maybe_update_config("model")


def test_layers_that_a_dialect_cache_cannot_serve_keep_16_bit():
    from vllm.v1.kv_cache_interface import CrossAttentionSpec, FullAttentionSpec, SlidingWindowSpec

    from dialect_plugin.vllm import caches
    from dialect_plugin.vllm.cpu_attention import DialectCPUBackend
    from dialect_plugin.vllm.gpu_attention import DialectGPUBackend

    def customized(kind, head_size, **options):
        sizes = {"block_size": 16, "num_kv_heads": 2, "head_size": head_size}
        spec = kind(**sizes, dtype=torch.bfloat16, **options)
        on_cpu, on_gpu = (b.customize_spec(spec) for b in (DialectCPUBackend, DialectGPUBackend))
        assert on_cpu == on_gpu
        return spec, on_cpu

    switched_on = config(SWITCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches, "_latest", lambda: switched_on)
        for kind, options in ((FullAttentionSpec, {}), (SlidingWindowSpec, {"sliding_window": 8})):
            _, packed = customized(kind, 128, **options)
            assert (packed.dtype, packed.state_content_bytes) == (torch.uint8, 138)
            assert packed.page_size_bytes == 2 * 16 * 138
        for kind, head_size, options in (
            (FullAttentionSpec, 80, {}),
            (FullAttentionSpec, 64, {"head_size_v": 32}),
            (CrossAttentionSpec, 64, {}),
        ):
            plain, kept = customized(kind, head_size, **options)
            assert kept == plain
        patch.setattr(caches, "_latest", lambda: config())
        plain, kept = customized(FullAttentionSpec, 64)
        assert kept == plain


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build(ARCHITECTURE, tmp_path_factory.mktemp("model"), head_dim=64)


def through_a_cache(directory, means=None, dialect_attention=False):
    """Log-probabilities of transformers' model whose keys and values went through a cache.

    With `dialect_attention` the reference attends, with rounded queries and probabilities.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def rounded(x, mean):
        rows = x[0].transpose(0, 1)  # [T, heads, D]
        count, heads, size = rows.shape
        memory = torch.zeros(1, heads, count, slot_bytes(size), dtype=torch.uint8)
        rows = rows - mean
        reference_attention.store(KvCache(memory, size), rows, rows, torch.arange(count))
        read, _ = reference_attention.read(KvCache(memory, size), torch.arange(count))
        return (rotate_activation(read) + mean).transpose(0, 1)[None]

    def by_reference(query, key, value, own, scale):
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        count, heads, size = key.shape
        memory = torch.zeros(1, heads, count, slot_bytes(size), dtype=torch.uint8)
        cache = KvCache(memory, size, True, *(mean.expand(heads, size) for mean in own))
        reference_attention.store(cache, key, value, torch.arange(count))
        whole = torch.tensor([0, count], dtype=torch.int32)
        context = Context(whole, whole[1:], torch.zeros(1, 1, dtype=torch.int32))
        return reference_attention.attend(cache, query, context, Scoring(scale), True)[None]

    def attention(module, query, key, value, mask, **options):
        own = [torch.zeros(1)] * 2
        if means is not None:
            front = f"model.layers.{module.layer_idx}.self_attn"
            own = [means[f"{front}.{leaf}"].float() for leaf in ("k_mean", "v_mean")]
        if dialect_attention:
            return by_reference(query, key, value, own, options["scaling"]), None
        key, value = (rounded(x, mean) for x, mean in zip((key, value), own, strict=True))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS.register("through_a_cache", attention)
    transformers.AttentionMaskInterface.register(
        "through_a_cache", transformers.masking_utils.sdpa_mask
    )
    model = getattr(transformers, ARCHITECTURE).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="through_a_cache"
    )
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1, :VOCABULARY]
    return torch.log_softmax(logits, dim=-1)


@pytest.mark.slow
def test_served_as_the_reference_says_and_without_the_option_as_vllm_does(tiny):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import _cached_get_attn_backend

    wanted = through_a_cache(tiny)
    with many_engines():
        on = serve(tiny, additional_config=SWITCH).output
        chunked = serve(tiny, additional_config=SWITCH, max_num_batched_tokens=4).output
        options = {"serialized": False, "quant_method": "blockdialect", "ignore": ["re:.*"]}
        by_scheme = serve(
            tiny, hf_overrides={"quantization_config": options | {"kv_cache": "dialect"}}
        ).output
        off = serve(tiny).output
        assert AttentionBackendEnum.CPU_ATTN.is_overridden()
        path = AttentionBackendEnum.CPU_ATTN.get_path()
        AttentionBackendEnum.CPU_ATTN.clear_override()
        _cached_get_attn_backend.cache_clear()
        own = serve(tiny).output
        from vllm.v1.attention.backends.registry import register_backend

        register_backend(AttentionBackendEnum.CPU_ATTN, path)
        _cached_get_attn_backend.cache_clear()
    assert torch.equal(off, own)
    assert (off - wanted).abs().max() > 20 * TOLERANCE  # so that the tolerance tells them apart
    torch.testing.assert_close(on, wanted, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(chunked, wanted, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(by_scheme, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_queries_and_probabilities_are_served_as_the_reference_says(tiny, with_means, tmp_path):
    packed, means = with_means
    wanted = through_a_cache(tiny, dialect_attention=True)
    decoded = decoded_copy(tiny, packed, tmp_path / "decoded")
    wanted_packed = through_a_cache(decoded, means, dialect_attention=True)
    assert (wanted - through_a_cache(tiny)).abs().max() > 20 * TOLERANCE
    assert (wanted_packed - through_a_cache(decoded, means)).abs().max() > 20 * TOLERANCE
    scheme = {"serialized": False, "quant_method": "blockdialect", "ignore": ["re:.*"]}
    scheme |= {"kv_cache": "dialect", "attention": "dialect"}
    with many_engines():
        on = serve(tiny, additional_config=FULL).output
        chunked = serve(tiny, additional_config=FULL, max_num_batched_tokens=4).output
        by_scheme = serve(tiny, hf_overrides={"quantization_config": scheme}).output
        of_packed = serve(
            packed,
            quantization="blockdialect_w4a16",
            additional_config={"blockdialect": {"attention": "dialect"}},
        ).output
    for found in (on, chunked, by_scheme):
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(of_packed, wanted_packed, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def with_means(tiny, tmp_path_factory):
    """A packed checkpoint with means, and the means; large ones, so that each of them is seen."""
    packed = tmp_path_factory.mktemp("packed") / "packed"
    convert(tiny, packed, Scheme(kv_cache="dialect", block_size=16))
    draw = torch.Generator().manual_seed(1)
    means = {
        f"model.layers.{number}.self_attn.{leaf}": torch.randn(2, 64, generator=draw).bfloat16()
        for number in range(2)
        for leaf in ("k_mean", "v_mean")
    }
    save_file(means, packed / MEANS_FILE, {"format": "pt"})
    index = json.loads((packed / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(means, MEANS_FILE)
    (packed / INDEX).write_text(json.dumps(index))
    return packed, means


@pytest.mark.slow
def test_means_of_the_checkpoint_are_those_of_the_cache(tiny, with_means, tmp_path):
    packed, means = with_means
    wanted = through_a_cache(decoded_copy(tiny, packed, tmp_path / "decoded"), means)
    without = through_a_cache(tmp_path / "decoded")
    assert (without - wanted).abs().max() > 20 * TOLERANCE
    with many_engines():
        on = serve(packed, quantization="blockdialect_w4a16").output
        off = {"blockdialect": {"kv_cache": "none"}}
        plain = serve(packed, quantization="blockdialect_w4a16", additional_config=off).output
    torch.testing.assert_close(on, wanted, rtol=0, atol=TOLERANCE)
    exact = expected_logprobs(
        tmp_path / "decoded", ARCHITECTURE, "none", block_size=lambda name: None
    )[:-1]
    torch.testing.assert_close(plain, exact, rtol=0, atol=TOLERANCE)


def buffers(model):
    return {name: value for name, value in model.named_buffers() if name.endswith("_mean")}


@pytest.mark.usefixtures("one_rank")
def test_means_arrive_and_stay_through_reloads_and_pushes(with_means):
    from vllm.model_executor.model_loader.reload import layerwise

    packed, means = with_means
    model = load_model(packed)
    found = buffers(model)
    places = {name: value.data_ptr() for name, value in found.items()}
    stored = {name.replace(".self_attn.", ".self_attn.attn."): mean for name, mean in means.items()}
    assert found.keys() == stored.keys() <= model.state_dict().keys()

    def are(factor):
        for name, value in buffers(model).items():
            assert value.dtype == torch.float32
            assert torch.equal(value, factor * stored[name].float()), name
            assert value.data_ptr() == places[name]

    are(1)
    model.load_weights((name, 2 * mean) for name, mean in means.items())
    are(2)
    layerwise.initialize_layerwise_reload(model)
    weights = checkpoint_tensors(packed) | {name: 4 * mean for name, mean in means.items()}
    model.load_weights(iter(weights.items()))
    layerwise.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))
    are(4)
    bad = dict(list(means.items())[:1]) | {"model.layers.1.self_attn.v_mean": torch.ones(2, 32)}
    with pytest.raises(ValueError, match=r"shape \[2, 32\]; it must be \[heads of keys and val"):
        model.load_weights(iter(bad.items()))
    are(4)
    nan = {"model.layers.1.self_attn.v_mean": torch.full((2, 64), torch.nan)}
    with pytest.raises(ValueError, match=r"v_mean: the checkpoint's tensor holds NaN or Inf"):
        model.load_weights(iter(nan.items()))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("ranks", "rank", "head"), [(2, 0, 0), (2, 1, 1), (4, 1, 0), (4, 2, 1)])
def test_a_rank_has_the_means_of_its_heads(with_means, monkeypatch, ranks, rank, head):
    """Where there are more ranks than heads, some have the same."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    monkeypatch.setattr(group, "world_size", ranks)
    monkeypatch.setattr(group, "rank_in_group", rank)
    packed, means = with_means
    for name, value in buffers(load_model(packed)).items():
        whole = means[name.replace(".attn.", ".")].float()
        assert torch.equal(value, whole[head : head + 1])


@pytest.mark.slow
@pytest.mark.parametrize("switch", [SWITCH, FULL], ids=["cache", "attention"])
def test_blocks_prefixes_and_preemption_with_the_shipped_model(switch):
    from vllm import SamplingParams

    options = {
        "additional_config": json.loads(json.dumps(switch)),
        "enable_prefix_caching": True,
        "block_size": 32,
        "dtype": "bfloat16",
        "max_model_len": 256,
    }
    prompt = [{"prompt_token_ids": [(7 * i) % 500 + 3 for i in range(70)]}]
    wanted = SamplingParams(max_tokens=12, temperature=0, detokenize=False, ignore_eos=True)
    with engine("demo/model", **options) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        model = llm.llm_engine.vllm_config.model_config.hf_config
        heads = model.num_key_value_heads * model.num_hidden_layers
        in_16_bit = 2**30 // (heads * cache.block_size * 2 * 64 * 2)
        assert cache.num_gpu_blocks >= 3.6 * in_16_bit
        (first,) = llm.generate(prompt, wanted, use_tqdm=False)
        (again,) = llm.generate(prompt, wanted, use_tqdm=False)
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 64)
        assert first.outputs[0].token_ids == again.outputs[0].token_ids
    # fewer blocks than four such requests need at once
    options |= {"enable_prefix_caching": False, "num_gpu_blocks_override": 9}
    with engine("demo/model", **options) as llm:
        many = llm.generate(prompt * 4, wanted, use_tqdm=False)
    for one in many:
        assert one.outputs[0].token_ids == first.outputs[0].token_ids
