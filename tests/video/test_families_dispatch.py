"""Families whose attention goes through diffusers' dispatcher are supported in full."""

import pytest
import torch
from family_checks import (
    CHECKS,
    CONTEXT,
    VIDEO,
    Case,
    check_scores,
    spread,
    touch_argument,
    touch_latents,
)

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}
WAN_BLOCK = {
    **{f"attn1.{name}": VIDEO for name in ("to_q", "to_k", "to_v", "to_out.0")},
    "attn2.to_q": VIDEO,
    "attn2.to_k": CONTEXT,
    "attn2.to_v": CONTEXT,
    "attn2.to_out.0": VIDEO,
    "ffn.net.0.proj": VIDEO,
    "ffn.net.2": VIDEO,
}
WAN_KEPT = (
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "proj_out",
)
WAN_IMAGE_KEPT = (
    "condition_embedder.image_embedder.ff.net.0.proj",
    "condition_embedder.image_embedder.ff.net.2",
)


def made(name, **config):
    """Builds diffusers' class of that name, with the same weights every time."""

    def build():
        import diffusers

        torch.manual_seed(0)
        return getattr(diffusers, name)(**config).eval()

    return build


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wan_call(grid, channels=4, text=7, **more):
    """Arguments of a Wan call on a grid of 1 x 2 x 2 patches; `more`: name -> shape per sample."""

    def arguments(batch):
        frames, rows, columns = grid
        return {
            "hidden_states": noise(batch, channels, frames, 2 * rows, 2 * columns),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, text, 32, seed=2),
            **{name: noise(batch, *shape, seed=3) for name, shape in more.items()},
        }

    return arguments


def wan_case(name, grid=(3, 4, 2), model="WanTransformer3DModel", config=None, **options):
    settings = {
        "arguments": wan_call(grid),
        "streams": spread("blocks", 2, WAN_BLOCK),
        "kept": WAN_KEPT,
        "modulation": ("condition_embedder.time_proj",),
        "attentions": ("blocks.0.attn1", "blocks.1.attn1"),
        "touch_video": touch_latents(),
        "touch_text": touch_argument("encoder_hidden_states"),
    }
    build = made(model, **{**WAN, **(config or {})})
    return Case(name=name, build=build, grid=grid, **{**settings, **options})


def timestep_per_token(grid):
    def arguments(batch):
        tokens = grid[0] * grid[1] * grid[2]
        given = wan_call(grid)(batch)
        given["timestep"] = torch.arange(tokens).mul(7.0).expand(batch, -1).contiguous()
        return given

    return arguments


CASES = (
    wan_case("wan"),
    wan_case(
        "wan i2v 2.1",
        config={"in_channels": 12, "image_dim": 32, "added_kv_proj_dim": 64},
        arguments=wan_call((3, 4, 2), channels=12, text=512, encoder_hidden_states_image=(5, 32)),
        streams=spread(
            "blocks", 2, {**WAN_BLOCK, "attn2.add_k_proj": CONTEXT, "attn2.add_v_proj": CONTEXT}
        ),
        kept=WAN_KEPT + WAN_IMAGE_KEPT,
        last="blocks.1.ffn.net.2",
    ),
    wan_case("wan ti2v 2.2", arguments=timestep_per_token((3, 4, 2))),
)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_full_support(case, check):
    check(case)


def test_scores_where_queries_are_sampled():
    """From 128 queries on, every second is looked at."""
    check_scores(wan_case("wan, 128 tokens", grid=(4, 8, 4)))
