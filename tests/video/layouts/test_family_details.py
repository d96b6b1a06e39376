"""What single families do that others do not."""

import pytest
import torch
from torch import nn

import diffusers_hook
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.layouts import Stream, layout_for
from diffusers_hook.model.attach import attached
from tests.video.support.family_checks import (
    check_names,
    check_restored,
    check_rows,
    check_scores,
    check_swap_is_noticed,
)
from tests.video.support.joint_cases import CASES, COGVIDEOX, COGVIDEOX_BLOCK, EASYANIMATE_SHARED
from tests.video.support.kandinsky_cases import KANDINSKY5, call5
from tests.video.support.ltx_cases import ltx2, ltx_with_conditions
from tests.video.support.separate_cases import LATTE
from tests.video.support.tiny_parts import GRID, made

COGVIDEOX_CASE = CASES[0]


def only_branch(block):
    [branch] = block.branches.values()
    return branch


@pytest.mark.parametrize(
    "check", [check_names, check_scores, check_rows, check_swap_is_noticed, check_restored]
)
def test_easyanimate_blocks_without_layers_for_text(check):
    """Their attention sees one sequence, and their feed-forward network runs twice."""
    check(EASYANIMATE_SHARED)


def test_cogvideox_with_fused_projections():
    """The fused projection gets the rows of the three it takes the place of."""
    plain, fused = COGVIDEOX_CASE.build(), COGVIDEOX_CASE.build()
    fused.fuse_qkv_projections()
    before = COGVIDEOX_CASE.run(fused)
    for model in (plain, fused):
        diffusers_hook.enable(model, **COGVIDEOX_CASE.options)
    layer = fused.transformer_blocks[0].attn1.to_qkv
    assert isinstance(layer, DialectLinear)
    assert layer.stream == Stream.JOINT
    assert torch.equal(COGVIDEOX_CASE.run(fused), COGVIDEOX_CASE.run(plain))
    chosen = [[only_branch(b).salient for b in attached(m).state.blocks] for m in (plain, fused)]
    assert all(map(torch.equal, *chosen))
    diffusers_hook.disable(fused)
    assert torch.equal(COGVIDEOX_CASE.run(fused), before)


@pytest.mark.parametrize("case", [ltx2("LTX-2", beside=2), ltx_with_conditions()], ids=repr)
def test_ltx_coordinates_are_copied_from_the_device_once(case, monkeypatch):
    """The pipeline passes the same tensor in every call, and a copy waits for a GPU."""
    copies = []
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or copy(self))
    model, arguments = case.build(), case.arguments(2)
    layout = layout_for(model)
    for _ in range(3):
        assert layout.grid(model, arguments).shape == case.grid
    assert len(copies) == 1


def test_consisid_keeps_its_face_layers():
    model = made(
        "ConsisIDTransformer3DModel",
        **COGVIDEOX,
        is_train_face=True,
        cross_attn_dim_head=32,
        cross_attn_num_heads=2,
        LFE_id_dim=32,
        LFE_vit_dim=32,
        LFE_depth=5,
        LFE_dim_head=16,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=42,
    )()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert any(name.startswith("perceiver_cross_attention.0.") for name in linears)
    diffusers_hook.enable(model, progress=False, seda=True)
    quantized = {n for n, module in model.named_modules() if isinstance(module, DialectLinear)}
    assert quantized == {
        f"transformer_blocks.{i}.{name}" for i in range(2) for name in COGVIDEOX_BLOCK
    }


def test_latte_groups_stay_in_their_frame_or_at_their_place():
    """A token of another frame has no attention from a block that sees single frames."""
    model = LATTE.build()
    diffusers_hook.enable(model, **LATTE.options, seda_threshold=0.0)
    LATTE.run(model)
    frames, plane = GRID[0], GRID[1] * GRID[2]
    blocks = attached(model).state.blocks
    assert len(blocks) == 4
    for block in blocks:
        group = only_branch(block).group.long()
        if block.kind.attends == "time":  # its rows go place by place
            group = group.view(-1, plane, frames).transpose(1, 2).flatten(1)
        member = torch.arange(frames * plane).expand_as(group)[group >= 0]
        anchor = group[group >= 0]
        assert (member != anchor).any()
        if block.kind.attends == "time":
            member, anchor = member % plane, anchor % plane
        else:
            member, anchor = member // plane, anchor // plane
        assert torch.equal(member, anchor)


def test_kandinsky5_with_sparse_attention_rounds_alone():
    """Tokens are reordered into tiles then, and the mask is one of blocks."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    model = KANDINSKY5.build()
    for block in model.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = AttentionBackendName.FLEX
    tiles = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    sparse = {"sta_mask": tiles, "P": 0.9, "to_fractal": True}
    arguments = {**call5(1, (2, 8, 8)), "sparse_params": sparse}
    before = KANDINSKY5.run(model, arguments)
    diffusers_hook.enable(model, **KANDINSKY5.options)
    after = KANDINSKY5.run(model, arguments)
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    assert attached(model).state.meter.counts["salient refreshes"] == 0
    assert attached(model).state.meter.counts["decomposed rows"] == 0
