"""SemanticDialect beside what else diffusers does to a transformer."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from tiny_video import LAYERS, generate, run, wan, wan_pipeline

import diffusers_hook
from diffusers_hook.attach import attached
from diffusers_hook.linear import DialectLinear

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


def test_model_offload_of_the_pipeline():
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(progress=False, seda=True)
    before = generate(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipe), before)


def test_sequential_offload():
    """Of the transformer alone: on CPU the whole pipeline fails without SemanticDialect too."""
    model = wan()
    diffusers_hook.enable(model, progress=False, seda=True)
    before = run(model)
    cpu_offload(model, CPU)
    assert model.blocks[0].attn1.to_q.bias.device.type == "meta"
    assert torch.equal(run(model), before)


def test_layerwise_casting():
    model = wan()
    diffusers_hook.enable(model, progress=False, seda=True)
    before = run(model)
    codes = model.blocks[0].attn1.to_q.weight_packed.clone()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert torch.equal(model.blocks[0].attn1.to_q.weight_packed, codes)
    assert ((run(model) - before).norm() / before.norm()) < 0.02


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
