"""The quantized linear layers by themselves: what they compute and how they look from outside."""

import pytest
import torch
from torch import nn

import diffusers_hook
from dialect_kernels import SEMANTIC_32, dialect_linear, quantize, semantic_linear
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.layers.fp8 import Fp8Linear
from diffusers_hook.layouts import Stream
from diffusers_hook.tokens.block_state import state_of
from tests.support.brute_force import butterfly
from tests.video.support.tiny_video import run, wan

ROTATED = "hadamard_32"
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def fp8(rows=40, columns=96, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return Fp8Linear.quantized(nn.Linear(columns, rows, bias=bias).to(dtype), "layer")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", list(HALF_UNIT))
def test_fp8_rounds_its_product_once(dtype, bias):
    layer = fp8(bias=bias, dtype=dtype)
    x = (200 * torch.randn(2, 3, 96)).to(dtype)  # in float16 the unscaled sums would overflow
    scale = layer.weight_scale.view(torch.float32).double()
    e4m3 = layer.weight_fp8.view(torch.float8_e4m3fn).double()
    exact = (x.double() @ e4m3.T) * scale
    sums = (x.double().abs() @ e4m3.abs().T) * scale  # of what is added up
    if bias:
        exact = exact + layer.bias.double()
        sums = sums + layer.bias.double().abs()
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 40)
    limit = HALF_UNIT[dtype] * exact.abs() + 100 * 2.0**-24 * sums
    assert ((y.double() - exact).abs() <= limit).all()


def test_fp8_takes_the_weight_in_parts(monkeypatch):
    layer, x = fp8(), torch.randn(3, 96)
    whole = layer(x)
    monkeypatch.setattr("diffusers_hook.layers.fp8._CHUNK", 96 * 7)
    torch.testing.assert_close(layer(x), whole, rtol=0, atol=1e-6)


@pytest.fixture
def layer():
    model = wan(layers=1)
    diffusers_hook.enable(model, progress=False)
    return model.blocks[0].attn1.to_q


@pytest.fixture
def decoded(monkeypatch):
    """How many weights were decoded."""
    calls = []
    decode = DialectLinear.decode
    monkeypatch.setattr(
        DialectLinear, "decode", lambda self, *a: calls.append(1) or decode(self, *a)
    )
    return calls


def test_asking_for_shape_dtype_and_device_decodes_nothing(layer, decoded):
    weight = layer.weight
    assert weight.shape == (64, 64)
    assert weight.dtype == torch.float32
    assert weight.device == weight.data.device == layer.weight_packed.device
    assert (weight.ndim, weight.numel(), weight.requires_grad) == (2, 4096, False)
    assert "float32" in repr(weight)
    assert not decoded


def test_computing_with_the_weight_decodes_it(layer, decoded):
    values, x = layer.decode(), torch.randn(2, 64, requires_grad=True)
    assert torch.equal(layer.weight, values)
    assert torch.equal(layer.weight.data, values)
    assert torch.equal(layer.weight[3], values[3])
    assert torch.equal(layer.weight.T + 1, values.T + 1)
    y = nn.functional.linear(x, layer.weight)
    assert torch.equal(y, nn.functional.linear(x, values))
    y.sum().backward()
    torch.testing.assert_close(x.grad, values.sum(dim=0).expand(2, -1))
    assert decoded


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.data.add_(1),
        lambda layer: setattr(layer.weight, "data", torch.zeros(64, 64)),
        lambda layer: layer.weight.copy_(torch.zeros(64, 64)),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: torch.add(layer.weight, 1, out=layer.weight),
        lambda layer: torch._foreach_add_([layer.weight], 1.0),
        lambda layer: layer.reset_parameters(),
    ],
)
def test_writing_into_the_weight_is_refused(layer, write):
    """It would be lost: what is written into is a decoded copy."""
    before = layer.decode()
    with pytest.raises(RuntimeError, match="the weight of a quantized layer cannot be written to"):
        write(layer)
    assert torch.equal(layer.decode(), before)


def test_a_weight_may_be_copied_from(layer):
    target = torch.empty(64, 64)
    target.copy_(layer.weight)
    assert torch.equal(target, layer.decode())


def test_the_weight_follows_the_layers_dtype():
    for layer in (fp8(), DialectLinear.empty(nn.Linear(64, 64), "video", *book())):
        assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
        assert layer.half().weight.dtype == torch.float16
        assert layer.to("meta").weight.device.type == "meta"
        layer.to(torch.float8_e4m3fn)  # as layerwise casting stores parameters
        assert layer.weight.dtype == torch.float16


@pytest.mark.parametrize("activation_format", ["dialect", "fp8", "none"])
def test_a_rotated_layer_rotates_its_input_and_shows_its_weight_as_it_was(activation_format):
    torch.manual_seed(0)
    plain = nn.Linear(96, 40)
    layer = DialectLinear.quantized(
        plain, Stream.VIDEO, SEMANTIC_32, 32, activation_format, "layer", ROTATED
    )
    packed = quantize(plain.weight.detach(), SEMANTIC_32, rotation=ROTATED)
    x = torch.randn(2, 3, 96)
    assert torch.equal(layer(x), dialect_linear(x, packed, plain.bias, activation_format))
    back = torch.from_numpy(butterfly(packed.dequantize().numpy())) / 32
    assert torch.equal(layer.decode(), back)
    assert (layer.decode() - plain.weight).abs().max() < plain.weight.abs().max() / 4
    assert "rotation=hadamard_32" in repr(layer)


def test_the_salient_tokens_and_groups_of_a_rotated_layer():
    """The hooked layers compute what the ground floor's semantic linear layer does."""
    model = wan(layers=1)
    diffusers_hook.enable(model, progress=False, seda=True, salient_fraction=0.25, rotation=ROTATED)
    layer, seen = model.blocks[0].ffn.net[2], []

    def compare(module, inputs, output):
        (x,) = inputs
        rows = state_of(layer.slot).rows(layer.stream, x.shape[0] * x.shape[1], x.device)
        assert rows.salient is not None
        assert rows.group is not None
        assert layer.packed.rotation == ROTATED
        expected = semantic_linear(x, layer.packed, layer.bias, rows.salient, rows.group)
        seen.append(torch.equal(output, expected))

    layer.register_forward_hook(compare)
    run(model)
    assert seen == [True]


def test_layers_that_cannot_be_rotated(caplog):
    model = wan(layers=1, ffn_dim=48)
    left = "blocks.0.ffn.net.2"
    message = f"the columns of {left} are not a multiple of 32, which the rotation {ROTATED} needs"
    options = {"rotation": ROTATED, "block_size": 16, "progress": False}
    with pytest.raises(ValueError, match=f"{message}; add these layers to ignore, or pass strict="):
        diffusers_hook.enable(model, strict=True, **options)
    diffusers_hook.enable(model, **options)
    assert f"{message}; they are not rotated" in caplog.text
    assert model.get_submodule(left).rotation == "none"
    assert model.blocks[0].ffn.net[0].proj.rotation == ROTATED
    assert run(model).isfinite().all()


def book():
    return SEMANTIC_32, 32, "dialect"
