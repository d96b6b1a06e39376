"""Blocks that stay in 16 bit by their place: ``ignore=["first:1", "last:1"]``."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel

import diffusers_hook
from diffusers_hook import ConfigError
from diffusers_hook.layers.dialect import DialectLinear
from tests.video.support.image_cases import flux
from tests.video.support.tiny_video import run, wan

PLACES = ["first:1", "last:2"]


def quantized_blocks(model):
    """The blocks with at least one layer in 4 bit."""
    layers = (name for name, part in model.named_modules() if isinstance(part, DialectLinear))
    return {".".join(name.split(".")[:2]) for name in layers}


def test_the_first_and_last_blocks_stay_in_16_bit(tmp_path):
    model = wan(layers=12)
    diffusers_hook.enable(model, progress=False, ignore=[*PLACES, "blocks.4.ffn.net.2"])
    assert quantized_blocks(model) == {f"blocks.{i}" for i in range(1, 10)}
    assert not isinstance(model.blocks[4].ffn.net[2], DialectLinear)
    summary = diffusers_hook.summary(model)
    assert summary.transformers[0].blocks_in_16_bit == 3
    assert "blocks in 16 bit" in str(summary)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    assert saved == [
        r"re:blocks\.0\.", r"re:blocks\.10\.", r"re:blocks\.11\.", "blocks.4.ffn.net.2"
    ]  # fmt: skip
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), run(model))
    diffusers_hook.enable(loaded, ignore=[*PLACES, "blocks.4.ffn.net.2"], salient_fraction=0.2)
    with pytest.raises(ConfigError, match=r"ignore: .* needs other weights than those loaded"):
        diffusers_hook.enable(loaded, ignore=["first:2"])


def test_every_list_of_blocks_has_a_first_and_a_last_one():
    torch.manual_seed(0)
    model, _ = flux()
    diffusers_hook.enable(model, progress=False, block_size=16, ignore=["last:1"])
    assert quantized_blocks(model) == {
        "transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"
    }  # fmt: skip


def test_a_model_with_no_block_left_is_refused():
    model = wan()
    with pytest.raises(ValueError, match="no linear layer is left to quantize, ignore="):
        diffusers_hook.enable(model, progress=False, ignore=["first:7"])
    assert not quantized_blocks(model)
