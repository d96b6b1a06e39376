"""SemanticDialect beside what else diffusers does to a transformer."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict

import diffusers_hook
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.layers.fp8 import Fp8Linear
from diffusers_hook.layers.quantized import QuantizedLinear
from diffusers_hook.model.attach import attached
from tests.video.support.tiny_video import LAYERS, generate, run, wan, wan_inputs, wan_pipeline

LORA = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
CPU = torch.device("cpu")


def with_lora(model):
    """Add an adapter that changes the output."""
    torch.manual_seed(7)
    model.add_adapter(LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_lora_loaded_after():
    model = wan()
    diffusers_hook.enable(model, progress=False, seda=True)
    before = run(model)
    with_lora(model)
    changed = run(model)
    assert (changed - before).abs().max() > 0.01
    model.disable_adapters()
    assert torch.equal(run(model), before)


def test_lora_loaded_before_is_kept_and_its_base_quantized():
    model = with_lora(wan())
    before = run(model)
    diffusers_hook.enable(model, progress=False, seda=True)
    quantized = [n for n, m in model.named_modules() if isinstance(m, DialectLinear)]
    assert len(quantized) == 10 * LAYERS
    assert sum(name.endswith(".base_layer") for name in quantized) == 8 * LAYERS
    error = (run(model) - before).norm() / before.norm()
    assert 0 < error < 0.1
    diffusers_hook.disable(model)
    assert torch.equal(run(model), before)


def test_lora_before_and_after_give_the_same_output():
    first, second = with_lora(wan()), wan()
    diffusers_hook.enable(first, progress=False, seda=True)
    diffusers_hook.enable(second, progress=False, seda=True)
    assert torch.equal(run(first), run(with_lora(second)))


def lora_file(folder):
    """A LoRA as diffusers saves it."""
    layers = get_peft_model_state_dict(with_lora(wan()))
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


def quantized_layers(model):
    return [name for name, part in model.named_modules() if isinstance(part, QuantizedLinear)]


def test_loading_a_lora_decodes_no_weight(tmp_path, monkeypatch):
    """PEFT asks every weight some twenty times for its shape, dtype and device."""
    decoded = []
    for kind in (DialectLinear, Fp8Linear):
        monkeypatch.setattr(kind, "decode", lambda self, *_: decoded.append(self))
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(progress=False)
    pipe.load_lora_weights(lora_file(tmp_path))
    pipe.set_adapters(["default_0"], [0.5])
    assert generate(pipe).isfinite().all()
    pipe.unload_lora_weights()
    assert not decoded


def test_a_lora_loaded_before_and_unloaded_leaves_nothing_quantized(tmp_path):
    pipe = wan_pipeline()
    before = generate(pipe)
    pipe.load_lora_weights(lora_file(tmp_path))
    pipe.enable_semantic_dialect(progress=False)
    pipe.unload_lora_weights()
    pipe.disable_semantic_dialect()
    assert not quantized_layers(pipe.transformer)
    assert torch.equal(generate(pipe), before)


def test_a_lora_loaded_after_stays_when_disabled(tmp_path):
    pipe = wan_pipeline()
    before = generate(pipe)
    pipe.enable_semantic_dialect(progress=False)
    pipe.load_lora_weights(lora_file(tmp_path))
    pipe.disable_semantic_dialect()
    assert not quantized_layers(pipe.transformer)
    other = wan_pipeline()
    other.load_lora_weights(tmp_path)
    assert torch.equal(generate(pipe), generate(other))
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), before)


def by_adapter(method):
    """PEFT's own door, e.g. of `merge_adapter`: each adapter is asked."""

    def door(pipe):
        for part in pipe.transformer.modules():
            if isinstance(part, BaseTunerLayer):
                getattr(part, method)()

    return door


FUSED = "cannot be put into or taken out of quantized weights; call disable_semantic_dialect"


