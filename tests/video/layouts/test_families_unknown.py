"""Classes without a layout: the linear layers of their blocks, after one warning."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import diffusers_hook
from diffusers_hook import LayoutError
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.model.attach import attached
from tests.video.support.unscored_cases import JOYIMAGE_EDIT

WARNING = (
    "Unheard: quantized without salient tokens and groups: its layout is not known, and only "
    "linear layers in stages.0.layers become 4 bit"
)


class Part(nn.Module):
    """Attention in name only, with what stays in 16 bit beside it."""

    def __init__(self):
        super().__init__()
        self.img_mod = nn.ModuleDict({"lin": nn.Linear(64, 64)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(64, 64))
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(64, 64)})
        self.attn = nn.ModuleDict({"qkv": nn.Linear(64, 64), "add_proj": nn.Linear(64, 64)})
        self.mlp = nn.ModuleList([nn.Linear(64, 128), nn.Linear(128, 64)])

    def forward(self, x):
        x = x + self.norm1["linear"](self.adaLN_modulation(self.img_mod["lin"](x)))
        x = x + self.attn["add_proj"](self.attn["qkv"](x))
        return x + self.mlp[1](self.mlp[0](x))


class Unheard(nn.Module):
    """Three blocks in a nested list, and a smaller list beside them."""

    def __init__(self):
        super().__init__()
        self.embedders = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])
        self.stages = nn.ModuleDict({"0": nn.ModuleDict({"layers": nn.ModuleList()})})
        self.stages["0"]["layers"].extend(Part() for _ in range(3))
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        for layer in (*self.embedders, *self.stages["0"]["layers"]):
            x = layer(x)
        return self.head(x)


def unheard():
    torch.manual_seed(0)
    return Unheard().eval()


@torch.no_grad()
def output(model):
    return model(torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)))


def quantized(model):
    return {name for name, part in model.named_modules() if isinstance(part, DialectLinear)}


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("diffusers_hook")]


def test_linear_layers_of_the_largest_list_of_blocks(caplog):
    model = unheard()
    before = output(model)
    with caplog.at_level(logging.WARNING, logger="diffusers_hook"):
        diffusers_hook.enable(model, progress=False, seda=True)
        after = output(model)
    assert messages(caplog) == [WARNING]
    inside = ("attn.qkv", "attn.add_proj", "mlp.0", "mlp.1")
    assert quantized(model) == {f"stages.0.layers.{i}.{name}" for i in range(3) for name in inside}
    assert 0 < (after - before).norm() < 0.2 * before.norm()
    assert diffusers_hook.summary(model).transformers[0].calls == 1
    diffusers_hook.disable(model)
    assert torch.equal(output(model), before)


def test_ignore_applies():
    model = unheard()
    diffusers_hook.enable(
        model, progress=False, ignore=[r"re:.*\.mlp\.", r"re:stages\.0\.layers\.0\."]
    )
    inside = ("attn.qkv", "attn.add_proj")
    assert quantized(model) == {f"stages.0.layers.{i}.{name}" for i in (1, 2) for name in inside}


def test_adapters_stay_in_16_bit():
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=["qkv"]), unheard(), adapter_name="mine"
    )
    diffusers_hook.enable(model, progress=False)
    assert not any("lora_" in name for name in quantized(model))
    assert "stages.0.layers.0.attn.qkv.base_layer" in quantized(model)


def test_strict_refuses_and_changes_nothing():
    model = unheard()
    with pytest.raises(LayoutError, match="its layout is not known"):
        diffusers_hook.enable(model, progress=False, strict=True)
    assert attached(model) is None
    assert not quantized(model)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(LayoutError, match="the layout of Sequential is not known"):
        diffusers_hook.enable(nn.Sequential(nn.Linear(64, 64)), progress=False)
    with pytest.raises(LayoutError, match="the layout of ModuleDict is not known"):
        diffusers_hook.enable(nn.ModuleDict({"a": nn.ModuleList([nn.ReLU()])}), progress=False)


def test_a_pipeline_names_its_transformers(caplog):
    parts = {"transformer": unheard(), "transformer_2": unheard(), "text_encoder": unheard()}
    pipe = SimpleNamespace(components=parts)
    with caplog.at_level(logging.WARNING, logger="diffusers_hook"):
        diffusers_hook.enable(pipe, progress=False)
    assert messages(caplog) == [WARNING, WARNING]
    assert [bool(quantized(part)) for part in parts.values()] == [True, True, False]
    assert len(diffusers_hook.summary(pipe).transformers) == 2


def test_saved_and_loaded(tmp_path, caplog):
    case = JOYIMAGE_EDIT
    model = case.build()
    diffusers_hook.enable(model, **case.options)
    expected = case.run(model)
    model.save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffusers_hook"):
        loaded = type(model).from_pretrained(tmp_path)
    assert len(messages(caplog)) == 1
    assert quantized(loaded) == set(case.streams)
    torch.testing.assert_close(case.run(loaded), expected, rtol=0, atol=1e-5)
