"""Gradients through packed layers, and adapters of PEFT on top of them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dialect_kernels import quantize, reference
from dialect_kernels.formatbook import SEMANTIC_32
from dialect_kernels.rotation import rotate_activation
from dialect_plugin.scheme import LayerFormat
from dialect_plugin.transformers import DialectLinear
from tests.support.by_hand import TOKENS, logits_of

UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("rotation", ["none", "hadamard_32"])
@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_the_gradient_passes_straight_through_the_rounding(rotation, activation_format):
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 96), torch.nn.Parameter(torch.randn(48))
    packed = quantize(weight, SEMANTIC_32, 32, rotation=rotation)
    form = LayerFormat("semantic_32", 32, activation_format, rotation)
    layer = DialectLinear(packed, bias, form, "exact", torch.float32)
    x = torch.randn(2, 5, 96, requires_grad=True)
    y, upstream = layer(x), torch.randn(2, 5, 48)
    y.backward(upstream)
    with torch.no_grad():
        expected = reference.dialect_linear(x.flatten(0, 1), packed, bias, activation_format)
        assert torch.equal(y.flatten(0, 1), expected)
    decoded = rotate_activation(packed.dequantize(), rotation)
    torch.testing.assert_close(x.grad, upstream @ decoded)
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))
    assert torch.equal(layer.weight + 0, decoded)


def test_without_a_gradient_nothing_is_kept():
    packed = quantize(torch.randn(32, 64), SEMANTIC_32)
    layer = DialectLinear(
        packed, None, LayerFormat("semantic_32", 32, "dialect", "none"), "default", torch.float32
    )
    assert not layer(torch.randn(3, 64)).requires_grad
    with torch.no_grad():
        assert not layer(torch.randn(3, 64, requires_grad=True)).requires_grad


@pytest.fixture
def adapted(packed):
    model = AutoModelForCausalLM.from_pretrained(packed(), dtype=torch.float32)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def test_an_adapter_learns_and_is_saved(packed, adapted, tmp_path):
    before = logits_of(adapted)
    base = AutoModelForCausalLM.from_pretrained(packed(), dtype=torch.float32)
    assert torch.equal(before, logits_of(base))  # the second factor of a new adapter is 0
    codes = adapted.get_base_model().get_submodule(UP).base_layer.weight_packed.clone()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 14
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    after = adapted.get_base_model().get_submodule(UP).base_layer.weight_packed
    assert torch.equal(after, codes)
    adapted.save_pretrained(tmp_path)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits_of(again), logits_of(adapted))
    assert not torch.equal(logits_of(again), before)


def test_an_adapter_is_not_merged_into_packed_weights(adapted):
    with pytest.raises(RuntimeError, match=r"keep an adapter apart, or call .* dequantize\(\)"):
        adapted.merge_and_unload()


def test_a_model_that_carries_an_adapter_is_not_saved_whole(adapted, tmp_path):
    with pytest.raises(ValueError, match=r"carries an adapter; save the adapter by itself"):
        adapted.get_base_model().save_pretrained(tmp_path)


def test_an_adapter_of_transformers_own_integration(packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed(), dtype=torch.float32)
    model.add_adapter(LoraConfig(r=4, target_modules=["up_proj"]))
    model(TOKENS, labels=TOKENS).loss.backward()
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert len(names) == 4
    assert all("lora_" in name for name in names)