@pytest.mark.parametrize(
    ("fuse", "sentence"),
    [
        (lambda pipe: pipe.fuse_lora(), f"fuse_lora: a LoRA {FUSED}"),
        (lambda pipe: pipe.transformer.fuse_lora(), f"fuse_lora: a LoRA {FUSED}"),
        (by_adapter("merge"), "the weight of a quantized layer cannot be written to"),
        (
            lambda pipe: [m.merge(safe_merge=True) for m in adapters(pipe)],
            "the weight of a quantized layer cannot be written to",
        ),
    ],
)
def test_fusing_a_lora_while_enabled_is_refused(tmp_path, fuse, sentence):
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(progress=False)
    pipe.load_lora_weights(lora_file(tmp_path))
    before = generate(pipe)
    with pytest.raises(RuntimeError, match=sentence):
        fuse(pipe)
    assert not any(part.merged for part in adapters(pipe))
    assert torch.equal(generate(pipe), before)
    pipe.disable_semantic_dialect()
    pipe.fuse_lora()


def adapters(pipe):
    return [part for part in pipe.transformer.modules() if isinstance(part, BaseTunerLayer)]


@pytest.mark.parametrize(
    "unfuse",
    [
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.transformer.unfuse_lora(),
        by_adapter("unmerge"),
    ],
)
def test_unfusing_a_lora_while_enabled_is_refused(tmp_path, unfuse):
    """It is in the quantized weights; taken out of nothing, it would be applied twice."""
    pipe = wan_pipeline()
    pipe.load_lora_weights(lora_file(tmp_path))
    pipe.fuse_lora()
    fused = generate(pipe)
    pipe.enable_semantic_dialect(progress=False)
    before = generate(pipe)
    with pytest.raises(RuntimeError, match=f"unfuse_lora: a LoRA {FUSED}"):
        unfuse(pipe)
    assert all(part.merged for part in adapters(pipe))
    assert torch.equal(generate(pipe), before)
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), fused)
    unfuse(pipe)
    assert not any(part.merged for part in adapters(pipe))


def test_projections_fused_before_are_quantized_as_they_are():
    model = wan()
    before = run(model)
    model.fuse_qkv_projections()
    diffusers_hook.enable(model, progress=False, seda=True)
    assert isinstance(model.blocks[0].attn1.to_qkv, DialectLinear)
    assert isinstance(model.blocks[0].attn2.to_kv, DialectLinear)
    apart = wan()
    diffusers_hook.enable(apart, progress=False, seda=True)
    # one row exponent per output row: fused or not, the weights are the same numbers
    torch.testing.assert_close(run(model), run(apart), rtol=0, atol=1e-5)
    diffusers_hook.disable(model)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model), before)


def test_fusing_afterwards_is_refused():
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(progress=False, seda=True)
    with pytest.raises(RuntimeError, match="fuse them before enable_semantic_dialect"):
        pipe.transformer.fuse_qkv_projections()
    pipe.disable_semantic_dialect()
    pipe.transformer.fuse_qkv_projections()


@pytest.mark.parametrize("options", [
    {"offload_type": "leaf_level"},
    {"offload_type": "block_level", "num_blocks_per_group": 1},
])  # fmt: skip
def test_group_offload(options):
    model = wan()
    diffusers_hook.enable(model, progress=False, seda=True)
    before = run(model, context="cond")
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)
    assert torch.equal(run(model, context="cond"), before)


@pytest.mark.parametrize("first", ["enable", "offload"])
def test_group_offload_sees_the_layers_that_are_there(first):
    """Layer by layer: what has no hook would stay on the wrong device."""
    model = wan()
    before = run(model)

    def offload():
        model.enable_group_offload(CPU, CPU, offload_type="leaf_level")

    def hooked():
        linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
        return all(part._diffusers_hook.get_hook("group_offloading") for part in linear)

    if first == "offload":
        offload()
    diffusers_hook.enable(model, progress=False)
    if first == "enable":
        offload()
    assert hooked()
    assert run(model).isfinite().all()
    diffusers_hook.disable(model)
    assert hooked()
    assert torch.equal(run(model), before)


