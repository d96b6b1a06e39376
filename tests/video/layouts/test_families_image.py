"""Image transformers of diffusers: every list of their blocks, each token rounded alone."""

import re

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

import diffusers_hook
from diffusers_hook import LayoutError
from diffusers_hook.layers.dialect import DialectLinear
from tests.video.support.image_cases import CASES

STAYS = re.compile(r"norm|mod|adaLN")
"""What the names of the linear layers in blocks that stay in 16 bit have in them."""


@torch.no_grad()
def output(model, arguments):
    """The first picture."""
    found = model(**arguments, return_dict=False)[0]
    return found[0] if isinstance(found, (list, tuple)) else found


def built(name):
    torch.manual_seed(0)
    model, arguments = CASES[name][0]()
    return model.eval(), arguments


@pytest.mark.parametrize("name", CASES)
def test_all_lists_of_blocks(name, tmp_path):
    model, arguments = built(name)
    lists, before = CASES[name][1], output(model, arguments)
    whole = sum(parameter.numel() for parameter in model.parameters())
    diffusers_hook.enable(model, progress=False, block_size=16 if name != "Z-Image" else 32)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            inside = path.split(".")[0] in lists and not STAYS.search(path)
            fits = layer.in_features % 32 == 0 or name != "Z-Image"
            assert isinstance(layer, DialectLinear) == (inside and fits), path
    layers = [part for part in model.modules() if isinstance(part, DialectLinear)]
    summary = diffusers_hook.summary(model)
    [found] = summary.transformers
    assert found.share == sum(m.in_features * m.out_features for m in layers) / whole
    assert f"{found.share:.1%}" in str(summary)
    after = output(model, arguments)
    assert 0 < (after - before).norm() < 0.15 * before.norm()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded, arguments), after)
    diffusers_hook.disable(model)
    assert torch.equal(output(model, arguments), before)


def unet():
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, cross_attention_dim=32,
        block_out_channels=(32, 64), attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


@pytest.mark.parametrize("build", [unet, AutoencoderKL])
def test_a_u_net_or_autoencoder_is_refused(build):
    model = build()
    with pytest.raises(LayoutError) as caught:
        diffusers_hook.enable(model)
    assert str(caught.value).startswith(f"{type(model).__name__}: has ")
    assert "_blocks, as U-Nets and autoencoders do, which are not supported" in str(caught.value)
    assert not any(isinstance(part, DialectLinear) for part in model.modules())
