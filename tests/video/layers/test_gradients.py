"""Gradients through quantized layers, and a LoRA that learns on them."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

import diffusers_hook
from dialect_kernels.formatbook import SEMANTIC_32
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.layers.fp8 import Fp8Linear
from diffusers_hook.layouts import Stream
from tests.video.support.tiny_video import wan, wan_inputs

LORA = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "net.2"])


def dialect(activation_format, rotation):
    def quantized(layer):
        return DialectLinear.quantized(
            layer, Stream.VIDEO, SEMANTIC_32, 32, activation_format, "layer", rotation
        )

    return quantized


@pytest.mark.parametrize(
    "quantized",
    [
        *(
            dialect(form, rotation)
            for form in ("dialect", "fp8", "none")
            for rotation in ("none", "hadamard_32")
        ),
        lambda layer: Fp8Linear.quantized(layer, "layer"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_decoded_weight(quantized, dtype):
    torch.manual_seed(0)
    layer = quantized(nn.Linear(96, 48).to(dtype))
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 5, 48, dtype=dtype)
    layer(x).backward(upstream)
    assert torch.equal(x.grad, upstream @ layer.decode())
    torch.testing.assert_close(layer.bias.grad, upstream.sum((0, 1)))
    with torch.no_grad():
        assert torch.equal(layer(x), layer.product(x))


def gradients(model, video):
    """Of an adapter with the same numbers every time."""
    torch.manual_seed(0)
    model.add_adapter(LORA)
    adapted = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for parameter in adapted.values():
        nn.init.normal_(parameter, std=0.1)
    model(**video, return_dict=False)[0].square().mean().backward()
    return {name: parameter.grad for name, parameter in adapted.items()}


def test_an_adapter_on_16_bit_tokens_has_the_gradients_of_the_decoded_model():
    """Nothing is rounded there but the weights, so that they differ by the order of sums alone."""
    options = {"activation_format": "none", "progress": False, "salient_fraction": 0, "seda": False}
    found = gradients(diffusers_hook.enable(wan(), **options), wan_inputs())
    plain = diffusers_hook.enable(wan(), **options)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, DialectLinear):
            plain.set_submodule(name, layer.decoded())
    expected = gradients(plain, wan_inputs())
    assert found.keys() == expected.keys()
    assert len(found) >= 2 * 2 * 8
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_learns_with_all_mechanisms_on(checkpointing):
    model = diffusers_hook.enable(
        wan(), progress=False, book=SEMANTIC_32.name, seda=True, salient_fraction=0.25
    )
    video = wan_inputs()
    with torch.no_grad():
        target = wan()(**video, return_dict=False)[0]
    model.requires_grad_(False)
    torch.manual_seed(0)
    model.add_adapter(LORA)
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (model(**video, return_dict=False)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.8 * losses[0]