def test_group_offload_to_disk_refuses_an_exchange_of_layers(tmp_path):
    """Between calls its weights are nowhere in memory."""
    options = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    model = wan()
    model.enable_group_offload(CPU, CPU, **options)
    with pytest.raises(RuntimeError, match="on disk, where they cannot be exchanged; load the"):
        diffusers_hook.enable(model, progress=False)
    model = wan()
    diffusers_hook.enable(model, progress=False)
    before = run(model)
    model.enable_group_offload(CPU, CPU, **options | {"offload_to_disk_path": str(tmp_path / "b")})
    with pytest.raises(RuntimeError, match="on disk, where they cannot be exchanged; load the"):
        diffusers_hook.disable(model)
    assert torch.equal(run(model), before)


def test_model_offload_of_the_pipeline():
    pipe = wan_pipeline()
    plain = generate(pipe)
    pipe.enable_semantic_dialect(progress=False, seda=True)
    before = generate(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipe), before)
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), plain)
    pipe.enable_semantic_dialect(progress=False, seda=True)
    assert torch.equal(generate(pipe), before)


def test_model_offload_put_around_the_hook_stays_when_it_is_taken_off():
    pipe = wan_pipeline()
    before = generate(pipe)
    pipe.enable_semantic_dialect(progress=False)
    pipe.enable_model_cpu_offload(device="cpu")
    offloaded = vars(pipe.transformer)["forward"]
    pipe.disable_semantic_dialect()
    assert hasattr(pipe.transformer, "_hf_hook")
    assert vars(pipe.transformer).get("forward") is offloaded
    assert torch.equal(generate(pipe), before)
    offloaded = vars(pipe.transformer)["forward"]  # every generation puts it on anew
    pipe.enable_semantic_dialect(progress=False)
    pipe.disable_semantic_dialect()
    assert vars(pipe.transformer).get("forward") is offloaded
    pipe.remove_all_hooks()
    assert pipe.transformer.forward.__func__ is WanTransformer3DModel.forward  # nothing of ours
    assert torch.equal(generate(pipe), before)


def test_model_offload_taken_off_while_enabled_does_not_come_back():
    pipe = wan_pipeline()
    before = generate(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.enable_semantic_dialect(progress=False)
    quantized = generate(pipe)
    pipe.remove_all_hooks()
    assert torch.equal(generate(pipe), quantized)
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), before)


def test_a_loaded_model_takes_other_options_while_it_is_offloaded(tmp_path):
    """The root has parameters of its own, which only the root's own hook brings back."""
    model = wan()
    diffusers_hook.enable(model, progress=False)
    model.save_pretrained(tmp_path)
    diffusers_hook.disable(model)
    diffusers_hook.enable(model, progress=False, salient_fraction=0.5)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    cpu_offload(loaded, CPU)
    assert loaded.scale_shift_table.device.type == "meta"
    for _ in range(2):
        diffusers_hook.enable(loaded, salient_fraction=0.5)
        assert torch.equal(run(loaded, context="cond"), run(model, context="cond"))
    assert loaded.scale_shift_table.device.type == "meta"


def test_sequential_offload():
    """Of the transformer alone: on CPU the whole pipeline fails without SemanticDialect too."""
    model = wan()
    diffusers_hook.enable(model, progress=False, seda=True)
    model.blocks[0].attn2.to_k.bias = None  # accelerate forgets layers without parameters
    before, held = run(model), diffusers_hook.summary(model).transformers[0].bytes_after
    cpu_offload(model, CPU)
    for layer in (model.blocks[0].attn1.to_q, model.blocks[0].attn2.to_k):
        assert {tensor.device.type for tensor in layer.parameters()} == {"meta"}
    summary = diffusers_hook.summary(model).transformers[0]
    assert summary.bytes_after == held
    assert summary.bytes_by_device["offloaded"] > 0.9 * held
    assert torch.equal(run(model), before)


def test_sequential_offload_comes_off_before_an_exchange_of_layers():
    pipe = wan_pipeline()
    before = run(pipe.transformer)
    pipe.enable_semantic_dialect(progress=False)
    quantized = run(pipe.transformer)
    cpu_offload(pipe.transformer, CPU)
    with pytest.raises(
        RuntimeError, match=r"offloaded one by one; call pipe\.remove_all_hooks\(\)"
    ):
        pipe.disable_semantic_dialect()
    assert torch.equal(run(pipe.transformer), quantized)
    pipe.remove_all_hooks()
    pipe.disable_semantic_dialect()
    assert torch.equal(run(pipe.transformer), before)
    cpu_offload(pipe.transformer, CPU)
    with pytest.raises(ValueError, match="enable SemanticDialect before offloading"):
        pipe.enable_semantic_dialect(progress=False)


def test_the_summary_counts_shared_memory_once():
    model = wan()
    diffusers_hook.enable(model, progress=False)
    summary = diffusers_hook.summary(model).transformers[0]
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert summary.bytes_by_device == {"cpu": summary.bytes_after} == {"cpu": held}
    model.register_buffer("view", model.patch_embedding.weight.data[:2])
    assert diffusers_hook.summary(model).transformers[0].bytes_after == held


def test_layerwise_casting():
    model = wan()
    diffusers_hook.enable(model, progress=False, seda=True)
    before = run(model)
    codes = model.blocks[0].attn1.to_q.weight_packed.clone()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert torch.equal(model.blocks[0].attn1.to_q.weight_packed, codes)
    assert ((run(model) - before).norm() / before.norm()) < 0.02
    with pytest.raises(
        RuntimeError, match="layerwise casting is on and diffusers cannot switch it"
    ):
        diffusers_hook.disable(model)


def test_an_attention_processor_set_by_the_user_stays():
    model, mine = wan(), WanAttnProcessor()
    before = model.blocks[1].attn1.processor
    diffusers_hook.enable(model, progress=False)
    model.blocks[0].attn1.processor = mine
    diffusers_hook.disable(model)
    assert model.blocks[0].attn1.processor is mine
    assert model.blocks[1].attn1.processor is before


def test_an_attention_backend_set_by_the_user_stays():
    model = wan()
    diffusers_hook.enable(model, progress=False)
    model.set_attention_backend("_native_math")
    diffusers_hook.disable(model)
    backends = {
        part.processor._attention_backend for part in model.modules() if hasattr(part, "processor")
    }
    assert backends == {"_native_math"}


def test_refreshes_count_attention_calls_and_not_steps():
    """First-block cache skips the other blocks: their calls, and their refreshes, are fewer."""
    model = wan(layers=3)
    diffusers_hook.enable(model, progress=False, salient_refresh=2, seda=False)
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    for step in range(6):
        for branch in ("cond", "uncond"):
            run(model, context=branch, timestep=900 - step)
    calls = [
        {name: branch.calls for name, branch in block.branches.items()}
        for block in attached(model).state.blocks
    ]
    assert calls == [{"cond": 6, "uncond": 6}] + 2 * [{"cond": 1, "uncond": 1}]
    assert diffusers_hook.summary(model).transformers[0].salient_refreshes == 2 * (3 + 1 + 1)
    model.disable_cache()
    diffusers_hook.disable(model)
    assert run(model).isfinite().all()


CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=10.0),
    "mag": lambda: MagCacheConfig(threshold=10.0, num_inference_steps=6, mag_ratios=[1.0] * 6),
    "pyramid attention broadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "sea": lambda: SeaCacheConfig(threshold=10.0),
    "taylor seer": lambda: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r"blocks\..*\.attn1"]
    ),
}


@torch.no_grad()
def six_steps(model):
    """A generation with one guidance branch, as pipelines tell their caches of it."""
    found = []
    for step in range(6):
        told = {"step_index": step, "sigma": 1 - step / 6, "num_inference_steps": 6}
        with model.cache_context("cond", **told):
            found.append(model(**wan_inputs(timestep=900 - 100 * step, seed=step)).sample)
    return found


@pytest.mark.parametrize("first", ["enable", "cache"])
@pytest.mark.parametrize("cache", CACHES)
def test_caches_of_diffusers(cache, first):
    """They leave some attention out; what is left is counted, and their hooks stay."""
    model, plain = wan(layers=3), wan(layers=3)
    plain.enable_cache(CACHES[cache]())
    expected = six_steps(plain)
    if first == "cache":
        model.enable_cache(CACHES[cache]())
    diffusers_hook.enable(model, progress=False, seda=True)
    if first == "enable":
        model.enable_cache(CACHES[cache]())
    for got, wanted in zip(six_steps(model), expected, strict=True):
        assert 0 < (got - wanted).norm() / wanted.norm() < 0.2
    calls = [block.branches["cond"].calls for block in attached(model).state.blocks]
    assert 1 <= min(calls) < 6
    diffusers_hook.disable(model)
    model._reset_stateful_cache()
    again = six_steps(model)
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))
    model.disable_cache()


def faster_cache(timestep=lambda: 500, **options):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        tensor_format="BCFHW",
        current_timestep_callback=timestep,
        **options,
    )


def three_calls(model):
    """With both guidance branches in a batch; FasterCache leaves one out in the later calls."""
    return [run(model, batch=2, timestep=900 - step) for step in range(3)]


@pytest.mark.parametrize("options", [{"seda": False}, {"seda": True, "salient_fraction": 0.0}])
def test_faster_cache_is_refused_where_tokens_are_told_apart(options):
    model = wan()
    diffusers_hook.enable(model, progress=False, **options)
    before = run(model, batch=2)
    model.enable_cache(faster_cache())
    with pytest.raises(RuntimeError, match="FasterCache leaves out half of a batch inside the mod"):
        run(model, batch=2)
    model.disable_cache()
    assert torch.equal(run(model, batch=2), before)


def test_faster_cache_that_leaves_no_samples_out():
    """Of a model that is distilled from its guidance: it skips attention alone."""
    model = wan()
    diffusers_hook.enable(model, progress=False, seda=True)
    reached = []
    model.enable_cache(faster_cache(lambda: reached[-1], is_guidance_distilled=True))
    for timestep in (900, 500, 400, 300):
        reached.append(timestep)
        assert run(model, context="cond", timestep=timestep).isfinite().all()
    calls = [block.branches["cond"].calls for block in attached(model).state.blocks]
    assert all(1 <= found < len(reached) for found in calls)


def test_faster_cache_where_tokens_are_rounded_alone():
    model, plain = wan(), wan()
    before = three_calls(plain)
    plain.enable_cache(faster_cache())
    expected = three_calls(plain)
    assert not torch.equal(expected[1], before[1])
    diffusers_hook.enable(model, progress=False, salient_fraction=0.0)
    model.enable_cache(faster_cache())
    for got, wanted in zip(three_calls(model), expected, strict=True):
        assert 0 < (got - wanted).norm() / wanted.norm() < 0.2
    diffusers_hook.disable(model)
    model._reset_stateful_cache()
    again = three_calls(model)
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))


def test_vae_tiling():
    pipe = wan_pipeline()
    pipe.vae.enable_tiling()
    pipe.enable_semantic_dialect(progress=False, seda=True)
    assert generate(pipe).isfinite().all()


def test_moving_the_pipeline_to_its_device_changes_nothing():
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(progress=False, seda=True)
    before = generate(pipe)
    assert torch.equal(generate(pipe.to("cpu")), before)


def test_a_modular_pipeline_through_the_function():
    """Anything with `components` will do."""
    from diffusers import ModularPipeline

    class Loaded(ModularPipeline):
        def __init__(self, transformer):
            self.transformer = transformer

        @property
        def components(self):
            return {"transformer": self.transformer}

    pipe = Loaded(wan())
    before = run(pipe.transformer)
    diffusers_hook.enable(pipe, progress=False, seda=True)
    assert not torch.equal(run(pipe.transformer), before)
    diffusers_hook.disable(pipe)
    assert torch.equal(run(pipe.transformer), before)
